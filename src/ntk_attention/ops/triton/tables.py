"""The table of a `Rotation` in one launch: decoding makes one for every token."""

import torch
from torch import Tensor

from .launcher import Launcher, Options, ceil_div, padded
from .support import INTERPRETED, triton

if triton is not None:
    from triton import language as tl

    from .tiles import compiled

    @compiled
    def unscaled_kernel(
        Cos, Sin, Table, stride_cb, stride_cl, stride_cp, stride_sb, stride_sl, stride_sp, L, rows,
        P: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr,
    ):  # fmt: skip
        """Cosines and sines of all pairs side by side, both over the sum of their squares."""
        row = tl.program_id(0) * BM + tl.arange(0, BM)
        b, i = (row // L).to(tl.int64)[:, None], (row % L).to(tl.int64)[:, None]
        p = tl.arange(0, BP)[None, :]
        mask = (row < rows)[:, None] & (p < P)
        cos = tl.load(Cos + b * stride_cb + i * stride_cl + p * stride_cp, mask=mask, other=1.0).to(tl.float32)
        sin = tl.load(Sin + b * stride_sb + i * stride_sl + p * stride_sp, mask=mask, other=0.0).to(tl.float32)
        squares = tl.maximum(cos * cos + sin * sin, 1.2e-38)
        table = Table + row.to(tl.int64)[:, None] * (2 * P) + p
        tl.store(table, (cos / squares).to(Table.dtype.element_ty), mask=mask)
        tl.store(table + P, (sin / squares).to(Table.dtype.element_ty), mask=mask)

    UNSCALED = Launcher(unscaled_kernel)

ROWS = 16


def covers(cos: Tensor) -> bool:
    """Whether there is a kernel for these cosines."""
    is_there = triton is not None and (cos.is_cuda or INTERPRETED) and not torch.compiler.is_compiling()
    return is_there and cos.dtype in (torch.float32, torch.bfloat16, torch.float16) and cos.numel() > 0


def unscaled(cos: Tensor, sin: Tensor) -> Tensor:
    """[B or 1, L, 2 P] of cos and sin [B or 1, L, P] alike, in their dtype."""
    B, L, P = cos.shape
    table = cos.new_empty(B, L, 2 * P)
    UNSCALED(
        (ceil_div(B * L, ROWS), 1, 1),
        (),
        (cos, sin, table),
        (*cos.stride(), *sin.stride(), L, B * L),
        (P, ROWS, padded(P)),
        Options(4),
    )
    return table
