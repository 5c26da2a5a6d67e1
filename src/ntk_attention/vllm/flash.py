"""Attention with a prefix on a GPU: FlashAttention has the log-sum-exp, for which vLLM does not ask."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

from .attention import PrefixAttention
from .step import Step

FUNCTION = "flash_attn_varlen_func"  # the name in vLLM's module


class FlashPrefixAttention(PrefixAttention, FlashAttentionImpl):
    """vLLM's FlashAttention, with a prefix."""

    def is_needed(self) -> bool:
        """Whether a token of this pass has an adapter; not which one, which only the device knows."""
        return not bool(self.states.slots.punica.token_mapping_meta.no_lora_flag_cpu)

    def attend(self, step: Step, *given: Any, **scales: Tensor | None) -> Tensor:
        """Plain attention into the output; the log-sum-exp of its logits [H, T] in float32."""
        function = getattr(flash_attn, FUNCTION)
        function.wanted = []
        try:
            FlashAttentionImpl.forward(self, *given, **scales)
            (lse,) = function.wanted  # one call, not the two of cascade attention
        finally:
            function.wanted = None
        return lse


class WithLse:
    """vLLM's function for attention, which also keeps the log-sum-exp where `wanted` is a list."""

    def __init__(self, original: Any):
        self.original = original
        self.wanted: list[Tensor] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.wanted is None:
            return self.original(*args, **kwargs)
        out, lse, *_ = self.original(*args, **kwargs, return_softmax_lse=True)
        self.wanted.append(lse)
        return out


def ask_for_lse() -> None:
    """Put ours in the place of vLLM's function in its module, once."""
    original = getattr(flash_attn, FUNCTION)
    if not isinstance(original, WithLse):
        setattr(flash_attn, FUNCTION, WithLse(original))
