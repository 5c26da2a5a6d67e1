"""Prefixes of feed-forward blocks in vLLM: inside of them by its own LoRA layers, beside them by its operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.lora.layers.base import BaseLayerWithLoRA
from vllm.lora.lora_weights import LoRALayerWeights

from ..tuner.feed_forward import FeedForwardPrefix, feed_forwards
from ..tuner.layer import input_of
from .slots import Slots


class BlockFactors(BaseLayerWithLoRA):
    """Z_A and Z_B of one block, a place for each slot, transposed as vLLM's operators have them.

    Args:
        slots: of the engine.
        width: D, of the block.
        rank: the largest of Z.
        dtype: of the factors.
    """

    def __init__(self, slots: Slots, width: int, rank: int, dtype: torch.dtype):
        super().__init__()
        self.slots = slots
        self.refused: str | None = None  # why nothing can be added to the block, seen when the model first runs
        A, device = slots.count, slots.device
        self.register_buffer("A", torch.zeros(A, 1, rank, width, dtype=dtype, device=device), persistent=False)
        self.register_buffer("B", torch.zeros(A, 1, width, rank, dtype=dtype, device=device), persistent=False)

    def reset_lora(self, index: int) -> None:
        """Empty a slot."""
        self.A[index] = 0
        self.B[index] = 0

    def set_lora(self, index: int, lora_a: Tensor, lora_b: Tensor) -> None:
        """Fill a slot with the factors [rank, D] and [D, rank]; a lower rank is filled up with zeros."""
        self.reset_lora(index)
        self.A[index, 0, : len(lora_a)].copy_(lora_a)
        self.B[index, 0, :, : len(lora_a)].copy_(lora_b)

    def after_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The output of the block [T, D], with what its prefixes add."""
        x = input_of(args, kwargs)
        if not isinstance(output, Tensor) or output.shape != x.shape:
            self.refused = f"{type(block).__name__} does not give one tensor for one"
            return output
        self.slots.punica.add_lora_linear(output, x, (self.A,), (self.B,), 1.0, (output.shape[-1],))
        return output


def blocks_of(model: nn.Module, outline: nn.Module, attention: list[str]) -> dict[str, tuple[nn.Module, int]]:
    """The feed-forward blocks beside attention modules, and their widths, by the names of these; only such that are one
    module in transformers and in vLLM.

    Args:
        model: of vLLM.
        outline: the same of transformers.
        attention: names of attention modules.
    """
    modules, theirs = dict(model.named_modules()), dict(outline.named_modules())
    found = feed_forwards(outline, [name for name in attention if name in theirs], "beside")
    return {
        name: (modules[block.names[0]], block.width)
        for name, block in found.items()
        if block.first is block.last and block.names[0] in modules
    }


def weights(names: list[str], prefix: FeedForwardPrefix) -> dict[str, LoRALayerWeights]:
    """The factors as vLLM carries the weights of its layers: the part of a linear layer is LoRA of that.

    Args:
        names: of the layer, or of those that are one after another in its output.
        prefix: the part.
    """
    rank, Z_A, Z_B = prefix.rank, prefix.plain_leading(), prefix.plain_scaled()
    slices = Z_B.T.contiguous().chunk(len(names))
    return {n: LoRALayerWeights(n, rank, rank, Z_A.T.contiguous(), B) for n, B in zip(names, slices, strict=True)}
