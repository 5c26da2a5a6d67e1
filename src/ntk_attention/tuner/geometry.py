"""What an attention module is: its sizes, read off its own attributes and projections, and the kind of its model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

# Projections by the names that transformers uses for them. Of several, the first is the one that makes the queries.
QUERY = re.compile(r"q_b_proj|(to_)?w?q(_proj|_lin|_attn)?|query(_proj)?|linear_q|query_proj", re.IGNORECASE)
PART_OF_QUERY = re.compile(r"q_\w+_proj")
FUSED = re.compile(r"w?qkv(_proj)?|query_key_value|c_attn|in_proj|attn_qkv", re.IGNORECASE)
OUTPUT = re.compile(
    r"(to_)?w?o(_proj)?|out(_proj|_lin)?|c_proj|dense|proj|linear_out|to_out|projection_layer", re.IGNORECASE
)
OWN_HEADS = ("num_heads", "n_heads", "num_attention_heads", "n_head", "num_head", "heads")
OWN_HEAD_DIM = ("qk_head_dim", "head_dim", "attention_head_size", "head_size", "key_value_proj_dim")


class PartSize(NamedTuple):
    """Sizes of one part of the prefix of a feed-forward block."""

    name: str  # of the part in the block; "" where it is for the block as a whole
    in_features: int
    out_features: int


@dataclass(frozen=True)
class Geometry:
    """Sizes of one attention module."""

    num_heads: int  # H
    num_kv_heads: int  # H_kv
    head_dim: int  # d, of queries and keys
    value_dim: int  # d_v
    feed_forward: tuple[PartSize, ...] = ()  # of the parts of the feed-forward block beside; none without one

    @property
    def width(self) -> int:
        """D, of the hidden states that the feed-forward block gets; 0 without one."""
        return self.feed_forward[0].in_features if self.feed_forward else 0

    @property
    def part_numbers(self) -> int:
        """How many numbers rank 1 takes in all parts of the block."""
        return sum(part.in_features + part.out_features for part in self.feed_forward)


def geometry_of(module: nn.Module, name: str) -> Geometry:
    """Sizes of an attention module, by the names that transformers uses for them.

    Its own attributes count first, then its projections, then its config, which may be that of a larger model.

    Raises:
        ValueError: if a size has none of those names, or the projections contradict them.
    """
    config = getattr(module, "config", None)
    query = projection_size(module, QUERY, "out_features")
    own_heads, own_head_dim = number(module, OWN_HEADS), number(module, OWN_HEAD_DIM)
    fused = projection_size(module, FUSED, "out_features")
    if own_heads is own_head_dim is query is fused is None:
        raise ValueError(f"{named(module, name)} has neither heads nor projections of its own")
    num_heads = own_heads or number(config, OWN_HEADS)
    if num_heads is None:
        raise ValueError(f"{named(module, name)} has no number of heads, by any of the names {', '.join(OWN_HEADS)}")
    groups = getattr(module, "num_key_value_groups", None) or 1
    if groups != int(groups) or num_heads % groups:
        raise ValueError(f"{named(module, name)} has {num_heads} heads in groups of {groups}")
    groups = int(groups)
    head_dim = own_head_dim
    for size, heads in ((query, num_heads), (fused, num_heads + 2 * num_heads // groups)):
        if head_dim is None and size is not None and size % heads == 0:
            head_dim = size // heads
    if head_dim is None:
        head_dim = number(config, OWN_HEAD_DIM)
    if head_dim is None:
        width = number(config, ("hidden_size", "d_model", "dim", "n_embd"))
        if width is None:
            raise ValueError(f"{named(module, name)} has no head size, by any of the names {', '.join(OWN_HEAD_DIM)}")
        head_dim = width // num_heads
    children = [child for child, _ in module.named_children()]
    parts = [child for child in children if PART_OF_QUERY.fullmatch(child)]
    is_known = number(module, OWN_HEAD_DIM[:1]) is not None or any(QUERY.fullmatch(child) for child in children)
    if len(parts) > 1 and not is_known:
        raise ValueError(f"{named(module, name)} puts its queries together from {' and '.join(parts)}, of any sizes")
    # Some make a gate beside the queries.
    if query is not None and query not in (num_heads * head_dim, 2 * num_heads * head_dim):
        raise ValueError(
            f"{named(module, name)} makes queries of {query} numbers, which are not {num_heads} heads of {head_dim}"
        )
    return Geometry(num_heads, num_heads // groups, head_dim, number(module, ("v_head_dim",)) or head_dim)


def named(module: nn.Module, name: str) -> str:
    """A module in a message."""
    return f"{name} ({type(module).__name__})"


def number(holder: Any, names: Iterable[str]) -> int | None:
    """The first of these attributes that is a positive integer."""
    found = (getattr(holder, name, None) for name in names)
    return next((x for x in found if type(x) is int and x > 0), None)


def projection_size(module: nn.Module, names: re.Pattern[str], side: str) -> int | None:
    """`in_features` or `out_features` of the child with one of these names, if it is a linear layer."""
    for name, child in module.named_children():
        if names.fullmatch(name):
            size = linear_size(child, side)
            if size is not None:
                return size
    return None


def linear_size(layer: Any, side: str) -> int | None:
    """Of torch's and quantised linear layers, of GPT-2's convolutions of one, and of wrappers of any."""
    for wrapped in ("base_layer", "linear"):  # of PEFT's adapters, of layers of transformers that clip or choose
        layer = getattr(layer, wrapped, layer)
    size = getattr(layer, side, None)
    if size is None and hasattr(layer, "nf"):  # Conv1D of transformers, which keeps its weight as [in, out]
        size = layer.weight.shape[0 if side == "in_features" else 1]
    return size if type(size) is int else None


def width_of(module: nn.Module) -> int | None:
    """The width of the hidden states around an attention module: of a tower's own, whatever the config says."""
    size = projection_size(module, OUTPUT, "out_features")
    for names in (QUERY, FUSED):
        if size is None:
            size = projection_size(module, names, "in_features")
    return size or number(getattr(module, "config", None), ("hidden_size", "d_model", "dim", "n_embd"))


def encodes(model: nn.Module, modules: Iterable[nn.Module]) -> bool:
    """Whether attention modules are of a model that looks in both directions and writes nothing, as BERT and ViT.

    Args:
        model: of transformers, without adapters' wrappers.
        modules: those of its attention modules that have an adapter.
    """
    can_generate = getattr(model, "can_generate", None)
    if (can_generate is not None and can_generate()) or is_pair(model):
        return False
    return not any(is_causal(module) for module in modules)


def is_pair(model: nn.Module) -> bool:
    """Whether a model is an encoder and a decoder."""
    config = getattr(model, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False)) and not isinstance(config, Mapping)


def is_causal(module: nn.Module) -> bool:
    """Whether the queries of an attention module see no later token."""
    causal = getattr(module, "is_causal", None)
    if causal is None:  # text encoders of transformers that are written after BERT
        return bool(getattr(module.config, "is_decoder", not hasattr(module.config, "is_decoder")))
    return bool(causal)
