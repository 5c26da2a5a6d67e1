"""The Triton kernels of NTK-Attention; `launches.py` launches them.

In all of them: bf16 or fp16 tensors with 4 dimensions [B, H, L, d] come as tensor descriptors, which fill what lies
outside with zeros; Z [H_state, r, d_v], k [H_state, r] and b [H_state] as pointers to contiguous memory, where r is R,
or R + 1 with the feature 1 as the last one (CONSTANT). Z_blocks is a descriptor of Z. The map is elu(x) + 1, where
R = D, or with RANDOM that of positive random features, whose directions W [R, D] are in float32. BD and BDV are D and
DV rounded up to powers of two, BF is the number of features handled at once. Exponents are to base 2 inside a
softmax; every stored lse is to base e.

In a batch whose rows have different states (MIXED) Z, k and b are a stack of them, [A H_state, r, d_v] and so on, and
Index [B] has the place of each row's state in it, or -1. A row without a state is plain attention.
"""

import triton.language as tl

from .tiles import (
    LOG2E,
    NOTHING,
    TINY,
    attend_blocks,
    attend_cache,
    compiled,
    constant_row,
    dot,
    elu_features,
    elu_prefix,
    for_dot,
    k_block,
    merged,
    prefix_part,
    random_exponents,
    random_norm,
    random_prefix,
    stacked_head,
    stored_part,
)  # fmt: skip


@compiled
def fused_forward(
    Q, K, V, W, Z_blocks, Z, k_state, b_state, Index, Mask, Out, Lse,
    stride_mb, stride_mh, stride_ml, stride_ms, H, heads_per_kv, heads_per_state, L, S, head_dim, scale, factor,
    RANDOM: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CONSTANT: tl.constexpr,
    MIXED: tl.constexpr, IS_CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BF: tl.constexpr,
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
    if RANDOM:
        phi_Z, peak, phi_k = random_prefix(
            q, W, Z_blocks, Z, k_state, state, factor, R, DV, CONSTANT, BM, BD, BDV, BF
        )  # fmt: skip
    else:
        phi_Z, peak, phi_k = elu_prefix(q, Z_blocks, Z, k_state, state, head_dim, factor, D, DV, CONSTANT, BM, BD, BDV)
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
    Q, Context, Z_blocks, Z, k_state, b_state, Index, Out, Lse, B, H, heads_per_state, L, factor,
    D: tl.constexpr, DV: tl.constexpr, CONSTANT: tl.constexpr, MIXED: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Merge the prefix into the output and lse of plain attention; Out may be Context, Lse is changed in place.

    A program is for one head and B rows of the batch, all of them or, since they must share a state, one if MIXED.
    """
    first, h = tl.program_id(0) // H * B, tl.program_id(0) % H
    head, has_state = stacked_head(Index, first, h, H, MIXED)
    state = head // heads_per_state
    z = for_dot(Z_blocks.load([state, 0, 0]).reshape([BD, BDV]), Q.dtype)
    k = k_block(k_state, state, 0, D, CONSTANT, BD)
    z_one, k_one = constant_row(Z, k_state, state, D, DV, CONSTANT, BDV)
    log_scale = tl.load(b_state + state).to(tl.float32)
    blocks = tl.cdiv(L, BM)
    for step in tl.range(tl.program_id(1), B * blocks, tl.num_programs(1), num_stages=STAGES):
        t = B * blocks - 1 - step  # backwards: what was written last is still in the cache
        b, start = first + t // blocks, t % blocks * BM
        rows = start + tl.arange(0, BM)
        q = Q.load([b, h, start, 0]).reshape([BM, BD])
        context = Context.load([b, h, start, 0]).reshape([BM, BDV])
        lse_rows = Lse + (b.to(tl.int64) * H + h) * L + rows
        lse = tl.load(lse_rows, mask=rows < L, other=0.0)
        phi = elu_features(q.to(tl.float32) * factor, tl.arange(0, BD), D, BD)
        phi_k = tl.sum(phi * k[None, :], 1) + k_one
        phi_Z = dot(phi.to(z.dtype), z) + z_one[None, :]
        peak = tl.maximum(lse, log_scale)
        a = tl.exp(lse - peak)
        c = tl.where((phi_k > TINY) & has_state, tl.exp(log_scale - peak), 0.0)
        total = a + c * phi_k
        out = phi_Z * (c / total)[:, None] + context.to(tl.float32) * (a / total)[:, None]
        Out.store([b, h, start, 0], out.to(q.dtype).reshape([1, 1, BM, BDV]))
        tl.store(lse_rows, peak + tl.log(total), mask=rows < L)


@compiled
def prefix_backward(
    Grad, Q, Out, Lse, Grad_q, Z_blocks, k_state, b_state, Grad_Z, Grad_k, stride_split,
    B, H, heads_per_state, L, factor,
    D: tl.constexpr, DV: tl.constexpr, CONSTANT: tl.constexpr, ADD_TO_GRAD_Q: tl.constexpr,
    BM: tl.constexpr, BDV: tl.constexpr, BF: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What the prefix adds to the gradient of q, and its own; everything transposed, features in rows.

    With w = exp(b - lse) and delta = rowsum(dout * out): dphi = w (dout Z^T - delta k), dZ = phi^T (w dout),
    dk = -phi^T (w delta). Each split of the rows writes its own sums, so that the result does not depend on an order.
    """
    j = tl.program_id(0) * BF
    state = tl.program_id(1)
    split = tl.program_id(2)
    f = j + tl.arange(0, BF)
    v = tl.arange(0, BDV)
    z = for_dot(Z_blocks.load([state, j, 0]).reshape([BF, BDV]), Q.dtype)
    k = k_block(k_state, state, j, D, CONSTANT, BF)
    log_scale = tl.load(b_state + state).to(tl.float32)
    grad_Z = tl.zeros([BF, BDV], tl.float32)
    grad_k = tl.zeros([BF], tl.float32)
    grad_z_one = tl.zeros([16, BDV], tl.float32)
    grad_k_one = tl.zeros([BM], tl.float32)
    blocks = tl.cdiv(L, BM)
    tiles = B * heads_per_state * blocks
    for step in tl.range(split, tiles, tl.num_programs(2), num_stages=STAGES):
        t = tiles - 1 - step  # backwards: what was written last is still in the cache
        start = t % blocks * BM
        b = t // blocks // heads_per_state
        h = state * heads_per_state + t // blocks % heads_per_state
        rows = start + tl.arange(0, BM)
        grad = Grad.load([b, h, start, 0]).reshape([BM, BDV])
        out = Out.load([b, h, start, 0]).reshape([BM, BDV])
        x = Q.load([b, h, start, j]).reshape([BM, BF]).T.to(tl.float32) * factor
        lse = tl.load(Lse + (b.to(tl.int64) * H + h) * L + rows, mask=rows < L, other=float("inf"))
        w = tl.exp(log_scale - lse)
        delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
        z_grad = dot(z, grad.to(z.dtype).T)
        # Nothing is added; but the features are then computed where the products need them, in registers.
        x += 0.0 * z_grad
        w_phi = tl.where(x < 0, tl.math.exp2(x * LOG2E), x + 1) * w[None, :]
        if D % BF != 0:
            w_phi = tl.where((f < D)[:, None], w_phi, 0.0)
        grad_k -= tl.sum(w_phi * delta[None, :], 1)
        grad_Z = dot(w_phi.to(z.dtype), grad.to(z.dtype), grad_Z)
        if CONSTANT:
            w_grad = grad.to(tl.float32) * w[:, None]
            grad_z_one += tl.sum(w_grad.reshape([BM // 16, 16, BDV]), 0)  # over the rows that one thread holds
            grad_k_one -= w * delta
        if ADD_TO_GRAD_Q:
            grad_x = (z_grad - delta[None, :] * k[:, None]) * tl.where(x < 0, w_phi, w[None, :])
            grad_q = Grad_q.load([b, h, start, j]).reshape([BM, BF]).to(tl.float32) + factor * grad_x.T
            Grad_q.store([b, h, start, j], grad_q.to(Q.dtype).reshape([1, 1, BM, BF]))
    Grad_Z += split.to(tl.int64) * stride_split + state * (D + CONSTANT) * DV
    Grad_k += split.to(tl.int64) * stride_split + state * (D + CONSTANT)
    tl.store(Grad_Z + f[:, None] * DV + v[None, :], grad_Z, mask=(f < D)[:, None] & (v < DV)[None, :])
    tl.store(Grad_k + f, grad_k, mask=f < D)
    if CONSTANT and j == 0:
        tl.store(Grad_Z + D * DV + v, tl.sum(grad_z_one, 0), mask=v < DV)
        tl.store(Grad_k + D, tl.sum(grad_k_one, 0))


@compiled
def random_backward(
    Grad, Q, Out, Lse, W, b_state, Grad_Z, Grad_k, stride_split, B, H, heads_per_state, L, factor,
    R: tl.constexpr, DV: tl.constexpr, CONSTANT: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BF: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of Z and k for positive random features: dZ = phi^T (w dout), dk = -phi^T (w delta), in splits."""
    j = tl.program_id(0) * BF
    state = tl.program_id(1)
    split = tl.program_id(2)
    f = j + tl.arange(0, BF)
    v = tl.arange(0, BDV)
    directions = W.load([j, 0])
    log_scale = tl.load(b_state + state).to(tl.float32)
    grad_Z = tl.zeros([BF, BDV], tl.float32)
    grad_k = tl.zeros([BF], tl.float32)
    grad_z_one = tl.zeros([BDV], tl.float32)
    grad_k_one = 0.0
    blocks = tl.cdiv(L, BM)
    tiles = B * heads_per_state * blocks
    for t in tl.range(split, tiles, tl.num_programs(2), num_stages=STAGES):
        start = t % blocks * BM
        b = t // blocks // heads_per_state
        h = state * heads_per_state + t // blocks % heads_per_state
        rows = start + tl.arange(0, BM)
        grad = Grad.load([b, h, start, 0]).reshape([BM, BDV])
        out = Out.load([b, h, start, 0]).reshape([BM, BDV])
        q = Q.load([b, h, start, 0]).reshape([BM, BD])
        lse = tl.load(Lse + (b.to(tl.int64) * H + h) * L + rows, mask=rows < L, other=float("inf"))
        delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
        s = random_exponents(q, directions, f, factor, R)
        w_phi = tl.exp(s + (log_scale - lse - random_norm(q, factor, R))[:, None])
        grad_k -= tl.sum(w_phi * delta[:, None], 0)
        grad_Z = dot(w_phi.to(grad.dtype).T, grad, grad_Z)
        if CONSTANT:
            w = tl.exp(log_scale - lse)
            grad_z_one += tl.sum(grad.to(tl.float32) * w[:, None], 0)
            grad_k_one -= tl.sum(w * delta)
    Grad_Z += split.to(tl.int64) * stride_split + state * (R + CONSTANT) * DV
    Grad_k += split.to(tl.int64) * stride_split + state * (R + CONSTANT)
    tl.store(Grad_Z + f[:, None] * DV + v[None, :], grad_Z, mask=(f < R)[:, None] & (v < DV)[None, :])
    tl.store(Grad_k + f, grad_k, mask=f < R)
    if CONSTANT and j == 0:
        tl.store(Grad_Z + R * DV + v, grad_z_one, mask=v < DV)
        tl.store(Grad_k + R, grad_k_one)


@compiled
def random_grad_query(
    Grad, Q, Out, Lse, Grad_q, W, Z_blocks, k_state, b_state, H, heads_per_state, L, factor,
    R: tl.constexpr, CONSTANT: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """What the prefix adds to the gradient of q for positive random features: with the exponents' gradient
    ds = w phi (dout Z^T - delta k) it is dx = ds W - (ds 1) x."""
    start = tl.program_id(0) * BM
    bh = tl.program_id(1)
    b, h = bh // H, bh % H
    state = h // heads_per_state
    rows = start + tl.arange(0, BM)
    q = Q.load([b, h, start, 0]).reshape([BM, BD])
    grad = Grad.load([b, h, start, 0]).reshape([BM, BDV])
    out = Out.load([b, h, start, 0]).reshape([BM, BDV])
    lse = tl.load(Lse + bh.to(tl.int64) * L + rows, mask=rows < L, other=float("inf"))
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    log_w = tl.load(b_state + state).to(tl.float32) - lse - random_norm(q, factor, R)
    grad_x = tl.zeros([BM, BD], tl.float32)
    total = tl.zeros([BM], tl.float32)
    for j in tl.range(0, R, BF, num_stages=1):
        directions = W.load([j, 0])
        s = random_exponents(q, directions, j + tl.arange(0, BF), factor, R)
        z = for_dot(Z_blocks.load([state, j, 0]).reshape([BF, BDV]), Q.dtype)
        k = k_block(k_state, state, j, R, CONSTANT, BF)
        grad_s = tl.exp(s + log_w[:, None]) * (dot(grad.to(z.dtype), z.T) - delta[:, None] * k[None, :])
        total += tl.sum(grad_s, 1)
        grad_x = dot(grad_s.to(q.dtype), directions.to(q.dtype), grad_x)
    grad_x -= total[:, None] * q.to(tl.float32) * factor
    grad_q = Grad_q.load([b, h, start, 0]).reshape([BM, BD]).to(tl.float32) + factor * grad_x
    Grad_q.store([b, h, start, 0], grad_q.to(Q.dtype).reshape([1, 1, BM, BD]))


@compiled
def decode(
    Q, K, V, W, Z, k_state, b_state, Index, Mask, Out, Partial, Counter,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_mb, stride_mh, stride_ml, stride_ms, stride_ob, stride_oh, stride_ol,
    H_kv, heads_per_kv, heads_per_state, L, S, keys_per_split, scale, factor,
    RANDOM: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CONSTANT: tl.constexpr,
    MIXED: tl.constexpr, MASKED: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BF: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A short query against a long cache: the query heads of one KV head are the rows, its keys are split.

    The prefix is one more split. The one that finishes last puts all parts together, so that it takes one launch; it
    leaves the counter at zero for the next one. Partial holds the outputs of all parts, then their peaks, then their
    masses.
    """
    split = tl.program_id(0)
    bh = tl.program_id(1)
    b, h_kv = bh // H_kv, bh % H_kv
    b = b.to(tl.int64)
    row = tl.arange(0, ROWS)
    head = row // L  # within the group of the KV head
    h = h_kv * heads_per_kv + head
    wide_h, wide_h_kv = h.to(tl.int64)[:, None], h_kv.to(tl.int64)  # products with strides pass 2^31
    state_kv, has_state = stacked_head(Index, b, h_kv, H_kv, MIXED)
    state_h = state_kv * heads_per_kv + head
    in_rows = row < heads_per_kv * L
    d = tl.arange(0, BD)
    v = tl.arange(0, BDV)
    Q += b * stride_qb + wide_h * stride_qh + (row % L)[:, None] * stride_ql
    q = tl.load(Q + d[None, :], mask=in_rows[:, None] & (d < D)[None, :], other=0.0)

    acc, peak, mass = attend_cache(
        q, K + b * stride_kb + wide_h_kv * stride_kh, V + b * stride_vb + wide_h_kv * stride_vh,
        Mask + b * stride_mb + wide_h * stride_mh + (row % L)[:, None] * stride_ml, stride_ks, stride_vs, stride_ms,
        in_rows, split * keys_per_split, tl.minimum((split + 1) * keys_per_split, S), scale * LOG2E,
        D, DV, MASKED, ROWS, BN, BD, BDV, STAGES,
    )  # fmt: skip
    is_last = True
    part = bh.to(tl.int64) * (SPLITS + 1) * ROWS + row
    parts = tl.num_programs(1).to(tl.int64) * (SPLITS + 1) * ROWS
    Partial_peak = Partial + parts * BDV
    Partial_mass = Partial_peak + parts
    if SPLITS > 1:
        if split == SPLITS:
            acc, peak, mass = prefix_part(
                q, Q, W, Z, k_state, b_state, in_rows, state_h, state_kv, heads_per_kv, heads_per_state, factor,
                RANDOM, R, D, DV, CONSTANT, ROWS, BD, BDV, BF,
            )  # fmt: skip
        tl.store(Partial_peak + part + split * ROWS, peak)
        tl.store(Partial_mass + part + split * ROWS, mass)
        tl.store(Partial + (part + split * ROWS)[:, None] * BDV + v[None, :], acc)
        tl.debug_barrier()  # the stores of all threads come before the count
        is_last = tl.atomic_add(Counter + bh, 1, sem="acq_rel") == SPLITS
    if is_last:
        if SPLITS > 1:
            tl.store(Counter + bh, 0)
            acc = tl.zeros([ROWS, BDV], tl.float32)
            mass = tl.zeros([ROWS], tl.float32)
            peak = tl.zeros([ROWS], tl.float32) + NOTHING
            for other in tl.range(0, SPLITS, num_stages=3):
                acc, peak, mass = merged(acc, peak, mass, *stored_part(
                    Partial, Partial_peak, Partial_mass, part + other * ROWS, BDV,
                ))  # fmt: skip
            phi_Z, log_scale, phi_k = stored_part(Partial, Partial_peak, Partial_mass, part + SPLITS * ROWS, BDV)
        else:
            phi_Z, log_scale, phi_k = prefix_part(
                q, Q, W, Z, k_state, b_state, in_rows, state_h, state_kv, heads_per_kv, heads_per_state, factor,
                RANDOM, R, D, DV, CONSTANT, ROWS, BD, BDV, BF,
            )  # fmt: skip
        sees_prefix = (peak > NOTHING) & (phi_k > TINY) & has_state  # not where it sees no key
        log_scale = tl.where(sees_prefix, log_scale, NOTHING)
        phi_k = tl.where(sees_prefix, phi_k, 0.0)
        acc, peak, mass = merged(acc, peak, mass, tl.where(sees_prefix[:, None], phi_Z, 0.0), log_scale, phi_k)
        out = acc / tl.where(mass > 0, mass, 1.0)[:, None]
        out_rows = Out + b * stride_ob + h[:, None] * stride_oh + (row % L)[:, None] * stride_ol
        tl.store(out_rows + v[None, :], out.to(q.dtype), mask=in_rows[:, None] & (v < DV)[None, :])
