"""Prefixes whose tokens are all there: what a state stands for, and the model it is measured against."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .layer import NTKAttentionLayer


class LayerPrefix(NamedTuple):
    """The prefix of one attention layer, as its queries see it."""

    keys: Tensor  # [H_kv, m, d], after the position encoding
    values: Tensor  # [H_kv, m, d_v]
    log_weights: Tensor | None = None  # [H_kv, m], added to the logits of the tokens


def together(first: LayerPrefix, second: LayerPrefix | None) -> LayerPrefix:
    """Two sets of prefix tokens, without weights, as one."""
    if second is None:
        return first
    return LayerPrefix(torch.cat([first.keys, second.keys], dim=1), torch.cat([first.values, second.values], dim=1))


@contextmanager
def exact_prefix(
    layers: Mapping[str, NTKAttentionLayer], prefix: Mapping[str, LayerPrefix], *, resting: Iterable[str] = ()
) -> Iterator[None]:
    """Let layers attend to real prefix tokens, beside the states of their adapters.

    Queries see the whole prefix, whatever their position: positions of the text count from 0, those of the prefix lie
    before it.

    Args:
        layers: of an adapted model, by name.
        prefix: for some or all of them.
        resting: names of layers whose adapters rest meanwhile.

    Raises:
        ValueError: if the model is tensor-parallel.
    """
    if any(layer.mesh is not None for layer in layers.values()):
        raise ValueError("prefixes are converted on a model with all heads in one process: load it with tp_size=1")
    before = {name: bool(layer.disable_adapters) for name, layer in layers.items()}
    try:
        for name, tokens in prefix.items():
            layers[name].exact = tokens
        for name in resting:
            layers[name]._disable_adapters = True
        yield
    finally:
        for name, layer in layers.items():
            layer.exact = None
            layer._disable_adapters = before[name]


def exact_scores(query: Tensor, prefix: LayerPrefix, scale: float, softcap: float | None = None) -> Tensor:
    """Logits of the prefix tokens in float32 (float64): [B, H, L, m]."""
    groups = query.shape[1] // prefix.keys.shape[0]
    dtype = torch.promote_types(query.dtype, torch.float32)
    keys = prefix.keys.to(dtype).repeat_interleave(groups, dim=0)
    logits = scale * query.to(dtype) @ keys.transpose(-1, -2)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if prefix.log_weights is not None:
        logits = logits + prefix.log_weights.to(dtype).repeat_interleave(groups, dim=0)[:, None]
    return logits
