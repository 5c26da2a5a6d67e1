"""The prefix of a feed-forward block.

A feed-forward block is attention over its hidden neurons, without a normaliser: the rows c_j of its first matrix are
keys and those u_j of its last one are values (Geva et al. 2021, arXiv 2012.14913),

    out = sum_j f(x.c_j) u_j.

A prefix of m more neurons adds as many terms. As in attention, any number of them is a kernel machine, phi(x)^T Z with
Z of fixed size; there is no normaliser here, and so no k. phi(x) = x, and Z [D, D] = Z_A Z_B has a low rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .coordinates import Coordinated
from .distributed import ON_ALL
from .geometry import linear_size, width_of

# Where a block begins and ends, seen from the transformer layer that has it, in the families of transformers.
PLACES = (
    ("mlp", "mlp"),
    ("feed_forward", "feed_forward"),
    ("intermediate.dense", "output.dense"),
    ("fc1", "fc2"),
    ("ffn", "ffn_output"),
    ("ffn", "ffn"),
    ("layer.1.DenseReluDense", "layer.1.DenseReluDense"),
    ("layer.2.DenseReluDense", "layer.2.DenseReluDense"),
)
LEVELS = 3  # from an attention module up to its layer, at most


@dataclass(frozen=True)
class FeedForward:
    """One block: the module that gets its input [..., D], the one whose output [..., D] is the block's, and the
    transformer layer that has both."""

    first: nn.Module
    last: nn.Module
    layer: nn.Module
    names: tuple[str, str]  # of both
    width: int  # D


def feed_forwards(model: nn.Module, attention: Iterable[str]) -> dict[str, FeedForward]:
    """The feed-forward blocks beside attention modules, by the name of the first such module of each layer.

    Layers whose block is not found in PLACES have none here.
    """
    found: dict[str, FeedForward] = {}
    taken: set[nn.Module] = set()
    for name in attention:
        block = feed_forward_of(model, name)
        if block is not None and block.first not in taken:
            found[name] = block
            taken.add(block.first)
    return found


def feed_forward_of(model: nn.Module, attention: str) -> FeedForward | None:
    """The block in the transformer layer of an attention module, by its name; None where it is not found in PLACES."""
    width = width_of(model.get_submodule(attention))
    parts = attention.split(".")
    for level in range(1, min(LEVELS, len(parts)) + 1):
        layer = parts[:-level]
        for place in PLACES:
            names = tuple(".".join([*layer, name]) for name in place)
            try:
                first, last = map(model.get_submodule, names)
            except AttributeError:
                continue
            if width and width in sizes_of(first) and width in sizes_of(last):
                return FeedForward(first, last, model.get_submodule(".".join(layer)), (names[0], names[1]), width)
    return None


def sizes_of(block: nn.Module) -> set[int]:
    """All sizes of the weights in a block, quantised or not."""
    sizes = {size for weight in block.parameters() for size in weight.shape}
    for module in block.modules():
        sizes |= {size for side in ("in_features", "out_features") if (size := linear_size(module, side))}
    return sizes


class FeedForwardPrefix(Coordinated):
    """Z_A [D, rank] and Z_B [rank, D] of one block; see `Coordinated` for how they train."""

    leading_name, scaled_name, placements = "Z_A", "Z_B", ON_ALL

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.Z_A = nn.Parameter(torch.empty(width, rank))
        self.Z_B = nn.Parameter(torch.empty(rank, width))

    @property
    def rank(self) -> int:
        """Of Z."""
        return self.Z_A.shape[1]

    @torch.no_grad()
    def reset_parameters(self, visible: bool = False, generator: torch.Generator | None = None) -> None:
        """Without any effect at the start, or at random with a visible one (for tests)."""
        Z_A, Z_B = self.part("Z_A"), self.part("Z_B")
        Z_A.copy_(torch.randn(Z_A.shape, generator=generator, device="cpu") * len(Z_A) ** -0.5)
        Z_B.normal_(0.0, 1.0) if visible else Z_B.zero_()

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """out + x^T Z for every x: [..., D], in the dtype of out."""
        Z_A, Z_B = self.kept(x.dtype, lambda: (self.plain_leading().to(x.dtype).mT, self.plain_scaled().to(x.dtype).mT))
        added = linear(linear(x, Z_A), Z_B)
        return out + (added if added.shape == out.shape else added.view(out.shape)).to(out.dtype)

    @torch.no_grad()
    def become_sum(self, parts: Sequence[tuple[FeedForwardPrefix, float]]) -> None:
        """Z = sum_i w_i Z_i; the rank must be at least that of all together."""
        self.set_coordinates(None, 1.0)
        Z_A, Z_B, start = self.part("Z_A").zero_(), self.part("Z_B").zero_(), 0
        for part, weight in parts:
            Z_A[:, start : start + part.rank] = part.plain_leading()
            Z_B[start : start + part.rank] = weight * part.plain_scaled()
            start += part.rank


@dataclass(frozen=True)
class FeedForwardRows:
    """One prefix per row of a batch: Z_A [A, D, rank], Z_B [A, rank, D], and the place of each row's, or -1."""

    Z_A: Tensor
    Z_B: Tensor
    index: Tensor  # int32 [B]

    @classmethod
    def stack(cls, parts: Sequence[FeedForwardPrefix | None], index: Tensor) -> FeedForwardRows:
        """Copies in one stack; lower ranks are filled up with zeros, and None has no effect."""
        own = [part for part in parts if part is not None]
        like, rank = own[0].part("Z_A"), max(part.rank for part in own)
        rows = cls(like.new_zeros(len(parts), len(like), rank), like.new_zeros(len(parts), rank, len(like)), index)
        for place, part in enumerate(parts):
            if part is not None:
                rows.put(place, part)
        return rows

    @torch.no_grad()
    def put(self, place: int, part: FeedForwardPrefix) -> None:
        """Copy a prefix into its place in the stack."""
        self.Z_A[place, :, : part.rank].copy_(part.plain_leading())
        self.Z_B[place, : part.rank].copy_(part.plain_scaled())

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        """out + x^T Z of each row, for x [B, L, D]; either may be [B L, D], as some families have them."""
        Z_A, Z_B = (Z.index_select(0, self.index.clamp_min(0)).to(x.dtype) for Z in (self.Z_A, self.Z_B))
        Z_B = Z_B * (self.index >= 0)[:, None, None]
        return out + (x.reshape(len(self.index), -1, x.shape[-1]) @ Z_A @ Z_B).reshape(out.shape).to(out.dtype)
