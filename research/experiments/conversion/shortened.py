"""A KV cache shortened by least squares: fewer tokens, each with a weight and a value of its own.

Attention Matching (arXiv 2602.16284): keep the keys that calibration queries look at most, then fit weights and values
to the output of attention. The features of such a cache are exp(scale q.c_j) at its own keys, so the fit is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ntk_attention.convert.anchors import attention_received
from ntk_attention.convert.fitting import HeadFit, logit_scale
from ntk_attention.ops.exact import LayerPrefix
from ntk_attention.ops.reference import exact_scores
from ntk_attention.tuner.calls import exact_prefix
from ntk_attention.tuner.observation import adapted_layers, observe


class CacheFit(HeadFit):
    """The fit of weights and values for given keys [H_kv, n, d]."""

    def __init__(self, keys: Tensor, d_v: int, scale: float, num_batches: int):
        self.keys, self.scale = keys, scale
        H, n, _ = keys.shape
        super().__init__(H, n, d_v, torch.ones(n, dtype=torch.bool), None, num_batches, keys.device)

    def features(self, query: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = exact_scores(query.double(), LayerPrefix(self.keys.double(), self.keys), self.scale)
        peak = logits.amax(dim=-1)
        return torch.exp(logits - peak[..., None]), peak

    def prefix(self, dtype: torch.dtype) -> LayerPrefix:
        values = self.Z / self.k[..., None]
        return LayerPrefix(self.keys, values.to(dtype), torch.log(self.k).float())


def shorten(
    model: Any, prefix: Mapping[str, LayerPrefix], batches: Sequence[Mapping[str, Any]], tokens: int
) -> dict[str, LayerPrefix]:
    """A cache of so many tokens in every layer."""
    layers = adapted_layers(model)
    scales = {name: logit_scale(layers[name]) for name in prefix}
    attended = attention_received(model, prefix, batches)
    with exact_prefix(layers, prefix, resting=layers):
        fits = {}
        for name, whole in prefix.items():
            top = attended[name].topk(min(tokens, whole.keys.shape[1]), dim=1).indices.sort(dim=1).values
            keys = whole.keys.gather(1, top[..., None].expand(-1, -1, whole.keys.shape[-1]))
            fits[name] = CacheFit(keys, whole.values.shape[-1], scales[name], len(batches))
        for observer, solve in (("observe_normaliser", "solve_normaliser"), ("observe_values", "solve_values")):
            for batch in batches:
                observe(model, layers, [batch], {name: getattr(f, observer) for name, f in fits.items()})
            for f in fits.values():
                getattr(f, solve)()
    return {name: f.prefix(prefix[name].values.dtype) for name, f in fits.items()}
