"""The prefix of a feed-forward block.

A feed-forward block is attention over its hidden neurons, without a normaliser: the rows c_j of its first matrices are
keys and those u_j of its last one are values (Geva et al. 2021, arXiv 2012.14913),

    out = sum_j f(x.c_j) u_j.

A prefix of any length is a kernel machine, as in attention, here without a normaliser and so without k. Inside of a
block it moves keys and values of the neurons that are there: each linear layer y = W x becomes y + (x^T Z)^T with
Z [in, out] = Z_A Z_B of a low rank. In the last layer that is a prefix whose features are the block's own hidden
activations. Beside a block, where it has no linear layers of its own (experts), Z goes from its input to its output.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .coordinates import Coordinated
from .distributed import ON_ALL, own_slice, sum_of_gradients, sum_of_parts
from .geometry import PartSize, linear_size, width_of

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
class Part:
    """Where one part of a prefix adds: the module that gets its input [..., in], and the one to whose output [..., out]
    it adds; of a linear layer both are that."""

    first: nn.Module
    last: nn.Module
    size: PartSize
    layer: str = ""  # the name of the linear layer in the model; none where the part is that of a whole block
    sees_hidden: bool = False  # whether its input is hidden activations of the block, not that of the block


@dataclass(frozen=True)
class FeedForward:
    """One block: its first and last module, the transformer layer that has both, and the parts of its prefix."""

    first: nn.Module
    last: nn.Module
    layer: nn.Module
    names: tuple[str, str]  # of the first and the last module
    width: int  # D
    parts: tuple[Part, ...]

    @property
    def sizes(self) -> tuple[PartSize, ...]:
        """Of the parts."""
        return tuple(part.size for part in self.parts)


Placing = Literal["inside", "beside"]


def feed_forwards(model: nn.Module, attention: Iterable[str], placing: Placing = "inside") -> dict[str, FeedForward]:
    """The feed-forward blocks beside attention modules, by the name of the first such module of each layer.

    Layers whose block is not found in PLACES have none here.

    Args:
        model: of transformers.
        attention: names of attention modules.
        placing: as `feed_forward` of the config says.
    """
    found: dict[str, FeedForward] = {}
    taken: set[nn.Module] = set()
    for name in attention:
        block = feed_forward_of(model, name, placing)
        if block is not None and block.first not in taken:
            found[name] = block
            taken.add(block.first)
    return found


def feed_forward_of(model: nn.Module, attention: str, placing: Placing = "inside") -> FeedForward | None:
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
                around = model.get_submodule(".".join(layer))
                start = names[0] if first is last else ".".join(layer)
                inside = parts_inside(first, last, place, width, start) if placing == "inside" else ()
                whole = (Part(first, last, PartSize("", width, width)),)
                return FeedForward(first, last, around, (names[0], names[1]), width, inside or whole)
    return None


def parts_inside(first: nn.Module, last: nn.Module, names: tuple[str, str], width: int, start: str) -> tuple[Part, ...]:
    """The linear layers of a block that is made of them alone; none of another one, such as experts with a router.

    All but one, the last, see the block's input [..., D]; that one sees the hidden activations [..., F], which the
    others make, one by one or two at once.

    Args:
        first, last: the modules of the block, which may be one.
        names: of both, from the transformer layer; where both are one, the names of parts begin after these.
        width: D.
        start: what comes before the name of a part in the model.
    """
    roots = [("", first)] if first is last else list(zip(names, (first, last), strict=True))
    layers: dict[str, nn.Module] = {}
    for root, module in roots:
        for name, child in module.named_modules():
            place = ".".join(filter(None, (root, name)))
            if linear_size(child, "in_features") and not f"{place}.".startswith(tuple(f"{x}." for x in layers)):
                layers[place] = child
    inside = {weight for layer in layers.values() for weight in layer.parameters()}
    others = [x for module in (first, last) for x in module.parameters() if x not in inside and x.dim() > 1]
    sizes = {name: (linear_size(x, "in_features"), linear_size(x, "out_features")) for name, x in layers.items()}
    ends = [name for name, (_, size) in sizes.items() if size == width]
    if others or len(layers) < 2 or not ends:
        return ()
    end = ends[-1]
    hidden = sizes[end][0] or 0
    if any(size not in ((width, hidden), (width, 2 * hidden)) for name, size in sizes.items() if name != end):
        return ()
    own = {name: PartSize(part_name(name), *cast("tuple[int, int]", size)) for name, size in sizes.items()}
    return tuple(Part(x, x, own[name], f"{start}.{name}", name == end) for name, x in layers.items())


def part_name(layer: str) -> str:
    """The name of a linear layer's part, which is no name of a layer: methods beside ours look for layers by theirs."""
    return f"{layer.replace('.', '_')}_part"


def parts_of_sizes(sizes: Sequence[PartSize], rank: int) -> nn.Module | None:
    """New parts of one rank: a `FeedForwardPrefix` for a block as a whole, or a ModuleDict of such by name."""
    parts = {size.name: FeedForwardPrefix(size.in_features, size.out_features, rank) for size in sizes}
    return parts.get("") or (nn.ModuleDict(parts) if parts else None)


def parts_by_name(module: nn.Module) -> dict[str, FeedForwardPrefix]:
    """The parts in what `parts_of_sizes` made; "" is that of a block as a whole."""
    if isinstance(module, FeedForwardPrefix):
        return {"": module}
    return cast("dict[str, FeedForwardPrefix]", dict(module.named_children()))


def sizes_of(block: nn.Module) -> set[int]:
    """All sizes of the weights in a block, quantised or not."""
    sizes = {size for weight in block.parameters() for size in weight.shape}
    for module in block.modules():
        sizes |= {size for side in ("in_features", "out_features") if (size := linear_size(module, side))}
    return sizes


class FeedForwardPrefix(Coordinated):
    """Z_A [in, rank] and Z_B [rank, out] of one part of a block; see `Coordinated` for how they train."""

    leading_name, scaled_name, placements = "Z_A", "Z_B", ON_ALL

    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.Z_A = nn.Parameter(torch.empty(in_features, rank))
        self.Z_B = nn.Parameter(torch.empty(rank, out_features))

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
        """out + x^T Z for every x: [..., in] and [..., out], in the dtype of out.

        In a tensor-parallel model either may be this process's slice.
        """
        if self.mesh is not None:
            Z_A, Z_B = self.plain_leading().to(x.dtype), self.scaled_in(x.dtype)
            return out + (self.unit * on_slices(x, Z_A, Z_B, out.shape[-1], self.mesh)).to(out.dtype)
        Z_A, Z_B = self.kept(x.dtype, lambda: (self.plain_leading().to(x.dtype), self.scaled_in(x.dtype)))
        return added(x, Z_A, Z_B, self.unit, out)

    def scaled_in(self, dtype: torch.dtype) -> Tensor:
        """Z_B as it trains, in units of its own."""
        return self.part("Z_B").to(dtype)

    @torch.no_grad()
    def become_sum(self, parts: Sequence[tuple[FeedForwardPrefix, float]]) -> None:
        """Z = sum_i w_i Z_i; the rank must be at least that of all together."""
        self.set_coordinates(None, 1.0)
        Z_A, Z_B, start = self.part("Z_A").zero_(), self.part("Z_B").zero_(), 0
        for part, weight in parts:
            Z_A[:, start : start + part.rank] = part.plain_leading()
            Z_B[start : start + part.rank] = weight * part.plain_scaled()
            start += part.rank


def added(x: Tensor, Z_A: Tensor, Z_B: Tensor, unit: float, out: Tensor) -> Tensor:
    """out + unit x Z_A Z_B, in one launch after x Z_A where the dtypes allow it."""
    hidden = x.reshape(-1, len(Z_A)) @ Z_A
    flat = out.reshape(-1, Z_B.shape[1])
    if hidden.dtype == out.dtype == Z_B.dtype:
        return torch.addmm(flat, hidden, Z_B, alpha=unit).view(out.shape)
    return (flat + (unit * (hidden @ Z_B)).to(out.dtype)).view(out.shape)


def on_slices(x: Tensor, Z_A: Tensor, Z_B: Tensor, out_features: int, mesh: DeviceMesh) -> Tensor:
    """x Z_A Z_B [..., out_features], where the input or the output of a linear layer may be cut over the processes of
    a mesh; Z_A [..., in, rank] and Z_B [..., rank, out] are whole on each."""
    cuts_input, cuts_output = x.shape[-1] < Z_A.shape[-2], out_features < Z_B.shape[-1]
    hidden = x @ (own_slice(Z_A, -2, mesh) if cuts_input else Z_A)
    if cuts_input:
        hidden = sum_of_parts(hidden, mesh)
    if cuts_output:
        hidden, Z_B = sum_of_gradients(hidden, mesh), own_slice(Z_B, -1, mesh)
    return hidden @ Z_B


@dataclass(frozen=True)
class FeedForwardRows:
    """One part per row of a batch: Z_A [A, in, rank], Z_B [A, rank, out], and the place of each row's, or -1."""

    Z_A: Tensor
    Z_B: Tensor
    index: Tensor  # int32 [B]
    mesh: DeviceMesh | None = None  # of a tensor-parallel model

    @classmethod
    def stack(cls, parts: Sequence[FeedForwardPrefix | None], index: Tensor) -> FeedForwardRows:
        """Copies in one stack; lower ranks are filled up with zeros, and None has no effect."""
        own = [part for part in parts if part is not None]
        rank = max(part.rank for part in own)
        Z_A, Z_B = (own[0].part(name) for name in ("Z_A", "Z_B"))
        A, B = Z_A.new_zeros(len(parts), len(Z_A), rank), Z_B.new_zeros(len(parts), rank, Z_B.shape[1])
        rows = cls(A, B, index, own[0].mesh)
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
        """out + x^T Z of each row, for x [B, L, in]; either may have one dimension for rows and
        tokens, as in some families."""
        Z_A, Z_B = (Z.index_select(0, self.index.clamp_min(0)).to(x.dtype) for Z in (self.Z_A, self.Z_B))
        Z_B = Z_B * (self.index >= 0)[:, None, None]
        x = x.reshape(len(self.index), -1, x.shape[-1])
        added = x @ Z_A @ Z_B if self.mesh is None else on_slices(x, Z_A, Z_B, out.shape[-1], self.mesh)
        return out + added.reshape(out.shape).to(out.dtype)
