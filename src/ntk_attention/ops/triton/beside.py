"""Rotary positions undone in a kernel of its own, for rotations that tiles of many tokens do not know, see pairs.py.

The arguments are explained in tiles.py.
"""

import triton.language as tl

from .pairs import UNIT, head_of
from .tiles import compiled


@compiled
def turn_rows(
    X, Table, Out, stride_xb, stride_xh, stride_xl, stride_ob, stride_oh, stride_ol, stride_t, H, L,
    D: tl.constexpr, ROTATED: tl.constexpr, WIDTH: tl.constexpr, START: tl.constexpr,
    FORWARD: tl.constexpr, ADD: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """X with every pair turned back, or FORWARD, into Out or added to it; of whole heads, which lie in one piece."""
    bh = tl.program_id(1)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    wide_rows = rows.to(tl.int64)[:, None]
    d = tl.arange(0, BD)
    mask = (rows < L)[:, None] & (d < D)[None, :]
    place = d - START
    is_rotated = (place >= 0) & (place < ROTATED)
    is_first = place % WIDTH < WIDTH // 2
    partner = tl.where(is_rotated, tl.where(is_first, d + WIDTH // 2, d - WIDTH // 2), d)
    x = tl.load(
        head_of(X, b, h, stride_xb, stride_xh) + wide_rows * (stride_xl * UNIT) + d[None, :], mask=mask, other=0.0
    )
    other = tl.gather(x, partner[None, :] + tl.zeros([BM, BD], tl.int32), 1)
    pair = place // WIDTH * (WIDTH // 2) + place % (WIDTH // 2)
    angles = Table + b * stride_t + rows[:, None] * ROTATED + pair[None, :]
    cos = tl.load(angles, mask=mask & is_rotated[None, :], other=1.0).to(tl.float32)
    sin = tl.load(angles + ROTATED // 2, mask=mask & is_rotated[None, :], other=0.0).to(tl.float32)
    sin = tl.where((is_first != FORWARD)[None, :], sin, -sin)
    turned = cos * x.to(tl.float32) + sin * other.to(tl.float32)
    out = head_of(Out, b, h, stride_ob, stride_oh) + wide_rows * (stride_ol * UNIT) + d[None, :]
    if ADD:
        turned += tl.load(out, mask=mask, other=0.0).to(tl.float32)
    tl.store(out, turned.to(Out.dtype.element_ty), mask=mask)
