"""Equal numbers of trainable parameters: how many ours has, and the rank or prefix length that comes closest."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from ntk_attention import feature_map
from ntk_attention.tuner.geometry import Geometry, geometry_of
from ntk_attention.tuner.routing import routes

TOLERANCE = 0.05
QUERY_VALUE = re.compile(r"\.(q_proj|v_proj|query|value)$")
ATTENTION = re.compile(r"\.([qkvo]_proj|out_proj|query|key|value|attention\.output\.dense)$")
FEED_FORWARD = re.compile(
    r"(\.(gate_proj|up_proj|down_proj|fc1|fc2)|\.intermediate\.dense|(?<!attention)\.output\.dense)$"
)
LAST = re.compile(r"(\.(down_proj|fc2)|(?<!attention)\.output\.dense)$")  # of a feed-forward block
IN_A_LAYER = re.compile(r"\.\d+\.")


def geometries(model: nn.Module) -> list[Geometry]:
    return [geometry_of(module, name) for name, module in model.named_modules() if name and routes(module)]


def ours(model: nn.Module, *, heads: str = "query", size: float = 1.0) -> int:
    """Trainable parameters of NTK-Attention with elu features and the constant one, with `size` times a full Z."""
    phi, total = feature_map("elu", constant=True), 0
    for g in geometries(model):
        r = phi.num_features(g.head_dim)
        total += round(size * r * g.value_dim + r) * (g.num_heads if heads == "query" else g.num_kv_heads)
    return total


def divided(geometry: Geometry, size: float, part: float) -> tuple[int | None, int | None]:
    """Ranks of Z and of the parts of a feed-forward block that share `size` times the parameters of a full Z; None:
    full, and none.

    The ranks of blocks come in large steps, which the rank of Z makes up for.

    Args:
        part: of the parameters, in attention; what does not fit into a full Z goes to the block.
    """
    per_rank = geometry.num_heads * 2 * geometry.head_dim
    full = geometry.num_heads * geometry.head_dim**2
    if part == 1 and size <= 1:
        return (None if size == 1 else max(1, round(size * full / per_rank))), None
    in_block = max(1, round((size * full - min(full, part * size * full)) / geometry.part_numbers))
    rest = size * full - in_block * geometry.part_numbers
    return (None if rest >= full * 0.9 else max(1, round(rest / per_rank))), in_block


def prefix_length(model: nn.Module, budget: int) -> int:
    """m, with 2 m d parameters per KV head."""
    per_token = sum(g.num_kv_heads * (g.head_dim + g.value_dim) for g in geometries(model))
    return max(1, round(budget / per_token))


@dataclass(frozen=True)
class Ranks:
    """Linear modules, by full name, and the rank of each."""

    by_module: dict[str, int]

    @property
    def base(self) -> int:
        return min(self.by_module.values())

    @property
    def higher(self) -> dict[str, int]:
        return {name: rank for name, rank in self.by_module.items() if rank > self.base}


def linear_modules(model: nn.Module, pattern: re.Pattern[str] | None = None) -> dict[str, nn.Linear]:
    """Of the transformer's layers: those whose name fits, or all."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and IN_A_LAYER.search(f".{name}.") and (not pattern or pattern.search(name))
    }


def lora_ranks(
    model: nn.Module, budget: int, pattern: re.Pattern[str] | None = None, magnitudes: bool = False
) -> Ranks:
    """Ranks with as many parameters as the budget: r in all modules, r + 1 in as many as it leaves room for.

    Whole layers get r + 1 first, spread over the depth, then single modules.

    Args:
        pattern: of the modules' names; all linear modules of the layers by default.
        magnitudes: count DoRA's, one per output.

    Raises:
        ValueError: if no choice comes within TOLERANCE.
    """
    modules = linear_modules(model, pattern)
    if not modules:
        raise ValueError(f"the model has no linear module in its layers that fits {pattern and pattern.pattern!r}")
    layers: dict[str, list[str]] = {}
    for name in modules:
        layers.setdefault(IN_A_LAYER.search(f".{name}.").group(), []).append(name)  # type: ignore[union-attr]

    def cost(names: Iterable[str]) -> int:
        return sum(modules[name].in_features + modules[name].out_features for name in names)

    rest = budget - (sum(m.out_features for m in modules.values()) if magnitudes else 0)
    r = max(0, rest // cost(modules))
    rest -= r * cost(modules)
    ranks = dict.fromkeys(modules, r)
    num_higher = min(len(layers), rest * len(layers) // cost(modules))
    higher = [int((i + 0.5) * len(layers) / num_higher) for i in range(num_higher)]  # spread evenly over the depth
    whole = [name for i in higher for name in list(layers.values())[i]]
    rest -= cost(whole)
    ranks |= dict.fromkeys(whole, r + 1)
    for name in modules:
        if ranks[name] == r and 2 * rest > cost([name]):  # single modules while they bring the sum closer
            ranks[name] = r + 1
            rest -= cost([name])
    ranks = {name: rank for name, rank in ranks.items() if rank}
    found = sum(ranks[n] * cost([n]) + (modules[n].out_features if magnitudes else 0) for n in ranks)
    if abs(found - budget) > TOLERANCE * budget:
        raise ValueError(f"no ranks give {budget:,} parameters within {TOLERANCE:.0%}: the closest give {found:,}")
    return Ranks(ranks)


def oft_block_size(model: nn.Module, budget: int) -> int:
    """The b that comes closest, of rotations before all linear modules, with b (b - 1) / 2 parameters for b inputs.

    It divides the inputs of every module, so the sizes that there are lie far apart.
    """
    inputs = [module.in_features for module in linear_modules(model).values()]
    sizes = [b for b in range(2, min(inputs) + 1) if all(n % b == 0 for n in inputs)]
    return min(sizes, key=lambda b: abs(sum(inputs) * (b - 1) / 2 - budget))
