"""Rotary positions undone in a kernel of its own, for rotations that tiles of many tokens do not know, see pairs.py.

The arguments are explained in tiles.py.
"""

import triton.language as tl

from .pairs import UNIT, head_of, members, turned
from .tiles import compiled


@compiled
def turn_rows(
    X, Table, Out, stride_xb, stride_xh, stride_xl, stride_ob, stride_oh, stride_ol, stride_t, H, L,
    D: tl.constexpr, ROTATED: tl.constexpr, WIDTH: tl.constexpr, START: tl.constexpr,
    FORWARD: tl.constexpr, ADD: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """X with every pair turned back, or FORWARD, into Out or added to it."""
    bh = tl.program_id(1)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    p = tl.arange(0, BH)
    first, second = members(p, D, ROTATED, WIDTH, START)
    mask = (rows < L)[:, None] & (p < D // 2)[None, :]
    x = head_of(X, b, h, stride_xb, stride_xh) + rows.to(tl.int64)[:, None] * (stride_xl * UNIT)
    x1 = tl.load(x + first[None, :], mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x + second[None, :], mask=mask, other=0.0).to(tl.float32)
    angles = Table + b * stride_t + rows[:, None] * ROTATED + p[None, :]
    is_rotated = mask & (p < ROTATED // 2)[None, :]
    cos = tl.load(angles, mask=is_rotated, other=1.0)
    sin = tl.load(angles + ROTATED // 2, mask=is_rotated, other=0.0)
    x1, x2 = turned(x1, x2, cos, sin, ROTATED, FORWARD)
    out = head_of(Out, b, h, stride_ob, stride_oh) + rows.to(tl.int64)[:, None] * (stride_ol * UNIT)
    if ADD:
        x1 += tl.load(out + first[None, :], mask=mask, other=0.0).to(tl.float32)
        x2 += tl.load(out + second[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + first[None, :], x1.to(Out.dtype.element_ty), mask=mask)
    tl.store(out + second[None, :], x2.to(Out.dtype.element_ty), mask=mask)
