"""The attention functions that ours takes the place of: which of their keyword arguments we handle, which we refuse."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.utils import output_capturing

from .lookup import lookup_of
from .masks import FLASH, FLEX, IMPLEMENTATIONS

HANDLED = {
    "module", "query", "key", "value", "query_states", "key_states", "value_states", "attention_mask", "scaling",
    "dropout", "is_causal", "position_bias", "position_ids", "sliding_window", "softcap", "s_aux", "sinks",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "output_attentions", "cache", "read_index",
    "write_index", "max_seqlen_q", "max_seqlen_k",
    # What a function of transformers gives another one, and what does not change results
    "query_length", "softmax_scale", "use_top_left_mask", "target_dtype", "attn_implementation", "deterministic",
    "q", "k", "v", "kwargs",
}  # fmt: skip
BLOCK_TABLES = (
    "set max_blocks_per_request=0 in the ContinuousBatchingConfig of generate_batch, or load the model with "
    "attn_implementation='sdpa'"
)
SPARSE = "load the model with attn_implementation='sdpa', for which the module masks what its indexer leaves out"
HINTS = dict.fromkeys(("block_table", "k_cache", "v_cache", "cache_seqlens"), BLOCK_TABLES)
HINTS |= dict.fromkeys(("indices", "block_indices"), SPARSE)
UNKNOWN = "expected none that changes attention; leave the module out with exclude_modules"


@dataclass(frozen=True)
class OwnAttention:
    """What an attention module would call without us.

    Args:
        eager: its own function for "eager", as each modeling file of transformers has one.
        refused: for every implementation that we take the place of, the arguments that its function reads and we do
            not handle, with a way out of each.
    """

    eager: Callable[..., Any] | None
    refused: Mapping[str, Mapping[str, str]]


def own_attention(module: nn.Module) -> OwnAttention:
    """What a module that routes its attention calls for it, see `lookup`."""
    lookup = lookup_of(type(module))
    assert lookup is not None
    return OwnAttention(lookup.eager, {name: refused_arguments(name, lookup.eager) for name in IMPLEMENTATIONS})


def refused_arguments(implementation: str, eager: Callable[..., Any] | None) -> dict[str, str]:
    """Arguments that the function of an implementation would read and that we do not handle, with a way out of each."""
    read: set[str] = set()
    if implementation in FLASH or implementation.startswith("paged|flash"):
        read = {*parameters(flash_attention_forward), *parameters(_flash_attention_forward), *HINTS}
    elif implementation == FLEX:
        read = {*parameters(flex_attention_forward), *HINTS}
    elif implementation in ("sdpa", "paged|sdpa"):
        read = parameters(sdpa_attention_forward)
    elif eager is not None:
        read = parameters(eager)
    return {name: HINTS.get(name, UNKNOWN) for name in read - HANDLED}


def parameters(function: Callable[..., Any]) -> set[str]:
    """Their names."""
    return set(inspect.signature(function).parameters)


def wants_weights(module: nn.Module, arguments: Mapping[str, Any]) -> bool:
    """Whether the call of the model asked for attention weights.

    Models that collect outputs with hooks say which; others take what attention gives.
    """
    if arguments.get("output_attentions") or getattr(module.config, "output_attentions", False):
        return True
    collected = output_capturing._active_collector.get()
    return collected is None or any(key.endswith("attentions") for key in collected)
