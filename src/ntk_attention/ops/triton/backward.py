"""The gradients of the prefix: to Z and k, and what it adds to that of the query.

The arguments are explained in tiles.py.
"""

import triton
import triton.language as tl

from .pairs import cut, features_of, joined, load_halves, load_rows, turned
from .tiles import (
    LOG2E,
    compiled,
    dot,
    for_dot,
    random_logits,
    random_norm,
    state_rows,
)


@triton.jit
def add_block(Grad_x, b, h, start, place, addend, BM: tl.constexpr, BF: tl.constexpr):
    """Add [BM, BF] to what Grad_x holds from `place` on in each head."""
    x = Grad_x.load([b, h, start, place]).reshape([BM, BF]).to(tl.float32) + addend
    Grad_x.store([b, h, start, place], x.to(Grad_x.dtype).reshape([1, 1, BM, BF]))


@compiled
def prefix_backward(
    Grad, Out, X_blocks, Table_blocks, Grad_x, Z, k_state, b_state, Lse, Grad_Z, Grad_k,
    stride_split, table_step, B, H, heads_per_state, L, factor,
    D: tl.constexpr, DV: tl.constexpr, CONSTANT: tl.constexpr, ROTATED: tl.constexpr,
    ADD_TO_GRAD: tl.constexpr, GRAD_HALF: tl.constexpr, WHOLE: tl.constexpr,
    BM: tl.constexpr, BDV: tl.constexpr, BH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What the prefix adds to the gradient of q, and its own; everything transposed, features in rows.

    With w = exp(b - lse) and delta = rowsum(dout * out): dphi = w (dout Z^T - delta k), dZ = phi^T (w dout),
    dk = -phi^T (w delta). Blocks of X_blocks and Grad_x are WHOLE heads, where these need not be turned, or halves of
    heads; these are GRAD_HALF numbers apart in Grad_x. Each split of the rows writes its own sums, so that the result
    does not depend on an order.
    """
    j = tl.program_id(0) * BH
    state = tl.program_id(1)
    split = tl.program_id(2)
    f, is_own = features_of(j, D, BH)
    v = tl.arange(0, BDV)
    z, k = state_rows(Z, k_state, state, f, is_own, D, DV, CONSTANT, BDV)
    z = for_dot(z, Grad.dtype)
    log_scale = tl.load(b_state + state).to(tl.float32)
    grad_Z = tl.zeros([2 * BH, BDV], tl.float32)
    grad_k = tl.zeros([2 * BH], tl.float32)
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
        if WHOLE:
            x = X_blocks.load([b, h, start, 0]).reshape([BM, 2 * BH]).T.to(tl.float32) * factor
        else:
            x1, x2, cos, sin = load_halves(X_blocks, Table_blocks, b, b * table_step, h, start, j, D, ROTATED, BM, BH)
            x1, x2 = turned(x1, x2, cos, sin, ROTATED, False)
            x = joined(x1.to(Grad.dtype), x2.to(Grad.dtype), BM, BH).T.to(tl.float32) * factor
        lse = tl.load(Lse + (b.to(tl.int64) * H + h) * L + rows, mask=rows < L, other=float("inf"))
        w = tl.exp(log_scale - lse)
        delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
        z_grad = dot(z, grad.to(z.dtype).T)
        # Nothing is added; but the features are then computed where the products need them, in registers.
        x += 0.0 * z_grad
        w_phi = tl.where(x < 0, tl.math.exp2(x * LOG2E), x + 1) * w[None, :]
        if D // 2 % BH != 0:
            w_phi = tl.where(is_own[:, None], w_phi, 0.0)
        grad_k -= tl.sum(w_phi * delta[None, :], 1)
        grad_Z = dot(w_phi.to(z.dtype), grad.to(z.dtype), grad_Z)
        if CONSTANT:
            w_grad = grad.to(tl.float32) * w[:, None]
            grad_z_one += tl.sum(w_grad.reshape([BM // 16, 16, BDV]), 0)  # over the rows that one thread holds
            grad_k_one -= w * delta
        if ADD_TO_GRAD:
            grad_x = (z_grad - delta[None, :] * k[:, None]) * tl.where(x < 0, w_phi, w[None, :])
            grad_x = (factor * grad_x).T
            if WHOLE:
                add_block(Grad_x, b, h, start, 0, grad_x, BM, 2 * BH)
            else:
                grad_x1, grad_x2 = cut(grad_x.to(Grad.dtype), BM, BH)
                grad_x1, grad_x2 = turned(grad_x1.to(tl.float32), grad_x2.to(tl.float32), cos, sin, ROTATED, True)
                add_block(Grad_x, b, h, start, j, grad_x1, BM, BH)
                add_block(Grad_x, b, h, start, j + GRAD_HALF, grad_x2, BM, BH)
    Grad_Z += split.to(tl.int64) * stride_split + state * (D + CONSTANT) * DV
    Grad_k += split.to(tl.int64) * stride_split + state * (D + CONSTANT)
    tl.store(Grad_Z + f[:, None] * DV + v[None, :], grad_Z, mask=is_own[:, None] & (v < DV)[None, :])
    tl.store(Grad_k + f, grad_k, mask=is_own)
    if CONSTANT and j == 0:
        tl.store(Grad_Z + D * DV + v, tl.sum(grad_z_one, 0), mask=v < DV)
        tl.store(Grad_k + D, tl.sum(grad_k_one, 0))


@compiled
def random_backward(
    Grad, Out, X_blocks, Table_blocks, W, b_state, Lse, Grad_Z, Grad_k,
    stride_split, table_step, B, H, heads_per_state, L, factor,
    R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CONSTANT: tl.constexpr, ROTATED: tl.constexpr,
    BM: tl.constexpr, BH: tl.constexpr, BDV: tl.constexpr, BF: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of Z and k for positive random features: dZ = phi^T (w dout), dk = -phi^T (w delta), in splits."""
    j = tl.program_id(0) * BF
    state = tl.program_id(1)
    split = tl.program_id(2)
    f = j + tl.arange(0, BF)
    v = tl.arange(0, BDV)
    w1, w2 = load_rows(W, f, f < R, D // 2, BH), load_rows(W + R * (D // 2), f, f < R, D // 2, BH)
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
        x1, x2, cos, sin = load_halves(X_blocks, Table_blocks, b, b * table_step, h, start, 0, D, ROTATED, BM, BH)
        x1, x2 = turned(x1, x2, cos, sin, ROTATED, False)
        lse = tl.load(Lse + (b.to(tl.int64) * H + h) * L + rows, mask=rows < L, other=float("inf"))
        delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
        s = random_logits(x1, x2, w1, w2, f, factor, R, grad.dtype, ROTATED)
        w_phi = tl.exp(s + (log_scale - lse - random_norm(x1, x2, factor, R))[:, None])
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
    Grad, Out, X_blocks, Table_blocks, Grad_x, W, Z, k_state, b_state, Lse,
    table_step, H, heads_per_state, L, factor,
    R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CONSTANT: tl.constexpr, ROTATED: tl.constexpr,
    GRAD_HALF: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, BDV: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """What the prefix adds to the gradient of q for positive random features: with the exponents' gradient
    ds = w phi (dout Z^T - delta k) it is dx = ds W - (ds 1) x."""
    start = tl.program_id(0) * BM
    bh = tl.program_id(1)
    b, h = bh // H, bh % H
    state = h // heads_per_state
    rows = start + tl.arange(0, BM)
    grad = Grad.load([b, h, start, 0]).reshape([BM, BDV])
    out = Out.load([b, h, start, 0]).reshape([BM, BDV])
    x1, x2, cos, sin = load_halves(X_blocks, Table_blocks, b, b * table_step, h, start, 0, D, ROTATED, BM, BH)
    x1, x2 = turned(x1, x2, cos, sin, ROTATED, False)
    lse = tl.load(Lse + bh.to(tl.int64) * L + rows, mask=rows < L, other=float("inf"))
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    log_w = tl.load(b_state + state).to(tl.float32) - lse - random_norm(x1, x2, factor, R)
    grad_x1 = tl.zeros([BM, BH], tl.float32)
    grad_x2 = tl.zeros([BM, BH], tl.float32)
    total = tl.zeros([BM], tl.float32)
    for j in tl.range(0, R, BF, num_stages=1):
        f = j + tl.arange(0, BF)
        w1, w2 = load_rows(W, f, f < R, D // 2, BH), load_rows(W + R * (D // 2), f, f < R, D // 2, BH)
        s = random_logits(x1, x2, w1, w2, f, factor, R, grad.dtype, ROTATED)
        z, k = state_rows(Z, k_state, state, f, f < R, R, DV, CONSTANT, BDV)
        z = for_dot(z, grad.dtype)
        grad_s = tl.exp(s + log_w[:, None]) * (dot(grad.to(z.dtype), z.T) - delta[:, None] * k[None, :])
        total += tl.sum(grad_s, 1)
        grad_x1 = dot(grad_s.to(grad.dtype), w1.to(grad.dtype), grad_x1)
        grad_x2 = dot(grad_s.to(grad.dtype), w2.to(grad.dtype), grad_x2)
    grad_x1 -= total[:, None] * x1 * factor
    grad_x2 -= total[:, None] * x2 * factor
    grad_x1, grad_x2 = turned(grad_x1, grad_x2, cos, sin, ROTATED, True)
    add_block(Grad_x, b, h, start, 0, factor * grad_x1, BM, BH)
    add_block(Grad_x, b, h, start, GRAD_HALF, factor * grad_x2, BM, BH)
