"""Features that know a prefix: directions at the keys that the queries of calibration text look at most."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from ..ops.exact import LayerPrefix
from ..ops.features import Anchored
from ..ops.reference import Block, exact_scores
from ..tuner.calls import exact_prefix
from ..tuner.observation import adapted_layers, observe
from ..tuner.routing import query_scale
from .fitting import logit_scale


def anchor(
    model: Any,
    prefix: Mapping[str, LayerPrefix],
    batches: Iterable[Mapping[str, Any]],
    *,
    adapter_name: str = "default",
) -> None:
    """Set the directions of an adapter's `anchored` features; `fit` must follow.

    Every KV head gives as many keys as every other.

    Args:
        model, prefix, batches: as in `fit`.
        adapter_name: which adapter.

    Raises:
        ValueError: if the adapter has another feature map, or sees queries without the positions that keys have.
    """
    layers = adapted_layers(model, adapter_name)
    for name in prefix:
        phi = layers[name][adapter_name].feature_map
        if not isinstance(phi, Anchored):
            raise ValueError(f"{name} has the feature map {phi.name!r}, expected 'anchored'")
        if layers[name][adapter_name].positions != "rotary":
            raise ValueError(
                f"{name} has positions='free', the keys of a prefix have positions: expected positions='rotary', as "
                "NTKAttentionConfig.for_given_prefix() has it"
            )
    received = attention_received(model, prefix, batches)
    for name, tokens in prefix.items():
        layer = layers[name]
        module = layer.get_base_layer()
        scale, factor = query_scale(module, getattr(module, "scaling", None), layer.geometry.head_dim)
        projection = cast(Tensor, layer[adapter_name].feature_map.projection)
        ranks = received[name].argsort(dim=1, descending=True)
        H, m = ranks.shape
        first = ranks[:, : min(m, -(-len(projection) // H))]  # the most attended of every head
        keys = tokens.keys.gather(1, first[..., None].expand(-1, -1, tokens.keys.shape[-1]))
        chosen = keys.transpose(0, 1).flatten(0, 1)[: len(projection)]
        with torch.no_grad():  # a short prefix leaves some directions as they are
            projection[: len(chosen)] = (chosen.float() * scale / factor).to(projection)


def attention_received(
    model: Any, prefix: Mapping[str, LayerPrefix], batches: Iterable[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """How much attention the queries of a text give each prefix token, by layer: [H_kv, m]."""
    layers = adapted_layers(model)
    attended = {name: Attended(tokens, logit_scale(layers[name])) for name, tokens in prefix.items()}
    with exact_prefix(layers, prefix, resting=layers):
        observe(model, {name: layers[name] for name in prefix}, batches, {n: a.observe for n, a in attended.items()})
    return {name: a.mass for name, a in attended.items()}


class Attended:
    """The sums of one layer."""

    def __init__(self, prefix: LayerPrefix, scale: float):
        self.prefix, self.scale = prefix, scale
        self.mass = torch.zeros(prefix.keys.shape[:2], dtype=torch.float64, device=prefix.keys.device)

    def observe(self, query: Tensor, context: Block, prefix: Block | None, x: Tensor, counts: Tensor) -> None:
        if prefix is None:
            raise ValueError("the layer sees no prefix")
        for one, lse, other, counted in zip(query, context.lse, prefix.lse, counts, strict=True):
            scores = exact_scores(one[None], self.prefix, self.scale)[0]  # [H, L, m]
            share = torch.exp(scores - torch.logaddexp(lse.float(), other)[..., None])[:, counted]
            self.mass += share.sum(1).unflatten(0, (len(self.mass), -1)).sum(1)
