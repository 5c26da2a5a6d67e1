"""The gradients of the prefix: to Z and k, and what it adds to that of the query.

The arguments are explained in tiles.py.
"""

import triton.language as tl

from .rotation import turned
from .tiles import (
    LOG2E,
    compiled,
    dot,
    for_dot,
    k_block,
    random_exponents,
    random_norm,
)


@compiled
def prefix_backward(
    Grad, Q, Out, Lse, Grad_q, Z_blocks, k_state, b_state, Table, Grad_Z, Grad_k, stride_t, stride_split,
    B, H, heads_per_state, L, factor,
    D: tl.constexpr, DV: tl.constexpr, CONSTANT: tl.constexpr,
    ROTATED: tl.constexpr, WIDTH: tl.constexpr, START: tl.constexpr, ADD_TO_GRAD_Q: tl.constexpr,
    BM: tl.constexpr, BDV: tl.constexpr, BF: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What the prefix adds to the gradient of q, and its own; everything transposed, features in rows.

    With w = exp(b - lse) and delta = rowsum(dout * out): dphi = w (dout Z^T - delta k), dZ = phi^T (w dout),
    dk = -phi^T (w delta). Each split of the rows writes its own sums, so that the result does not depend on an order.
    With a rotation a block has all features of a head (BF >= D).
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
        table = Table + b.to(tl.int64) * stride_t
        q = Q.load([b, h, start, j]).reshape([BM, BF])
        x = turned(q, table, rows, L, f, False, ROTATED, WIDTH, START).T * factor
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
            grad_x = turned(grad_x.T, table, rows, L, f, True, ROTATED, WIDTH, START)
            grad_q = Grad_q.load([b, h, start, j]).reshape([BM, BF]).to(tl.float32) + factor * grad_x
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
    Grad, Q, Out, Lse, W, b_state, Table, Grad_Z, Grad_k, stride_t, stride_split, B, H, heads_per_state, L, factor,
    R: tl.constexpr, DV: tl.constexpr, CONSTANT: tl.constexpr,
    ROTATED: tl.constexpr, WIDTH: tl.constexpr, START: tl.constexpr,
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
        table = Table + b.to(tl.int64) * stride_t
        x = turned(q, table, rows, L, tl.arange(0, BD), False, ROTATED, WIDTH, START)
        s = random_exponents(x, directions, f, factor, R, q.dtype, ROTATED)
        w_phi = tl.exp(s + (log_scale - lse - random_norm(x, factor, R))[:, None])
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
    Grad, Q, Out, Lse, Grad_q, W, Z_blocks, k_state, b_state, Table, stride_t, H, heads_per_state, L, factor,
    R: tl.constexpr, CONSTANT: tl.constexpr, ROTATED: tl.constexpr, WIDTH: tl.constexpr, START: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BF: tl.constexpr,
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
    table = Table + b.to(tl.int64) * stride_t
    x = turned(q, table, rows, L, tl.arange(0, BD), False, ROTATED, WIDTH, START)
    log_w = tl.load(b_state + state).to(tl.float32) - lse - random_norm(x, factor, R)
    grad_x = tl.zeros([BM, BD], tl.float32)
    total = tl.zeros([BM], tl.float32)
    for j in tl.range(0, R, BF, num_stages=1):
        directions = W.load([j, 0])
        s = random_exponents(x, directions, j + tl.arange(0, BF), factor, R, q.dtype, ROTATED)
        z = for_dot(Z_blocks.load([state, j, 0]).reshape([BF, BDV]), Q.dtype)
        k = k_block(k_state, state, j, R, CONSTANT, BF)
        grad_s = tl.exp(s + log_w[:, None]) * (dot(grad.to(z.dtype), z.T) - delta[:, None] * k[None, :])
        total += tl.sum(grad_s, 1)
        grad_x = dot(grad_s.to(q.dtype), directions.to(q.dtype), grad_x)
    grad_x -= total[:, None] * x * factor
    grad_x = turned(grad_x, table, rows, L, tl.arange(0, BD), True, ROTATED, WIDTH, START)
    grad_q = Grad_q.load([b, h, start, 0]).reshape([BM, BD]).to(tl.float32) + factor * grad_x
    Grad_q.store([b, h, start, 0], grad_q.to(Q.dtype).reshape([1, 1, BM, BD]))
