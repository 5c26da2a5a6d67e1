"""Statistics of rows: which rows count, their second moments, and roots of these. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def select_rows(x: Tensor, counts: Tensor, num_heads: int) -> Tensor:
    """The rows that count, by the head of the state that they belong to.

    Args:
        x: [B, H_query, L, ...], of every query.
        counts: bool [B, L], whether a token counts; the same for all heads.
        num_heads: H, heads of the state. H_query / H query heads, neighbours, share one.

    Returns:
        [H, N, ...], with N = H_query / H times the number of tokens that count.
    """
    per_head = x.transpose(0, 1)[:, counts]  # [H_query, tokens, ...]
    return per_head.reshape(num_heads, -1, *per_head.shape[2:])


class SecondMoments:
    """Means of x x^T over rows, or of its diagonal alone, kind of input by kind of input.

    Args:
        shape: [..., r, r], or [..., r] for the diagonal.
        dtype: of the sums. Products are made in the dtype of the rows.
        device: of the sums.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device):
        self.sum = torch.zeros(*shape, dtype=dtype, device=device)
        self.num_rows = 0
        self.kinds: list[Tensor] = []  # like the sum, the mean of every kind that has ended

    def add(self, rows: Tensor) -> None:
        """Count rows [..., N, r]."""
        is_diagonal = self.sum.dim() < rows.dim()
        self.sum += (rows.square().sum(dim=-2) if is_diagonal else rows.mT @ rows).to(self.sum)
        self.num_rows += rows.shape[-2]

    def end_kind(self) -> None:
        """Close a kind of input. One of which no row came does not count."""
        if self.num_rows:
            self.kinds.append(self.sum / self.num_rows)
            self.sum, self.num_rows = torch.zeros_like(self.sum), 0

    def mean(self) -> Tensor:
        """The mean over the kinds that have ended, like the sum. All kinds weigh alike, however many rows they have."""
        return torch.stack(self.kinds).mean(dim=0)


def row_rms(x: Tensor) -> Tensor:
    """The root mean square of every row of x [N, D]: [N], in float32."""
    return x.float().square().mean(dim=1).sqrt()


def inverse_root(moments: Tensor, floor: float) -> Tensor:
    """The symmetric C [..., r, r] with C moments C = 1.

    Args:
        moments: [..., r, r], symmetric and not negative.
        floor: smaller eigenvalues, relative to the largest one, count as this large.
    """
    eigenvalues, eigenvectors = torch.linalg.eigh(moments)
    least = floor * eigenvalues[..., -1:].clamp_min(torch.finfo(moments.dtype).tiny)
    return eigenvectors * eigenvalues.clamp_min(least).rsqrt()[..., None, :] @ eigenvectors.mT


def whitening(moments: Tensor, floor: float) -> Tensor:
    """C [H, r, r] with C^T moments C = 1, for features of which the last one is constant.

    The others are first centred: their regression on the constant one is taken away. The floor is that of
    `inverse_root`, of their covariance. The constant feature stays itself, in units of its rms.
    """
    constant = moments[:, -1:, -1:]
    mean = moments[:, -1:, :-1] / constant  # [H, 1, r - 1]
    covariance = moments[:, :-1, :-1] - mean.mT * mean * constant
    root = inverse_root(covariance, floor)
    C = torch.zeros_like(moments)
    C[:, :-1, :-1] = root
    C[:, -1:, :-1] = -mean @ root
    C[:, -1:, -1:] = constant.rsqrt()
    return C
