"""What calibration measures of the attention of one layer, and what it makes of that."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.reference import Block
from ..tuner.adapter import PrefixAdapter
from .moments import SecondMoments, select_rows, whitening

BISECTIONS = 60  # halve any bracket of logits to the rounding of float64


@dataclass(frozen=True)
class HeadUnits:
    """How the heads of one layer start and train."""

    share: float  # of the attention that the prefix holds at the start
    step: float  # of Z: an output moves by so much of its size
    log_k: float  # the unit of log k


class HeadRows(NamedTuple):
    """The rows of a batch that count, by head of the state: N of each."""

    phi: Tensor  # [H, N, r], without its scale
    scale: Tensor  # [H, N], the logarithm of the features' scale
    lse: Tensor  # [H, N], log-sum-exp of the frozen attention, in nats
    out: Tensor  # [H, N, d_v], its output


class HeadStatistics:
    """Moments of the queries and outputs of one layer, per head of the state.

    Two passes over the batches fill it: `observe_scale`, then `set_scale`, then `observe_moments` for every kind of
    input with an `end_of_kind` after each, the task's first.
    """

    def __init__(self, adapter: PrefixAdapter):
        self.adapter = adapter
        H, r, device = adapter.num_heads, adapter.num_features, adapter.log_k.device
        zeros = torch.zeros(H, dtype=torch.float64, device=device)
        self.num_rows = 0
        self.sum_lse, self.sum_square = zeros, zeros
        self.advantages: list[Tensor] = []  # [H, N], log(phi.1) - lse of every row
        self.moments = SecondMoments((H, r, r), torch.float64, device)  # of g
        self.wanted: Tensor | float = 0.0  # [H, d_v], sum of g_constant * share * output
        self.value = self.output_rms = zeros  # of the task
        self.log_scale = self.log_k = zeros  # set between the passes, the same for all features
        self.is_finite: Tensor | bool = True  # all that was observed

    def rows(self, frozen: Block, x: Tensor, counts: Tensor) -> HeadRows:
        """The rows that count of phi's input [B, H_query, L, d]; the arguments are those of an `Observer`.

        Raises:
            ValueError: if the queries have another size than those that the adapter was made for.
        """
        feature_map, features = self.adapter.feature_map, self.moments.sum.shape[-1]
        if feature_map.num_features(x.shape[-1]) != features:
            raise ValueError(
                f"a module has queries of size {x.shape[-1]}, of which {feature_map!r} does not make the "
                f"{features} features of its adapter: leave the module out with exclude_modules"
            )
        phi, scale = feature_map.scaled(x.float())
        parts = (phi, scale, frozen.lse.float(), frozen.out.float())
        return HeadRows(*(select_rows(x, counts, self.adapter.num_heads) for x in parts))

    def normaliser(self, phi: Tensor) -> Tensor:
        """phi.1 over the features that carry the normaliser: [H, N]."""
        features = self.adapter.normaliser_features
        return (phi if features is None else phi[..., features.to(phi.device)]).sum(dim=-1)

    def observe_scale(self, query: Tensor, frozen: Block, prefix: Block | None, x: Tensor, counts: Tensor) -> None:
        """First pass: the normaliser of the frozen attention, and that of the prefix against it."""
        rows = self.rows(frozen, x, counts)
        advantages = torch.log(self.normaliser(rows.phi)) + rows.scale - rows.lse
        self.is_finite = self.is_finite & torch.isfinite(advantages).all() & torch.isfinite(rows.out).all()
        self.num_rows += rows.lse.shape[1]
        self.sum_lse = self.sum_lse + rows.lse.double().sum(dim=1)
        self.advantages.append(advantages.cpu())

    def set_scale(self, share: float) -> None:
        """Find b, the mean log-sum-exp, and the log k with which the prefix holds the share."""
        b = self.log_scale = self.sum_lse / self.num_rows
        self.log_k = offset_for_share(torch.cat(self.advantages, dim=1).double(), share).to(b) - b
        self.advantages.clear()

    def observe_moments(self, query: Tensor, frozen: Block, prefix: Block | None, x: Tensor, counts: Tensor) -> None:
        """Second pass: moments of g = d out / d Z, and what the prefix's value has to be."""
        phi, scale, lse, out = self.rows(frozen, x, counts)
        weight = scale + self.log_scale[:, None].to(scale)
        prefix_lse = torch.log(self.normaliser(phi)) + self.log_k[:, None].to(weight) + weight
        lse_all = torch.logaddexp(lse, prefix_lse)
        g = phi * torch.exp(weight - lse_all)[..., None]
        share = torch.exp(prefix_lse - lse_all)
        self.moments.add(g)
        self.wanted = self.wanted + ((g[..., -1] * share)[..., None] * out).double().sum(dim=1)
        self.sum_square = self.sum_square + out.double().square().mean(dim=2).sum(dim=1)

    def end_of_kind(self) -> None:
        """Close a kind of input.

        The first one, of the task, also gives the prefix's value at the start [H, d_v], and the size of an output. Of
        all fixed values it is the one that changes outputs least, by least squares.
        """
        gram, num_rows = self.moments.sum, self.moments.num_rows
        self.is_finite = self.is_finite & torch.isfinite(gram).all()
        if num_rows and not self.moments.kinds:
            self.value = self.wanted / gram[:, -1, -1, None]
            self.output_rms = (self.sum_square / num_rows).sqrt()[:, None, None]
        self.moments.end_kind()

    @torch.no_grad()
    def set_coordinates_and_start(self, units: HeadUnits, floor: float, generator: torch.Generator) -> None:
        """Give the adapter its coordinates, and its start in them.

        Args:
            units: of the layer.
            floor: of the eigenvalues of the whitening.
            generator: on the CPU, of the directions in Z_A that the start does not need.
        """
        adapter, value, moments = self.adapter, self.value, self.moments.mean()
        adapter.part("log_scale").copy_(self.log_scale)
        size = self.output_rms.clamp_min(torch.finfo(torch.float32).tiny)  # of a head that is always silent
        adapter.set_coordinates(whitening(moments, floor) * size * units.step, units.log_k)
        Z = torch.zeros_like(moments[..., :1]).expand(-1, -1, value.shape[-1]).clone()
        Z[:, -1] = value
        if adapter.is_factored:  # the first direction holds the start, the others are free to train
            H, r, rank = adapter.Z_A.shape
            noise = adapter.part_of(torch.randn(H, r, rank, dtype=Z.dtype, generator=generator, device="cpu").to(Z))
            assert adapter.coordinates is not None
            C = adapter.coordinates.double()
            Z = C @ noise * r**-0.5
            Z[..., 0] = C[..., -1]  # as large as the others, so that steps of its value are as far as theirs
            Z_B = adapter.part("Z_B").zero_()
            Z_B[:, 0] = (value / C[:, -1, -1, None]).to(Z_B)
        adapter.set_plain(Z, self.log_k[:, None].expand_as(adapter.part("log_k")))


def offset_for_share(logits: Tensor, share: float) -> Tensor:
    """The offset [H] with which the mean of sigmoid(logits + offset) is the share, for logits [H, N]: by bisection."""
    middle = math.log(share / (1 - share))
    low, high = middle - logits.amax(dim=1), middle - logits.amin(dim=1)
    for _ in range(BISECTIONS):
        offset = (low + high) / 2
        is_low = torch.sigmoid(logits + offset[:, None]).mean(dim=1) < share
        low, high = torch.where(is_low, offset, low), torch.where(is_low, high, offset)
    return (low + high) / 2
