"""Attention of vLLM with a prefix: plain attention, and the prefix merged into it on its log-sum-exp.

It stands inside of vLLM's operator for attention, out of torch.compile's sight. Everything but how a device gives the
log-sum-exp (cpu.py, flash.py) is here, and the mathematics in `ntk_attention.ops`.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ..ops.reference import Block, merge, prefix_block
from ..ops.rotation import Rotation
from ..ops.triton import launch, support
from .slots import LayerStates
from .step import RotaryTable, Step


class PrefixAttention:
    """Mixed into an attention implementation of vLLM, in front of it."""

    scale: float  # of the logits
    states: LayerStates
    rotary: RotaryTable | None  # None where queries are not rotated, or no adapter sees them without

    @classmethod
    def of(cls, impl: Any, states: LayerStates, rotary: RotaryTable | None) -> PrefixAttention:
        """What takes the place of an implementation that vLLM has made."""
        made = object.__new__(cls)
        vars(made).update(vars(impl))
        made.states, made.rotary = states, rotary
        return made

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        **scales: Tensor | None,
    ) -> Tensor:
        """As vLLM has it: the output [T, H, d_v] of queries [T, H, d] over the tokens of their texts in the cache."""
        given = (layer, query, key, value, kv_cache, attn_metadata, output)
        if attn_metadata is None or not self.is_needed():
            return super().forward(*given, **scales)  # type: ignore[misc]
        step = Step.of(attn_metadata, self.states.slots)
        lse = self.attend(step, *given, **scales)
        T = attn_metadata.num_actual_tokens
        merge_prefixes(self.states, step, self.rotary, math.sqrt(self.scale), query[:T], output[:T], lse)
        return output

    def is_needed(self) -> bool:
        """Whether a token of this pass may have a prefix."""
        raise NotImplementedError

    def attend(self, step: Step, *given: Any, **scales: Tensor | None) -> Tensor:
        """Plain attention into the output; the log-sum-exp of its logits [H, T] in float32, of tokens with a prefix."""
        raise NotImplementedError


def merge_prefixes(
    states: LayerStates,
    step: Step,
    rotary: RotaryTable | None,
    factor: float,
    query: Tensor,
    output: Tensor,
    lse: Tensor,
) -> None:
    """Merge the prefixes of all tokens into plain attention.

    Args:
        states: of the layer.
        step: of the tokens.
        rotary: of the layer.
        factor: what queries are multiplied by before phi.
        query: [T, H, d].
        output: of plain attention [T, H, d_v], changed in place.
        lse: of its logits [H, T].
    """
    if support.covers(query.device, query.dtype, query.shape[-1], output.shape[-1]):
        merge_by_index(states, step, rotary, factor, query, output, lse)
    else:
        merge_by_slot(states, step, rotary, factor, query, output, lse)


def merge_by_index(
    states: LayerStates,
    step: Step,
    rotary: RotaryTable | None,
    factor: float,
    query: Tensor,
    output: Tensor,
    lse: Tensor,
) -> None:
    """One launch for all tokens, each a row of a batch with its own state."""
    rotation = None if rotary is None else Rotation(step.table(rotary)[:, None], rotary.width)
    out = output[:, :, None]
    merged, _ = launch.merge_prefix(
        query[:, :, None], out, lse.T[..., None], states.tensors(step.rows, factor, rotation)
    )
    if merged.data_ptr() != out.data_ptr():
        out.copy_(merged)


def merge_by_slot(
    states: LayerStates,
    step: Step,
    rotary: RotaryTable | None,
    factor: float,
    query: Tensor,
    output: Tensor,
    lse: Tensor,
) -> None:
    """The reference, for the tokens of one slot after another."""
    for slot in states.filled:
        places = (step.rows == slot).nonzero().squeeze(1)
        if not len(places):
            continue
        rotation = None if rotary is None else Rotation(step.table(rotary)[places][None], rotary.width)
        q, out = (x[places].transpose(0, 1)[None] for x in (query, output))  # [1, H, n, d]
        prefix = prefix_block(q, states.state(slot), factor, rotation)
        merged = merge(Block(out.float(), lse[None, :, places]), prefix)
        output[places] = merged.out[0].transpose(0, 1).to(output.dtype)
