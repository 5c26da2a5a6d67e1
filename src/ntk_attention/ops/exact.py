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
