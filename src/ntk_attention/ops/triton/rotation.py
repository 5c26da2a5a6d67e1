"""Rotary positions, undone on the tile.

Table has a row for every token, [1 or B, L, ROTATED] in float32: the cosines of all pairs, then their sines. The
numbers START ... START + ROTATED - 1 of a head are rotated, i with i + WIDTH / 2 in every run of WIDTH; see `Rotation`.
"""

import triton
import triton.language as tl


@triton.jit
def partner(f, ROTATED: tl.constexpr, WIDTH: tl.constexpr, START: tl.constexpr):
    """The other number of each pair; a number that is not rotated has none, and is its own."""
    place = f - START
    is_first = place % WIDTH < WIDTH // 2
    other = tl.where(is_first, f + WIDTH // 2, f - WIDTH // 2)
    return tl.where((place >= 0) & (place < ROTATED), other, f)


@triton.jit
def turned_with(
    x, other, Table, rows, L, f, FORWARD: tl.constexpr,
    ROTATED: tl.constexpr, WIDTH: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """x [rows, features] with every pair turned back, or FORWARD, given the tile of partners; in float32."""
    place = f - START
    inside = (place >= 0) & (place < ROTATED)
    pair = place // WIDTH * (WIDTH // 2) + place % (WIDTH // 2)
    angles = Table + rows.to(tl.int64)[:, None] * ROTATED + pair[None, :]
    mask = (rows < L)[:, None] & inside[None, :]
    cos = tl.load(angles, mask=mask, other=1.0)
    sin = tl.load(angles + ROTATED // 2, mask=mask, other=0.0)
    is_first = (place % WIDTH < WIDTH // 2)[None, :]
    sin = tl.where(is_first != FORWARD, sin, -sin)
    return cos * x.to(tl.float32) + sin * other.to(tl.float32)


@triton.jit
def turned(
    x, Table, rows, L, f, FORWARD: tl.constexpr, ROTATED: tl.constexpr, WIDTH: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """The same of a tile that has all numbers of a head; x as it is without a rotation, in float32."""
    if ROTATED == 0:
        return x.to(tl.float32)
    else:
        index = partner(f, ROTATED, WIDTH, START)[None, :] + tl.zeros(x.shape, tl.int32)
        return turned_with(x, tl.gather(x, index, 1), Table, rows, L, f, FORWARD, ROTATED, WIDTH, START)
