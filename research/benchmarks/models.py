"""The models of the benchmarks: Llamas with random weights, in bfloat16 and shaped like Llama 3.2 1B, or smaller."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.masking_utils import sdpa_mask

LLAMA_1B = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
SMOL = {  # SmolLM2-135M
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
}
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "vocab_size": 128,
    "max_position_embeddings": 8192,
}


# Options of an adapter of attention alone: the cost of the paper's method. By default feed-forward blocks get one too.
ATTENTION_ALONE: dict[str, Any] = {"task_type": "CAUSAL_LM", "rank": None, "feed_forward_rank": None}


def grouped_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling=None, **_):
    """scaled_dot_product_attention that is told of grouped heads and so reads each KV head once."""
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, is_causal=attention_mask is None and query.shape[2] > 1,
        scale=scaling, enable_gqa=True,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("grouped", grouped_attention)
AttentionMaskInterface.register("grouped", sdpa_mask)


def llama(device: str, tiny: bool, attention: str = "sdpa") -> PreTrainedModel:
    return shaped(TINY if tiny else LLAMA_1B, device, torch.bfloat16, attention)


def shaped(sizes: dict[str, Any], device: str, dtype: torch.dtype, attention: str = "sdpa") -> PreTrainedModel:
    """Made on the device."""
    config = LlamaConfig(**sizes, tie_word_embeddings=True, attn_implementation=attention)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def model_sizes(tiny: bool) -> dict[str, int]:
    return {name: value for name, value in (TINY if tiny else LLAMA_1B).items() if name != "max_position_embeddings"}
