"""Which parts of a model have a prefix, which have none, and why: for the user, in one line."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from .lookup import lookup_of

ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
# Layers that mix tokens in other ways: by a state that runs along them, or by a convolution.
OTHER_MIXERS = re.compile(
    r"Mamba|SSM|Delta|LinearAtt|Lightning|RecurrentBlock|RgLru|Rwkv|Retention|ShortConv|LSTM|Hyena|Mixer"
)
# Parts of models whose name is that of such a layer.
OTHER_PARTS = re.compile(r"(Norm|MLP|Mlp|FeedForward|Embeddings?)$")
UNROUTED = "does not ask transformers for its attention function"
NO_SOFTMAX = "no softmax attention"


@dataclass
class Coverage:
    """What an adapter does and does not cover.

    Args:
        attention: class of every attention module that has a prefix, by name.
        blocks: names of those beside which the feed-forward block has one.
        without_block: class of every transformer layer with such an attention module whose feed-forward block should
            have one and was not found, by name.
        left_out: why other attention modules have none, by name: class and reason.
    """

    attention: dict[str, str] = field(default_factory=dict)
    blocks: list[str] = field(default_factory=list)
    without_block: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, tuple[str, str]] = field(default_factory=dict)

    def is_partial(self) -> bool:
        """Whether something that mixes tokens has no prefix."""
        return bool(self.left_out or self.without_block)

    def __str__(self) -> str:
        kinds = Counter(self.attention.values())
        text = f"NTK-Attention: prefixes in {len(self.attention)} attention modules ({listed(kinds)})"
        if self.blocks:
            text += f" and {len(self.blocks)} feed-forward blocks"
        if self.without_block:
            text += f"; feed-forward blocks not found in {listed(Counter(self.without_block.values()))}"
        reasons: dict[str, Counter[str]] = {}
        for kind, reason in self.left_out.values():
            reasons.setdefault(reason, Counter())[kind] += 1
        for reason, counts in reasons.items():
            text += f"; none in {listed(counts)}: {reason}"
        return text


def listed(counts: Mapping[str, int]) -> str:
    """ "2 LlamaAttention, 1 SiglipAttention" of counts by class."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))


def layers_without(
    model: nn.Module, attention: Iterable[str], blocks: Iterable[str], layers: Iterable[str] = ()
) -> dict[str, str]:
    """Class of the transformer layers around attention modules in which no block was found, by name.

    Args:
        model: that has them.
        attention: names of the modules.
        blocks: of those beside which one was found.
        layers: of the layers that have these blocks, which may number their own parts, as T5's do.
    """

    def layer_of(name: str) -> str:
        parts = name.split(".")
        places = [i for i, part in enumerate(parts) if part.isdigit()]
        return ".".join(parts[: places[-1] + 1]) if places else ""

    found = {*map(layer_of, blocks), *layers}
    inside = tuple(f"{name}." for name in found if name)
    others = {layer for name in attention if (layer := layer_of(name)) and not f"{layer}.".startswith(inside)}
    return {name: type(model.get_submodule(name)).__name__ for name in sorted(others)}


def other_attention(model: nn.Module, routed: Iterable[str], own: str) -> dict[str, tuple[str, str]]:
    """Modules that mix tokens and do not route, the outermost of each: class and reason, by name.

    Args:
        model: with adapters or without.
        routed: names of the modules that do.
        own: name of the children that adapters are.
    """
    inside = tuple(f"{name}." for name in routed)
    around = {name[:i] for name in inside for i, letter in enumerate(name) if letter == "."}
    found: dict[str, tuple[str, str]] = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        is_other = OTHER_MIXERS.search(kind) is not None and OTHER_PARTS.search(kind) is None
        if not name or name in around or name.startswith(inside) or own in name.split("."):
            continue
        if name.startswith(tuple(f"{outer}." for outer in found)):
            continue
        if (is_other or ATTENTION.search(kind)) and lookup_of(type(module)) is None and list(module.parameters()):
            found[name] = (kind, NO_SOFTMAX if is_other else UNROUTED)
    return found
