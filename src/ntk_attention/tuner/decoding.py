"""How a layer computes one new token after another in a call of `generate`: decided by the first one.

What a call of the attention function checks, plans and binds takes longer than its kernel. A `DecodingStep` holds the
outcome, and answers calls that ask for the same; to any other call it says nothing, and that call is decided anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..ops.bundles import Prefixes, StateTensors, Tokens
from ..ops.plan import Path, plan_attention
from ..ops.triton.decoder import Decoder
from .calls import CALLS
from .kept import KEPT
from .rotation import ROTATION, Positions

if TYPE_CHECKING:
    from ..ops.state import RowStates
    from .adapter import PrefixAdapter
    from .layer import NTKAttentionLayer

IMPLEMENTATION = "sdpa"  # the one whose masks say all, and that gives no weights
READ = ("position_bias", "softcap", "s_aux", "sinks")  # arguments that change attention


# Query, key, value, mask, scaling and dropout, as an attention function gets them.
Given = tuple[Tensor, Tensor, Tensor, Tensor | None, float | None, float]


def kind_of(given: Given) -> tuple[Any, ...]:
    """What a bound call depends on."""
    query, key, value, mask, scaling, dropout = given
    return query.shape, query.dtype, query.device, key.shape[:2], value.shape[3], mask is None, scaling, dropout


def step_of(layer: NTKAttentionLayer) -> DecodingStep | None:
    """What was bound for a layer in this call of `generate`."""
    if torch.compiler.is_compiling() or KEPT.steps is None:  # a graph must not hold what one call has bound
        return None
    return KEPT.steps.get(layer)


def bind(
    layer: NTKAttentionLayer, adapter: PrefixAdapter | RowStates, tokens: Tokens, prefixes: Prefixes, given: Given,
    arguments: dict[str, Any],
) -> None:  # fmt: skip
    """Let later calls of a layer do as this one, where they may.

    Args:
        layer: whose call it is.
        adapter: all that is active in it.
        tokens: of the call, as attention saw them.
        prefixes: likewise.
        given: the arguments of the call.
        arguments: those that have no place.
    """
    if torch.compiler.is_compiling() or KEPT.steps is None or tokens.query.shape[2] != 1:
        return
    KEPT.steps.pop(layer, None)
    if CALLS.mixed is not None or CALLS.watchers or CALLS.exact or torch.is_grad_enabled():
        return
    adapter, state = cast("PrefixAdapter", adapter), prefixes.only_state
    positions: Positions | None = arguments[ROTATION]
    held = tensors_of(adapter)
    if (
        state is None
        or adapter.mesh is not None
        or tokens.attn_mask is not given[3]  # it was cut, or another one stands for it
        or (positions is not None and positions.come_apart)
        or any(map(torch.is_inference, held))  # which have no versions
        or any(arguments.get(name) is not None for name in READ)
        or plan_attention(tokens, prefixes) is not Path.DECODE
    ):
        return
    bound = StateTensors.of(state, tokens.query, prefixes.factor, prefixes.rotation)
    KEPT.steps[layer] = DecodingStep(adapter, held, Decoder(tokens, bound), bound, given, arguments)


def tensors_of(adapter: PrefixAdapter) -> list[Tensor]:
    """All that its state is made of."""
    return [x for x in (*adapter._parameters.values(), *adapter._buffers.values()) if x is not None]


class DecodingStep:
    """One layer's, as `bind` makes it.

    Args:
        adapter: that is active.
        held: its tensors.
        decoder: of the first call.
        state: made of `held`, with the positions of that call.
        given: its arguments.
        arguments: likewise.
    """

    def __init__(
        self, adapter: PrefixAdapter, held: list[Tensor], decoder: Decoder, state: StateTensors, given: Given,
        arguments: dict[str, Any],
    ):  # fmt: skip
        self.adapter, self.held, self.decoder = adapter, held, decoder
        self.versions, self.unit = [x._version for x in held], adapter.unit
        self.kind = kind_of(given)
        self.names = {name for name, argument in arguments.items() if argument is not None}
        self.place = None if state.table is None else (state.table.shape[-1], state.width, state.start)

    @property
    def is_free(self) -> bool:
        """Whether phi sees queries without their positions."""
        return self.place is not None

    def __call__(self, active: Sequence[Any], given: Given, arguments: dict[str, Any]) -> Tensor | None:
        """The output [B, L, H, d_v]; None for a call that it was not bound for, or where something has changed."""
        if len(active) != 1 or active[0] is not self.adapter or not self.is_valid() or kind_of(given) != self.kind:
            return None
        if {name for name, argument in arguments.items() if argument is not None} != self.names:
            return None
        query, key, value, mask, *_ = given
        table = None
        if self.place is not None:
            table, width, start = arguments[ROTATION].rotation
            fits = table.shape[1] == 1 and table.shape[0] in (1, query.shape[0]) and table.device == query.device
            if not fits or (table.shape[-1], width, start) != self.place:
                return None
        if mask is not None:
            if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[-1] != key.shape[2]:
                return None
            mask = mask.expand(*query.shape[:3], key.shape[2])
        return self.decoder(query, key, value, mask, table)

    def is_valid(self) -> bool:
        """Whether the state is still that of the adapter, and may be kept."""
        held = tensors_of(self.adapter)
        return (
            len(held) == len(self.held)
            and all(map(is_, held, self.held))
            and [x._version for x in held] == self.versions
            and self.adapter.unit == self.unit
            and CALLS.mixed is None
            and not CALLS.watchers
            and not CALLS.exact
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled(held[0].device.type)
            and not (held[0].is_cuda and torch.cuda.is_current_stream_capturing())
        )
