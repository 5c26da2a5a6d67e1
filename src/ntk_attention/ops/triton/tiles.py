"""What the Triton kernels are made of: the features, and attention to a block of keys or features.

In all of them: bf16 or fp16 tensors with 4 dimensions [B, H, L, d] come as tensor descriptors, which fill what lies
outside with zeros, or as pointers with strides in units of UNIT numbers, 16 bytes; Z [H_state, r, d_v], k [H_state, r]
and b [H_state] as pointers to contiguous memory, where r is R, or R + 1 with the feature 1 as the last one (CONSTANT).
Z_blocks is a descriptor of Z. X_blocks holds what phi sees of the queries, in halves: the queries, whose rotary
positions are undone if ROTATED > 0 (pairs.py), with Table_blocks, of which a row of the batch is table_step rows after
the one before. The map is elu(x) + 1, where R = D, or with RANDOM that of positive random features, whose directions W
[2, R, D / 2] are in float32, one half of their numbers after the other. BD, BH and BDV are D, D / 2 and DV rounded up
to powers of two, BF is the number of features handled at once. Exponents are to base 2 inside a softmax; every stored
lse is to base e.

In a batch whose rows have different states (MIXED) Z, k and b are a stack of them, [A H_state, r, d_v] and so on, and
Index [B] has the place of each row's state in it, or -1. A row without a state is plain attention.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import triton
import triton.language as tl

from .pairs import load_pairs, load_rows, members

LOG2E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # on a CPU, for tests
# Sizes that change from call to call; a kernel is not compiled anew for each kind of number, nor for where small
# vectors begin: what is compiled depends on the types of pointers and on constants alone, which launcher.py relies on.
SIZES = {
    "B", "H", "H_kv", "heads_per_kv", "heads_per_state", "L", "S", "one", "keys_per_split",
    "rows", "table_step", "scale", "factor",
}  # fmt: skip
VECTORS = {"k_state", "b_state", "Index", "Mask", "Cos", "Sin"}


def decorated(jit: Callable[..., Any], kernel: Callable[..., Any]) -> Any:
    """A kernel for `Launcher`, by `triton.jit` or `gluon.jit`."""
    names = kernel.__code__.co_varnames[: kernel.__code__.co_argcount]
    numbers = [name for name in names if name in SIZES or name.startswith("stride")]
    vectors = [name for name in names if name in VECTORS]
    return jit(kernel, do_not_specialize=numbers, do_not_specialize_on_alignment=vectors)


compiled = partial(decorated, triton.jit)
TINY = tl.constexpr(1.2e-38)  # the least phi(q) k that is a weight
NOTHING = tl.constexpr(-1e30)  # a running maximum before the first logit; finite, so that differences are numbers


@triton.jit
def stacked_head(Index, b, h, H, MIXED: tl.constexpr):
    """Where a stack of states has head h of the state of row b, and whether the row has one; Index holds -1 if not."""
    if MIXED:
        place = tl.load(Index + b)
        return tl.maximum(place, 0) * H + h, place >= 0
    return h, True


@triton.jit
def dot(a, b, acc=None):
    """The matrix product, accumulated in float32."""
    if INTERPRETED:  # whose own product takes bf16 for integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def elu_features(x, p, D: tl.constexpr, BH: tl.constexpr):
    """phi of one number of each pair, [rows, BH] in float32; 0 in the padding, where Z and k have no row."""
    phi = tl.where(x < 0, tl.math.exp2(x * LOG2E), x + 1)
    if D // 2 % BH != 0:
        phi = tl.where(p[None, :] < D // 2, phi, 0.0)
    return phi


@triton.jit
def for_dot(z, like: tl.constexpr):
    """Z as an operand: bf16 next to bf16, tf32 next to fp16, whose exponents are too few."""
    return z.to(tl.bfloat16 if like == tl.bfloat16 else tl.float32)


@triton.jit
def k_rows(k_state, state, rows, in_rows, R: tl.constexpr, CONSTANT: tl.constexpr):
    """k of these features of one head; 0 outside."""
    return tl.load(k_state + state * (R + CONSTANT) + rows, mask=in_rows, other=0.0).to(tl.float32)


@triton.jit
def state_rows(
    Z, k_state, state, rows, in_rows, R: tl.constexpr, DV: tl.constexpr, CONSTANT: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """Z [features, BDV] and k of these features of one head; 0 outside."""
    z = load_rows(Z + state * (R + CONSTANT) * DV, rows, in_rows, DV, BDV)
    return z, k_rows(k_state, state, rows, in_rows, R, CONSTANT)


@triton.jit
def constant_row(Z, k_state, state, R: tl.constexpr, DV: tl.constexpr, CONSTANT: tl.constexpr, BDV: tl.constexpr):
    """The row of the feature 1: Z [BDV] and k; zeros without it."""
    v = tl.arange(0, BDV)
    if CONSTANT:
        row = state * (R + 1) + R
        z = tl.load(Z + row * DV + v, mask=v < DV, other=0.0).to(tl.float32)
        return z, tl.load(k_state + row).to(tl.float32)
    return tl.zeros([BDV], tl.float32), 0.0


@triton.jit
def hide(s, n, Mask, stride_ms, rows, S, IS_CAUSAL: tl.constexpr, MASKED: tl.constexpr, BN: tl.constexpr):
    """Logits of the keys n ... n + BN, with -inf where a row does not see the key."""
    columns = n + tl.arange(0, BN)
    visible = (columns < S)[None, :]
    if IS_CAUSAL:
        visible = visible & (columns[None, :] <= rows[:, None])
    if MASKED:
        visible = visible & (tl.load(Mask + columns.to(tl.int64)[None, :] * stride_ms, mask=visible, other=0) != 0)
    return tl.where(visible, s, float("-inf"))


@triton.jit
def attend_blocks(
    acc, peak, mass, q, K, V, Mask, stride_ms, b, h_kv, rows, checked, end, S, qk_scale,
    IS_CAUSAL: tl.constexpr, MASKED: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """The online softmax over the keys 0 ... end, all of them visible before `checked`; Mask points at the rows."""
    for n in tl.range(0, end, BN):
        k = K.load([b, h_kv, n, 0]).reshape([BN, BD])
        s = dot(q, k.T)
        if MASKED:
            s = hide(s, n, Mask, stride_ms, rows, S, IS_CAUSAL, True, BN)
        elif n + BN > checked:
            s = hide(s, n, Mask, stride_ms, rows, S, IS_CAUSAL, False, BN)
        new_peak = tl.maximum(peak, tl.max(s, 1) * qk_scale)
        p = tl.math.exp2(s * qk_scale - new_peak[:, None])  # one fused multiply-add
        alpha = tl.math.exp2(peak - new_peak)
        mass = mass * alpha + tl.sum(p, 1)
        v = V.load([b, h_kv, n, 0]).reshape([BN, BDV])
        acc = dot(p.to(v.dtype), v, acc * alpha[:, None])
        peak = new_peak
    return acc, peak, mass


@triton.jit
def elu_prefix(
    x1, x2, like: tl.constexpr, Z_blocks, Z, k_state, state, one, factor,
    D: tl.constexpr, DV: tl.constexpr, CONSTANT: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """phi(x) Z [BM, BDV], their scale to base 2 and phi(x) k [BM], without e^b."""
    z_one, k_one = constant_row(Z, k_state, state, D, DV, CONSTANT, BDV)
    phi_Z = tl.zeros([BM, BDV], tl.float32) + z_one[None, :]
    phi_k = tl.zeros([BM], tl.float32) + k_one
    p = tl.arange(0, BH)
    # A loop of one round: its memory, for Z, is free again before K and V take theirs.
    for j in tl.range(0, one, 1, num_stages=1):
        z1 = Z_blocks.load([state, j, 0]).reshape([BH, BDV])
        z2 = Z_blocks.load([state, j + D // 2, 0]).reshape([BH, BDV])
        phi1, phi2 = elu_features(x1 * factor, p, D, BH), elu_features(x2 * factor, p, D, BH)
        phi_k += tl.sum(phi1 * k_rows(k_state, state, p, p < D // 2, D, CONSTANT)[None, :], 1)
        phi_k += tl.sum(phi2 * k_rows(k_state, state, p + D // 2, p < D // 2, D, CONSTANT)[None, :], 1)
        phi_Z = dot(phi2.to(z2.dtype), z2, dot(phi1.to(z1.dtype), z1, phi_Z))
    return phi_Z, tl.zeros([BM], tl.float32), phi_k


@triton.jit
def random_exponents(x, w, s, like: tl.constexpr, ROTATED: tl.constexpr):
    """s + x w^T of x [rows, BH] and directions w [BF, BH] in float32, for positive random features.

    In two parts, high and low, since an exponent must not have the rounding of bf16; x is of bf16 unless it was turned.
    """
    w_high, x_high = w.to(like), x.to(like)
    s = dot(x_high, (w - w_high.to(tl.float32)).to(like).T, dot(x_high, w_high.T, s))
    if ROTATED > 0:
        s = dot((x - x_high.to(tl.float32)).to(like), w_high.T, s)
    return s


@triton.jit
def random_logits(x1, x2, w1, w2, features, factor, R: tl.constexpr, like: tl.constexpr, ROTATED: tl.constexpr):
    """The exponents w_i.x of both parts of the numbers; -inf in the padding behind R."""
    s = random_exponents(x1, w1, tl.zeros([x1.shape[0], w1.shape[0]], tl.float32), like, ROTATED)
    s = random_exponents(x2, w2, s, like, ROTATED)
    return tl.where((features < R)[None, :], s * factor, float("-inf"))


@triton.jit
def random_norm(x1, x2, factor, R: tl.constexpr):
    """|x|^2 / 2 + log(r) / 2, what every exponent of positive random features lacks."""
    squares = tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)
    return 0.5 * (squares * factor * factor + tl.log(tl.full([], R, tl.float32)))


@triton.jit
def add_features(acc, peak, mass, s, z, k):
    """One round of the online softmax over features: exponents s to base 2 [rows, BF], Z [BF, BDV], k [BF]."""
    new_peak = tl.maximum(peak, tl.max(s, 1))
    p = tl.math.exp2(s - new_peak[:, None])
    alpha = tl.math.exp2(peak - new_peak)
    mass = mass * alpha + tl.sum(p * k[None, :], 1)
    return dot(p.to(z.dtype), z, acc * alpha[:, None]), new_peak, mass


@triton.jit
def random_prefix(
    x1, x2, like: tl.constexpr, W, Z_blocks, Z, k_state, state, factor,
    R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CONSTANT: tl.constexpr, ROTATED: tl.constexpr,
    BM: tl.constexpr, BH: tl.constexpr, BDV: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """The same as `elu_prefix` for positive random features, which are like keys: an online softmax over them."""
    z_one, k_one = constant_row(Z, k_state, state, R, DV, CONSTANT, BDV)
    acc = tl.zeros([BM, BDV], tl.float32) + z_one[None, :]
    mass = tl.zeros([BM], tl.float32) + k_one
    norm = random_norm(x1, x2, factor, R) * LOG2E
    peak = norm if CONSTANT else tl.zeros([BM], tl.float32) + NOTHING  # the feature 1 lacks nothing
    for j in tl.range(0, R, BF, num_stages=1):
        f = j + tl.arange(0, BF)
        w1, w2 = load_rows(W, f, f < R, D // 2, BH), load_rows(W + R * (D // 2), f, f < R, D // 2, BH)
        s = random_logits(x1, x2, w1, w2, f, factor * LOG2E, R, like, ROTATED)
        z = Z_blocks.load([state, j, 0]).reshape([BF, BDV])
        acc, peak, mass = add_features(acc, peak, mass, s, z, k_rows(k_state, state, f, f < R, R, CONSTANT))
    return acc, peak - norm, mass


@triton.jit
def attend_cache(
    q, K, V, Mask, stride_ks, stride_vs, stride_ms, in_rows, start, end, qk_scale,
    D: tl.constexpr, DV: tl.constexpr, MASKED: tl.constexpr,
    ROWS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The online softmax of a few rows over the keys start ... end of one head."""
    d = tl.arange(0, BD)
    v = tl.arange(0, BDV)
    acc = tl.zeros([ROWS, BDV], tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    peak = tl.zeros([ROWS], tl.float32) + NOTHING
    for n in tl.range(start, end, BN, num_stages=STAGES):
        keys = n + tl.arange(0, BN)
        wide_keys = keys.to(tl.int64)
        offset = wide_keys[:, None]
        in_keys = keys < end
        k = tl.load(K + offset * stride_ks + d[None, :], mask=in_keys[:, None] & (d < D)[None, :], other=0.0)
        visible = in_rows[:, None] & in_keys[None, :]
        if MASKED:
            visible = visible & (tl.load(Mask + wide_keys[None, :] * stride_ms, mask=visible, other=0) != 0)
        s = tl.where(visible, dot(q, k.T) * qk_scale, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1))
        p = tl.math.exp2(s - new_peak[:, None])
        alpha = tl.math.exp2(peak - new_peak)
        mass = mass * alpha + tl.sum(p, 1)
        values = tl.load(V + offset * stride_vs + v[None, :], mask=in_keys[:, None] & (v < DV)[None, :], other=0.0)
        acc = dot(p.to(values.dtype), values, acc * alpha[:, None])
        peak = new_peak
    return acc, peak, mass


@triton.jit
def elu_part(
    Q, Table, tokens, Z, k_state, b_state, in_rows, h, h_kv, heads_per_kv, heads_per_state, factor,
    D: tl.constexpr, DV: tl.constexpr, CONSTANT: tl.constexpr, ROTATED: tl.constexpr, WIDTH: tl.constexpr,
    START: tl.constexpr, ROWS: tl.constexpr, BDV: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """The prefixes of all query heads of one KV head: phi(x) Z, b to base 2 and phi(x) k of each row."""
    acc = tl.zeros([ROWS, BDV], tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    peak = tl.zeros([ROWS], tl.float32)
    states = heads_per_kv // heads_per_state
    for state in tl.range(h_kv * states, (h_kv + 1) * states, num_stages=2 if D <= 128 else 1):
        mine = h // heads_per_state == state
        z_one, k_one = constant_row(Z, k_state, state, D, DV, CONSTANT, BDV)
        acc += tl.where(mine[:, None], z_one[None, :], 0.0)
        mass += tl.where(mine, k_one, 0.0)
        peak += tl.where(mine, tl.load(b_state + state).to(tl.float32) * LOG2E, 0.0)
        for j in tl.range(0, D // 2, BH, num_stages=1):
            p = j + tl.arange(0, BH)
            x1, x2 = load_pairs(Q, Table, tokens, in_rows, p, D, ROTATED, WIDTH, START)
            first, second = members(p, D, ROTATED, WIDTH, START)
            phi1 = tl.where(mine[:, None], elu_features(x1 * factor, p, D, BH), 0.0)
            phi2 = tl.where(mine[:, None], elu_features(x2 * factor, p, D, BH), 0.0)
            z1, k1 = state_rows(Z, k_state, state, first, p < D // 2, D, DV, CONSTANT, BDV)
            z2, k2 = state_rows(Z, k_state, state, second, p < D // 2, D, DV, CONSTANT, BDV)
            z1, z2 = for_dot(z1, Q.dtype.element_ty), for_dot(z2, Q.dtype.element_ty)
            mass += tl.sum(phi1 * k1[None, :], 1) + tl.sum(phi2 * k2[None, :], 1)
            acc = dot(phi2.to(z2.dtype), z2, dot(phi1.to(z1.dtype), z1, acc))
    return acc, peak, mass


@triton.jit
def random_part(
    x1, x2, like: tl.constexpr, W, Z, k_state, b_state, h, h_kv, heads_per_kv, heads_per_state, factor,
    R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CONSTANT: tl.constexpr, ROTATED: tl.constexpr,
    ROWS: tl.constexpr, BH: tl.constexpr, BDV: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """The same for positive random features."""
    acc = tl.zeros([ROWS, BDV], tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    log_scale = tl.zeros([ROWS], tl.float32)
    norm = random_norm(x1, x2, factor, R) * LOG2E
    peak = norm if CONSTANT else tl.zeros([ROWS], tl.float32) + NOTHING
    states = heads_per_kv // heads_per_state
    for state in tl.range(h_kv * states, (h_kv + 1) * states, num_stages=1):
        mine = h // heads_per_state == state
        z_one, k_one = constant_row(Z, k_state, state, R, DV, CONSTANT, BDV)
        acc += tl.where(mine[:, None], z_one[None, :], 0.0)
        mass += tl.where(mine, k_one, 0.0)
        log_scale += tl.where(mine, tl.load(b_state + state).to(tl.float32) * LOG2E, 0.0)
        for j in tl.range(0, R, BF, num_stages=1):
            f = j + tl.arange(0, BF)
            w1, w2 = load_rows(W, f, f < R, D // 2, BH), load_rows(W + R * (D // 2), f, f < R, D // 2, BH)
            s = random_logits(x1, x2, w1, w2, f, factor * LOG2E, R, like, ROTATED)
            s = tl.where(mine[:, None], s, float("-inf"))
            z, k = state_rows(Z, k_state, state, f, f < R, R, DV, CONSTANT, BDV)
            acc, peak, mass = add_features(acc, peak, mass, s, for_dot(z, like), k)
    return acc, log_scale + peak - norm, mass


@triton.jit
def prefix_part(
    Q, Table, tokens, W, Z, k_state, b_state, in_rows, h, h_kv, heads_per_kv, heads_per_state, factor,
    RANDOM: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CONSTANT: tl.constexpr,
    ROTATED: tl.constexpr, WIDTH: tl.constexpr, START: tl.constexpr,
    ROWS: tl.constexpr, BH: tl.constexpr, BDV: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    if RANDOM:
        x1, x2 = load_pairs(Q, Table, tokens, in_rows, tl.arange(0, BH), D, ROTATED, WIDTH, START)
        return random_part(
            x1, x2, Q.dtype.element_ty, W, Z, k_state, b_state, h, h_kv, heads_per_kv, heads_per_state, factor,
            R, D, DV, CONSTANT, ROTATED, ROWS, BH, BDV, BF,
        )  # fmt: skip
    else:
        return elu_part(
            Q, Table, tokens, Z, k_state, b_state, in_rows, h, h_kv, heads_per_kv, heads_per_state, factor,
            D, DV, CONSTANT, ROTATED, WIDTH, START, ROWS, BDV, BH,
        )  # fmt: skip


@triton.jit
def merged(acc, peak, mass, other_acc, other_peak, other_mass):
    """Two parts of a softmax as one."""
    new_peak = tl.maximum(peak, other_peak)
    a = tl.math.exp2(peak - new_peak)
    c = tl.math.exp2(other_peak - new_peak)
    return acc * a[:, None] + other_acc * c[:, None], new_peak, mass * a + other_mass * c


@triton.jit
def stored_part(Partial_out, Partial_peak, Partial_mass, part, BDV: tl.constexpr):
    """What another program has left, past the cache of this one."""
    out = tl.load(Partial_out + part[:, None] * BDV + tl.arange(0, BDV)[None, :], cache_modifier=".cg")
    peak = tl.load(Partial_peak + part, cache_modifier=".cg")
    return out, peak, tl.load(Partial_mass + part, cache_modifier=".cg")
