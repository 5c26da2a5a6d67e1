"""Attention with a prefix on a CPU, where vLLM's kernel gives no log-sum-exp: it is computed beside, from the keys."""

from __future__ import annotations

from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as vllm_ops
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from ..ops.reference import scores
from .attention import PrefixAttention
from .step import Request, Step

MAX_QUERIES = 256  # whose scores are in memory at once


class CPUPrefixAttention(PrefixAttention, CPUAttentionBackendImpl):
    """vLLM's attention on a CPU, with a prefix."""

    def is_needed(self) -> bool:
        """Whether a token of this pass may have a prefix."""
        return bool(self.states.filled) and not self.states.slots.punica.no_lora

    def attend(self, step: Step, *given: Any, **scales: Tensor | None) -> Tensor:
        """Plain attention into the output; the log-sum-exp of its logits [H, T] in float32, of tokens with a prefix."""
        CPUAttentionBackendImpl.forward(self, *given, **scales)
        layer, query, _, _, kv_cache, metadata, *_ = given
        if metadata.causal is not True:
            raise NotImplementedError("vLLM asks for attention that is not causal, in which no prefix can stand")
        lse = query.new_zeros(query.shape[1], metadata.num_actual_tokens, dtype=torch.float32)
        for request in step.requests():
            if request.slot in self.states.filled:
                keys = self.keys(layer, kv_cache, metadata.block_table, request)
                for start in range(request.start, request.end, MAX_QUERIES):
                    part = slice(start, min(start + MAX_QUERIES, request.end))
                    lse[:, part] = self.log_sum_exp(query[part], keys, request.length - request.end + start)
        return lse

    def log_sum_exp(self, query: Tensor, keys: Tensor, first: int) -> Tensor:
        """Of the logits of queries [L, H, d], of which the first one stands at that place, over keys [H_kv, S, d]."""
        behind = torch.arange(first, first + len(query))[:, None] - torch.arange(keys.shape[1])
        visible = behind >= 0
        if self.sliding_window > 0:
            visible &= behind < self.sliding_window
        logits = scores(
            query.transpose(0, 1)[None], keys[None], self.scale, mask=visible, softcap=self.logits_soft_cap or None
        )
        return logits.logsumexp(dim=-1)[0]

    def keys(self, layer: Any, kv_cache: Tensor, block_table: Tensor, request: Request) -> Tensor:
        """Those of a text, [H_kv, S, d], taken out of vLLM's blocks."""
        _, num_heads, block_size, _ = kv_cache.shape
        blocks = block_table[request.place, : -(-request.length // block_size)]
        key_cache = kv_cache.view(len(kv_cache), num_heads, 2 * block_size, -1)[:, :, :block_size]
        order = key_order(layer.isa, block_size, self.head_size, kv_cache.dtype)
        keys = key_cache[blocks].flatten(2)[:, :, order].unflatten(2, (block_size, self.head_size))
        return keys.transpose(0, 1).flatten(1, 2)[:, : request.length]


@cache
def key_order(isa: str, block_size: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Where the numbers of the keys of one block lie in it, [block_size * head_dim].

    It depends on the instructions that the kernel is for, so vLLM's own operator is asked: keys whose numbers say which
    token they are of, and then which place in a head, small enough for bfloat16.
    """
    token, place = (
        x.flatten() for x in torch.meshgrid(torch.arange(block_size), torch.arange(head_dim), indexing="ij")
    )
    found = []
    for coordinate in (token, place):
        high, low = (
            stored(part.view(block_size, head_dim).to(dtype), isa) for part in (coordinate // 256, coordinate % 256)
        )
        found.append(256 * high + low)
    order = torch.empty_like(token)
    order[found[0] * head_dim + found[1]] = torch.arange(len(token))
    return order


def stored(keys: Tensor, isa: str) -> Tensor:
    """The numbers of keys [block_size, d] in the order in which vLLM stores them in a block."""
    block_size, head_dim = keys.shape
    cache = keys.new_zeros(1, 1, 2 * block_size, head_dim)
    key_cache, value_cache = cache.chunk(2, dim=2)
    keys = keys[:, None].contiguous()
    vllm_ops.cpu_attn_reshape_and_cache(keys, keys, key_cache, value_cache, torch.arange(block_size), isa)
    return key_cache.flatten().round().long()


def mend_operators() -> None:
    """Let tokens of the base model pass vLLM's LoRA operators on a CPU unchanged: their slot, -1, is the last there.

    The operators stand under their names in two modules.
    """
    for module in (lora_ops, punica_cpu):
        for name in ("bgmv_expand", "bgmv_expand_slice"):
            original = getattr(module, name)
            if not hasattr(original, "ntk_attention_mended"):
                setattr(module, name, without_base_tokens(original))


def without_base_tokens(original: Any) -> Any:
    """An operator that adds inputs times the weights of each one's slot to an output; nothing where the slot is -1."""

    @wraps(original)
    def expand(inputs: Tensor, weights: Tensor, output: Tensor, indices: Tensor, *args: Any, **kwargs: Any) -> Any:
        inputs = inputs.masked_fill((indices < 0)[:, None], 0.0)
        return original(inputs, weights, output, indices, *args, **kwargs)

    expand.ntk_attention_mended = True  # type: ignore[attr-defined]
    return expand
