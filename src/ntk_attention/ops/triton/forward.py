"""The forward pass: tokens and prefix in one kernel, or the prefix merged into the output of a library's kernel.

The arguments are explained in tiles.py.
"""

import triton.language as tl

from .pairs import load_halves, turned
from .tiles import (
    LOG2E,
    NOTHING,
    TINY,
    attend_blocks,
    compiled,
    constant_row,
    dot,
    elu_features,
    elu_prefix,
    for_dot,
    random_prefix,
    stacked_head,
    state_rows,
)


@compiled
def fused_forward(
    Q, K, V, X_blocks, Table_blocks, Z_blocks, Out, Z, k_state, b_state, W, Index, Mask, Lse,
    stride_mb, stride_mh, stride_ml, stride_ms, table_step,
    H, heads_per_kv, heads_per_state, L, S, one, scale, factor,
    RANDOM: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CONSTANT: tl.constexpr,
    ROTATED: tl.constexpr, MIXED: tl.constexpr, IS_CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, BDV: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """Flash attention whose online softmax starts from the block of the prefix instead of from nothing."""
    i = tl.cdiv(L, BM) - 1 - tl.program_id(0)  # under causality the longest rows first
    bh = tl.program_id(1)
    b, h = bh // H, bh % H
    head, has_state = stacked_head(Index, b, h, H, MIXED)
    state = head // heads_per_state
    h_kv = h // heads_per_kv
    rows = i * BM + tl.arange(0, BM)
    q = Q.load([b, h, i * BM, 0]).reshape([BM, BD])
    log_scale = tl.load(b_state + state).to(tl.float32) * LOG2E
    x1, x2, cos, sin = load_halves(X_blocks, Table_blocks, b, b * table_step, h, i * BM, 0, D, ROTATED, BM, BH)
    x1, x2 = turned(x1, x2, cos, sin, ROTATED, False)
    if RANDOM:
        phi_Z, peak, phi_k = random_prefix(
            x1, x2, q.dtype, W, Z_blocks, Z, k_state, state, factor, R, D, DV, CONSTANT, ROTATED, BM, BH, BDV, BF
        )  # fmt: skip
    else:
        phi_Z, peak, phi_k = elu_prefix(
            x1, x2, q.dtype, Z_blocks, Z, k_state, state, one, factor, D, DV, CONSTANT, BM, BH, BDV
        )  # fmt: skip
    has_weight = (phi_k > TINY) & has_state
    prefix_out = phi_Z * tl.where(has_weight, 1 / phi_k, 0.0)[:, None]
    prefix_peak = tl.where(has_weight, tl.math.log2(phi_k) + peak + log_scale, NOTHING)
    qk_scale = scale * LOG2E
    checked, end = S, S
    if IS_CAUSAL:
        checked, end = tl.minimum(i * BM, S), tl.minimum((i + 1) * BM, S)
    if MASKED:
        # The context by itself first: a row that sees no key must not see the prefix either. An lse of +inf lets no
        # gradient through to it.
        Mask += b.to(tl.int64) * stride_mb + h.to(tl.int64) * stride_mh
        Mask += tl.minimum(rows, L - 1).to(tl.int64)[:, None] * stride_ml
        acc = tl.zeros([BM, BDV], tl.float32)
        mass = tl.zeros([BM], tl.float32)
        context_peak = tl.zeros([BM], tl.float32) + NOTHING
        acc, context_peak, mass = attend_blocks(
            acc, context_peak, mass, q, K, V, Mask, stride_ms, b, h_kv, rows, 0, end, S, qk_scale,
            IS_CAUSAL, True, BN, BD, BDV,
        )  # fmt: skip
        dead = context_peak == NOTHING
        peak = tl.where(dead, NOTHING, tl.maximum(prefix_peak, context_peak))
        prefix = tl.math.exp2(tl.where(dead, NOTHING, prefix_peak - peak))
        context = tl.math.exp2(context_peak - peak)
        acc = acc * context[:, None] + prefix_out * prefix[:, None]
        mass = tl.where(dead, 1.0, mass * context + prefix)
        lse = tl.where(dead, float("inf"), (peak + tl.math.log2(mass)) / LOG2E)
    else:
        acc, peak, mass = attend_blocks(
            prefix_out, prefix_peak, tl.where(has_weight, 1.0, 0.0), q, K, V, Mask, stride_ms, b, h_kv, rows,
            checked, end, S, qk_scale, IS_CAUSAL, False, BN, BD, BDV,
        )  # fmt: skip
        lse = (peak + tl.math.log2(mass)) / LOG2E
    tl.store(Lse + bh.to(tl.int64) * L + rows, lse, mask=rows < L)
    Out.store([b, h, i * BM, 0], (acc * (1 / mass)[:, None]).to(q.dtype).reshape([1, 1, BM, BDV]))


@compiled
def merge_prefix(
    X_blocks, Table_blocks, Context, Out, Z, k_state, b_state, Index, Lse,
    table_step, B, H, heads_per_state, L, factor,
    D: tl.constexpr, DV: tl.constexpr, CONSTANT: tl.constexpr, ROTATED: tl.constexpr, MIXED: tl.constexpr,
    BM: tl.constexpr, BH: tl.constexpr, BDV: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Merge the prefix into the output and lse of plain attention; Out may be Context, Lse is changed in place.

    A program is for one head and B rows of the batch, all of them or, since they must share a state, one if MIXED.
    """
    first, h = tl.program_id(0) // H * B, tl.program_id(0) % H
    head, has_state = stacked_head(Index, first, h, H, MIXED)
    state = head // heads_per_state
    p = tl.arange(0, BH)
    z1, k1 = state_rows(Z, k_state, state, p, p < D // 2, D, DV, CONSTANT, BDV)
    z2, k2 = state_rows(Z, k_state, state, p + D // 2, p < D // 2, D, DV, CONSTANT, BDV)
    z1, z2 = for_dot(z1, Context.dtype), for_dot(z2, Context.dtype)
    z_one, k_one = constant_row(Z, k_state, state, D, DV, CONSTANT, BDV)
    log_scale = tl.load(b_state + state).to(tl.float32)
    blocks = tl.cdiv(L, BM)
    for step in tl.range(tl.program_id(1), B * blocks, tl.num_programs(1), num_stages=STAGES):
        t = B * blocks - 1 - step  # backwards: what was written last is still in the cache
        b, start = first + t // blocks, t % blocks * BM
        rows = start + tl.arange(0, BM)
        x1, x2, cos, sin = load_halves(X_blocks, Table_blocks, b, b * table_step, h, start, 0, D, ROTATED, BM, BH)
        x1, x2 = turned(x1, x2, cos, sin, ROTATED, False)
        context = Context.load([b, h, start, 0]).reshape([BM, BDV])
        lse_rows = Lse + (b.to(tl.int64) * H + h) * L + rows
        lse = tl.load(lse_rows, mask=rows < L, other=0.0)
        phi1, phi2 = elu_features(x1 * factor, p, D, BH), elu_features(x2 * factor, p, D, BH)
        phi_k = tl.sum(phi1 * k1[None, :], 1) + tl.sum(phi2 * k2[None, :], 1) + k_one
        phi_Z = dot(phi2.to(z2.dtype), z2, dot(phi1.to(z1.dtype), z1)) + z_one[None, :]
        peak = tl.maximum(lse, log_scale)
        a = tl.exp(lse - peak)
        c = tl.where((phi_k > TINY) & has_state, tl.exp(log_scale - peak), 0.0)
        total = a + c * phi_k
        out = phi_Z * (c / total)[:, None] + context.to(tl.float32) * (a / total)[:, None]
        Out.store([b, h, start, 0], out.to(context.dtype).reshape([1, 1, BM, BDV]))
        tl.store(lse_rows, peak + tl.log(total), mask=rows < L)
