"""What the Triton kernels are made of: the features, and attention to a block of keys or features.

In all of them: bf16 or fp16 tensors with 4 dimensions [B, H, L, d] come as tensor descriptors, which fill what lies
outside with zeros; Z [H_state, r, d_v], k [H_state, r] and b [H_state] as pointers to contiguous memory, where r is R,
or R + 1 with the feature 1 as the last one (CONSTANT). Z_blocks is a descriptor of Z. The map is elu(x) + 1, where
R = D, or with RANDOM that of positive random features, whose directions W [R, D] are in float32. BD and BDV are D and
DV rounded up to powers of two, BF is the number of features handled at once. Exponents are to base 2 inside a
softmax; every stored lse is to base e.

With ROTATED > 0 phi sees queries whose rotary positions are undone: Table, WIDTH and START are explained in
rotation.py; stride_t is from one row of the batch to the next in Table, 0 where all have the same positions.

In a batch whose rows have different states (MIXED) Z, k and b are a stack of them, [A H_state, r, d_v] and so on, and
Index [B] has the place of each row's state in it, or -1. A row without a state is plain attention.
"""

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from .rotation import partner, turned_with

LOG2E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # on a CPU, for tests
# Sizes that change from call to call; a kernel is not compiled anew for each kind of number.
SIZES = ["B", "H", "H_kv", "heads_per_kv", "heads_per_state", "L", "S", "head_dim", "keys_per_split", "stride_split"]


def compiled(kernel: Callable[..., Any]) -> Any:
    return triton.jit(kernel, do_not_specialize=[name for name in SIZES if name in kernel.__code__.co_varnames])


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
def elu_features(x, columns, D: tl.constexpr, BF: tl.constexpr):
    """phi of [rows, features] in float32; 0 in the padding behind D, where Z and k have no row."""
    phi = tl.where(x < 0, tl.math.exp2(x * LOG2E), x + 1)
    if D % BF != 0:
        phi = tl.where(columns[None, :] < D, phi, 0.0)
    return phi


@triton.jit
def for_dot(z, like: tl.constexpr):
    """Z as an operand: bf16 next to bf16, tf32 next to fp16, whose exponents are too few."""
    return z.to(tl.bfloat16 if like == tl.bfloat16 else tl.float32)


@triton.jit
def k_block(k_state, state, j, R: tl.constexpr, CONSTANT: tl.constexpr, BF: tl.constexpr):
    """k of the features j ... j + BF of one head."""
    features = j + tl.arange(0, BF)
    return tl.load(k_state + state * (R + CONSTANT) + features, mask=features < R, other=0.0).to(tl.float32)


@triton.jit
def state_rows(
    Z, k_state, state, j,
    R: tl.constexpr, DV: tl.constexpr, CONSTANT: tl.constexpr, BF: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """Z [BF, BDV] and k [BF] of the features j ... j + BF of one head."""
    f = j + tl.arange(0, BF)
    v = tl.arange(0, BDV)
    Z += ((state * (R + CONSTANT) + f) * DV)[:, None]
    if R % BF == 0 and DV == BDV:
        z = tl.load(Z + v[None, :])
    else:
        z = tl.load(Z + v[None, :], mask=(f < R)[:, None] & (v < DV)[None, :], other=0.0)
    return z, k_block(k_state, state, j, R, CONSTANT, BF)


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
    x, like: tl.constexpr, Z_blocks, Z, k_state, state, head_dim, factor,
    D: tl.constexpr, DV: tl.constexpr, CONSTANT: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """phi(x) Z [BM, BDV], their scale to base 2 and phi(x) k [BM], without e^b."""
    z_one, k_one = constant_row(Z, k_state, state, D, DV, CONSTANT, BDV)
    k = k_block(k_state, state, 0, D, CONSTANT, BD)
    phi_Z = tl.zeros([BM, BDV], tl.float32) + z_one[None, :]
    phi_k = tl.zeros([BM], tl.float32) + k_one
    # A loop of one round: its memory, for Z, is free again before K and V take theirs.
    for j in tl.range(0, head_dim, BD, num_stages=1):
        z = Z_blocks.load([state, j, 0]).reshape([BD, BDV])
        phi = elu_features(x * factor, tl.arange(0, BD), D, BD)
        phi_k += tl.sum(phi * k[None, :], 1)
        phi_Z = dot(phi.to(z.dtype), z, phi_Z)
    return phi_Z, tl.zeros([BM], tl.float32), phi_k


@triton.jit
def random_exponents(x, w, features, factor, R: tl.constexpr, like: tl.constexpr, ROTATED: tl.constexpr):
    """w_i.x of positive random features, x [rows, d] against w [BF, d]; -inf in the padding behind R.

    In two parts, high and low, since an exponent must not have the rounding of bf16; x is of bf16 unless it was turned.
    """
    w_high, x_high = w.to(like), x.to(like)
    s = dot(x_high, (w - w_high.to(tl.float32)).to(like).T, dot(x_high, w_high.T))
    if ROTATED > 0:
        s = dot((x - x_high.to(tl.float32)).to(like), w_high.T, s)
    return tl.where((features < R)[None, :], s * factor, float("-inf"))


@triton.jit
def random_norm(x, factor, R: tl.constexpr):
    """|x|^2 / 2 + log(r) / 2, what every exponent of positive random features lacks."""
    x = x * factor
    return 0.5 * (tl.sum(x * x, 1) + tl.log(tl.full([], R, tl.float32)))


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
    x, like: tl.constexpr, W, Z_blocks, Z, k_state, state, factor,
    R: tl.constexpr, DV: tl.constexpr, CONSTANT: tl.constexpr, ROTATED: tl.constexpr,
    BM: tl.constexpr, BDV: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """The same as `elu_prefix` for positive random features, which are like keys: an online softmax over them."""
    z_one, k_one = constant_row(Z, k_state, state, R, DV, CONSTANT, BDV)
    acc = tl.zeros([BM, BDV], tl.float32) + z_one[None, :]
    mass = tl.zeros([BM], tl.float32) + k_one
    norm = random_norm(x, factor, R) * LOG2E
    peak = norm if CONSTANT else tl.zeros([BM], tl.float32) + NOTHING  # the feature 1 lacks nothing
    for j in tl.range(0, R, BF, num_stages=1):
        w = W.load([j, 0])
        s = random_exponents(x, w, j + tl.arange(0, BF), factor * LOG2E, R, like, ROTATED)
        z = Z_blocks.load([state, j, 0]).reshape([BF, BDV])
        acc, peak, mass = add_features(acc, peak, mass, s, z, k_block(k_state, state, j, R, CONSTANT, BF))
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
def unrotated_block(
    Q, Table, tokens, L, in_rows, f, D: tl.constexpr, ROTATED: tl.constexpr, WIDTH: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """The numbers f of the queries that Q points at, their rotary positions undone, in float32."""
    mask = in_rows[:, None] & (f < D)[None, :]
    x = tl.load(Q + f[None, :], mask=mask, other=0.0).to(tl.float32)
    if ROTATED > 0:
        other = tl.load(Q + partner(f, ROTATED, WIDTH, START)[None, :], mask=mask, other=0.0)
        x = turned_with(x, other, Table, tokens, L, f, False, ROTATED, WIDTH, START)
    return x


@triton.jit
def elu_part(
    Q, Table, tokens, L, Z, k_state, b_state, in_rows, h, h_kv, heads_per_kv, heads_per_state, factor,
    D: tl.constexpr, DV: tl.constexpr, CONSTANT: tl.constexpr, ROTATED: tl.constexpr, WIDTH: tl.constexpr,
    START: tl.constexpr, ROWS: tl.constexpr, BDV: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """The prefixes of all query heads of one KV head: phi(q) Z, b to base 2 and phi(q) k of each row."""
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
        for j in tl.range(0, D, BF, num_stages=1):
            f = j + tl.arange(0, BF)
            x = unrotated_block(Q, Table, tokens, L, in_rows, f, D, ROTATED, WIDTH, START)
            phi = tl.where(mine[:, None], elu_features(x * factor, f, D, BF), 0.0)
            z, k = state_rows(Z, k_state, state, j, D, DV, CONSTANT, BF, BDV)
            z = for_dot(z, Q.dtype.element_ty)
            mass += tl.sum(phi * k[None, :], 1)
            acc = dot(phi.to(z.dtype), z, acc)
    return acc, peak, mass


@triton.jit
def random_part(
    x, like: tl.constexpr, W, Z, k_state, b_state, h, h_kv, heads_per_kv, heads_per_state, factor,
    R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CONSTANT: tl.constexpr, ROTATED: tl.constexpr,
    ROWS: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """The same for positive random features."""
    d = tl.arange(0, BD)
    acc = tl.zeros([ROWS, BDV], tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    log_scale = tl.zeros([ROWS], tl.float32)
    norm = random_norm(x, factor, R) * LOG2E
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
            w = tl.load(W + f[:, None] * D + d[None, :], mask=(f < R)[:, None] & (d < D)[None, :], other=0.0)
            s = random_exponents(x, w, f, factor * LOG2E, R, like, ROTATED)
            s = tl.where(mine[:, None], s, float("-inf"))
            z, k = state_rows(Z, k_state, state, j, R, DV, CONSTANT, BF, BDV)
            acc, peak, mass = add_features(acc, peak, mass, s, for_dot(z, like), k)
    return acc, log_scale + peak - norm, mass


@triton.jit
def prefix_part(
    Q, Table, tokens, L, W, Z, k_state, b_state, in_rows, h, h_kv, heads_per_kv, heads_per_state, factor,
    RANDOM: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CONSTANT: tl.constexpr,
    ROTATED: tl.constexpr, WIDTH: tl.constexpr, START: tl.constexpr,
    ROWS: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    if RANDOM:
        x = unrotated_block(Q, Table, tokens, L, in_rows, tl.arange(0, BD), D, ROTATED, WIDTH, START)
        return random_part(
            x, Q.dtype.element_ty, W, Z, k_state, b_state, h, h_kv, heads_per_kv, heads_per_state, factor,
            R, D, DV, CONSTANT, ROTATED, ROWS, BD, BDV, BF,
        )  # fmt: skip
    else:
        return elu_part(
            Q, Table, tokens, L, Z, k_state, b_state, in_rows, h, h_kv, heads_per_kv, heads_per_state, factor,
            D, DV, CONSTANT, ROTATED, WIDTH, START, ROWS, BDV, BF,
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
