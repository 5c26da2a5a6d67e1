"""What phi sees of a query: two tiles [tokens, D / 2] of its numbers in pairs, their rotary positions undone.

Table has a row for every token, [1 or B, L, ROTATED]: the cosines of all rotated pairs, then their sines; see
`Rotation`. Tiles of many tokens know one kind of rotation, of all D numbers of a head in one run: its pairs are the two
halves of the head. Of a few tokens (decoding) they know all kinds: the numbers START ... START + ROTATED - 1 are
rotated, i with i + WIDTH / 2 in every run of WIDTH, and the other numbers stand as pairs behind these.
"""

import triton
import triton.language as tl

UNIT = tl.constexpr(8)  # numbers of 16 bits in the 16 bytes that strides count: compilers know so that rows are aligned


@triton.jit
def head_of(X, b, h, stride_b, stride_h):
    """Where one head of one row of a batch begins; both are int64, since products with strides pass 2^31."""
    return X + (b * stride_b + h * stride_h) * UNIT


@triton.jit
def members(p, D: tl.constexpr, ROTATED: tl.constexpr, WIDTH: tl.constexpr, START: tl.constexpr):
    """Where the first and the second numbers of the pairs p stand in a head."""
    if ROTATED == 0 or (ROTATED == D and WIDTH == D):
        first, second = p, p + D // 2
    else:
        first = p // (WIDTH // 2) * WIDTH + p % (WIDTH // 2) + START
        second = first + WIDTH // 2
        other_first = p - ROTATED // 2
        other_second = other_first + (D - ROTATED) // 2
        other_first = tl.where(other_first < START, other_first, other_first + ROTATED)
        other_second = tl.where(other_second < START, other_second, other_second + ROTATED)
        first = tl.where(p < ROTATED // 2, first, other_first)
        second = tl.where(p < ROTATED // 2, second, other_second)
    return first, second


@triton.jit
def turned(x1, x2, cos, sin, ROTATED: tl.constexpr, FORWARD: tl.constexpr):
    """Both tiles in float32, with every pair turned back by its angle, or FORWARD."""
    if ROTATED > 0:
        cos, sin = cos.to(tl.float32), sin.to(tl.float32)
        if FORWARD:
            sin = -sin
        x1, x2 = cos * x1 + sin * x2, cos * x2 - sin * x1
    return x1, x2


@triton.jit
def load_half(X_blocks, b, h, start, half, j, D: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr):
    """The numbers j ... j + BH of one half of the heads of some tokens, [BM, BH] in float32; 0 in the padding."""
    x = X_blocks.load([b, h, start, half * (D // 2) + j]).reshape([BM, BH]).to(tl.float32)
    if D // 2 % BH != 0:
        x = tl.where((j + tl.arange(0, BH) < D // 2)[None, :], x, 0.0)
    return x


@triton.jit
def load_halves(
    X_blocks, Table_blocks, b, table_b, h, start, j,
    D: tl.constexpr, ROTATED: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Both halves of these numbers, to be turned back with the cosines and sines of their angles.

    With ROTATED = 0 there are none, and the numbers stand for them.
    """
    x1 = load_half(X_blocks, b, h, start, 0, j, D, BM, BH)
    x2 = load_half(X_blocks, b, h, start, 1, j, D, BM, BH)
    if ROTATED > 0:
        cos = Table_blocks.load([table_b, start, j]).reshape([BM, BH]).to(tl.float32)
        sin = Table_blocks.load([table_b, start, j + D // 2]).reshape([BM, BH]).to(tl.float32)
    else:
        cos, sin = x1, x2
    return x1, x2, cos, sin


@triton.jit
def features_of(j, D: tl.constexpr, BH: tl.constexpr):
    """The numbers of the pairs j ... j + BH of a head, all first members, then all second ones; and which there are."""
    i = tl.arange(0, 2 * BH)
    p = j + i % BH
    return p + i // BH * (D // 2), p < D // 2


@triton.jit
def joined(x1, x2, BM: tl.constexpr, BH: tl.constexpr):
    """[BM, BH] and [BM, BH] side by side."""
    return tl.join(x1, x2).permute(0, 2, 1).reshape([BM, 2 * BH])


@triton.jit
def cut(x, BM: tl.constexpr, BH: tl.constexpr):
    """The two of which `joined` made x."""
    return x.reshape([BM, 2, BH]).permute(0, 2, 1).split()


@triton.jit
def load_pairs(
    Q, Table, tokens, in_rows, p,
    D: tl.constexpr, ROTATED: tl.constexpr, WIDTH: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """The numbers of a few queries, by pointers Q [rows, 1], turned back; 0 in the padding. In float32."""
    first, second = members(p, D, ROTATED, WIDTH, START)
    mask = in_rows[:, None] & (p < D // 2)[None, :]
    x1 = tl.load(Q + first[None, :], mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(Q + second[None, :], mask=mask, other=0.0).to(tl.float32)
    if ROTATED > 0:
        angles = Table + tokens[:, None] * ROTATED + p[None, :]
        mask = in_rows[:, None] & (p < ROTATED // 2)[None, :]
        cos = tl.load(angles, mask=mask, other=1.0)
        sin = tl.load(angles + ROTATED // 2, mask=mask, other=0.0)
        x1, x2 = turned(x1, x2, cos, sin, ROTATED, False)
    return x1, x2


@triton.jit
def load_rows(X, rows, in_rows, DV: tl.constexpr, BDV: tl.constexpr):
    """Rows [rows, BDV] of a matrix with DV columns; 0 outside."""
    v = tl.arange(0, BDV)
    if DV == BDV:
        return tl.load(X + rows[:, None] * DV + v[None, :], mask=in_rows[:, None], other=0.0)
    return tl.load(X + rows[:, None] * DV + v[None, :], mask=in_rows[:, None] & (v < DV)[None, :], other=0.0)
