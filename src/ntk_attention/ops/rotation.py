"""Rotary positions, undone: what lets a prefix that has no positions see a query without its own.

A rotary model turns each pair (x1, x2) of the numbers of a query by an angle that grows with its position (Su et al.
2021, arXiv 2104.09864),

    y1 = x1 cos - x2 sin,   y2 = x2 cos + x1 sin.

Attention needs that, since keys are turned as well. A trained prefix stands at no position: phi acts on x.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .triton import tables


class Rotation(NamedTuple):
    """How to undo the rotary positions of queries [B, H, L, d].

    The numbers `start` ... `start + 2 P - 1` of a head are rotated, in P pairs: the numbers i and i + width / 2 of
    every run of `width`. Most models have one run of all (width = 2 P), GPT-J pairs of neighbours (width = 2).
    """

    table: Tensor  # [B or 1, L, 2 P], floating point, contiguous: P cosines, P sines, both over the rotation's scale
    width: int
    start: int = 0

    @classmethod
    def of(cls, cos: Tensor, sin: Tensor, *, width: int | None = None, start: int = 0) -> Rotation:
        """The rotation of these angles.

        Args:
            cos, sin: [B or 1, L, P], of every pair; in models that scale their rotation (YaRN) times that scale, which
                is undone as well.
            width: of the runs that pairs lie in; 2 P by default.
            start: the first rotated number.

        Raises:
            ValueError: if shapes do not fit each other, or the pairs do not fill whole runs.
        """
        if cos.dim() != 3 or cos.shape != sin.shape:
            raise ValueError(f"cos and sin must be [B or 1, L, P] alike, got {list(cos.shape)} and {list(sin.shape)}")
        P = cos.shape[-1]
        width = 2 * P if width is None else width
        if width < 2 or width % 2 or (2 * P) % width or start < 0:
            raise ValueError(
                f"the numbers of {P} pairs come in runs of an even width from a place that is not negative, got a "
                f"width of {width} and the place {start}"
            )
        if tables.covers(cos) and cos.dtype == sin.dtype:
            return cls(tables.unscaled(cos, sin), width, start)
        # Over the squares of the scale times the scale: 1 / scale. Rounded tables have squares that are not quite 1.
        exact = torch.stack([cos, sin], dim=-2).to(torch.promote_types(cos.dtype, torch.float32))
        squares = exact.square().sum(dim=-2, keepdim=True).clamp_min(torch.finfo(exact.dtype).tiny)
        return cls((exact / squares).flatten(-2).to(cos.dtype), width, start)

    @property
    def num_pairs(self) -> int:
        """P."""
        return self.table.shape[-1] // 2

    def rows(self, start: int, length: int) -> Rotation:
        """Of the queries from `start` on, so many."""
        return self._replace(table=self.table[:, start : start + length].contiguous())


def unrotated(query: Tensor, rotation: Rotation) -> Tensor:
    """x of y = query [B, H, L, d], in float32 (float64); differentiable with respect to the query."""
    return turned(query, rotation, forward=False)


def turned(x: Tensor, rotation: Rotation, forward: bool) -> Tensor:
    """x [B, H, L, d] with every pair turned back by its angle, or forward; both divide by the scale of the rotation.

    Forward is the transposed map of backward: what the gradient of the query needs.
    """
    table, width, start = rotation
    P = rotation.num_pairs
    dtype = torch.promote_types(torch.promote_types(x.dtype, table.dtype), torch.float32)
    cos, sin = table[:, None].to(dtype).unflatten(-1, (2, -1, width // 2)).unbind(-3)  # [B or 1, 1, L, runs, width / 2]
    sin = -sin if forward else sin
    before, inside, after = x.to(dtype).split([start, 2 * P, x.shape[-1] - start - 2 * P], dim=-1)
    first, second = inside.unflatten(-1, (-1, 2, width // 2)).unbind(-2)
    pairs = torch.stack([cos * first + sin * second, cos * second - sin * first], dim=-2)
    return torch.cat([before, pairs.flatten(-3), after], dim=-1)
