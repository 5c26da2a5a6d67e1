"""Prefixes whose tokens are all there: what a state stands for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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
