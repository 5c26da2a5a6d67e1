"""How attention modules of transformers models are found and routed through NTK-Attention.

A routed module gets a copy of its config in which the attention function has our name (see lookup.py). The model keeps
its own config, so that it still makes the masks of its own implementation: a mask is never dropped, and everything
outside the attention modules stays as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..ops.attention import (
    attend,
    attention_weights,
    autocast_inputs,
    context_block,
    states_block,
    without_autocast,
)
from ..ops.bundles import Prefixes, Tokens
from ..ops.checks import check_state_fits
from ..ops.reference import Block
from ..ops.rotation import Rotation
from ..ops.state import PrefixState, RowStates
from .arguments import wants_weights
from .calls import CALLS, Watcher
from .decoding import IMPLEMENTATION, bind, step_of
from .geometry import named
from .lookup import ROUTE, lookup_of, routed_config
from .masks import FLASH, IMPLEMENTATIONS, visible_tokens
from .rotation import ROTATION, Positions

if TYPE_CHECKING:
    from .adapter import PrefixAdapter
    from .layer import NTKAttentionLayer

CHILD = "ntk_states"  # name of the NTKAttentionLayer in its attention module
NOTHING = nullcontext()


def routes(module: nn.Module) -> bool:
    """Whether the module's forward looks its attention function up in the attention interface."""
    return lookup_of(type(module)) is not None and getattr(module, "config", None) is not None


def check_routes(module: nn.Module, name: str) -> None:
    """Raise ValueError if a module that was named as a target does not route."""
    if not routes(module):
        raise ValueError(
            f"target {named(module, name)} does not route through the attention interface of transformers: leave "
            "target_modules out, or name modules that do"
        )


def own_config(module: nn.Module) -> Any:
    """The config that the module has without us."""
    config: Any = module.config
    return getattr(config, "ntk_base", config)


def is_encoder(module: nn.Module) -> bool:
    """Whether an adapted attention module is of a model that looks in both directions and writes nothing."""
    return getattr(module, CHILD).encodes


def check_implementation(module: nn.Module, name: str) -> str:
    """The attention implementation that the module would use without us.

    Raises:
        ValueError: if it is not one whose masks we read.
    """
    implementation = own_config(module)._attn_implementation
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{name} uses the attention implementation {implementation!r}; NTK-Attention takes the place of one of "
            f"{IMPLEMENTATIONS}: load the model with attn_implementation='sdpa'"
        )
    lookup = lookup_of(type(module))
    assert lookup is not None
    own = lookup.interface.get(implementation)
    if own is not AttentionInterface().get(implementation):
        raise ValueError(f"{named(module, name)} has a function of its own for {implementation!r}")
    if implementation == "eager" and lookup.eager is None:
        raise ValueError(
            f"{named(module, name)} has no eager attention: load the model with attn_implementation='sdpa'"
        )
    if lookup.is_switched(module) and (implementation in lookup.compared or not lookup.compared):
        raise ValueError(
            f"{named(module, name)} computes attention itself under {implementation!r} while one of "
            f"{sorted(lookup.switches)} is set, where no prefix reaches it: load the model with "
            "attn_implementation='sdpa'"
        )
    if implementation in FLASH and lookup.replaced:
        raise ValueError(
            f"{named(module, name)} takes {sorted(lookup.replaced)} in some calls, past its config: load it with "
            "attn_implementation='sdpa'"
        )
    return implementation


def attach(module: nn.Module, layer: NTKAttentionLayer) -> None:
    """Hang a layer on an attention module and route the module through it."""
    lookup = lookup_of(type(module))
    assert lookup is not None
    module.config = routed_config(module.config, lookup, lookup.ways_past(module))
    module.add_module(CHILD, layer)


def detach(module: nn.Module) -> None:
    """Undo `attach`."""
    getattr(module, CHILD).remove_hooks()
    module.config = own_config(module)
    delattr(module, CHILD)


def query_scale(module: nn.Module, scaling: float | None, head_dim: int) -> tuple[float, float]:
    """The scale of the logits that is still to be applied, and the factor that makes phi's input of the query.

    phi sees sqrt(s) * q with the true scale s of the family. OPT, Whisper and others multiply the query by s
    themselves and pass scaling = 1: there the factor is s^-1/2.
    """
    if scaling is None:
        scaling = head_dim**-0.5
    if scaling != 1.0:
        return scaling, scaling**0.5
    own = next((v for n in ("scaling", "scale") if isinstance(v := getattr(module, n, None), float)), scaling)
    return 1.0, own**-0.5


def ntk_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Our entry of the attention interface: Algorithm 2 of the paper, in the place of the module's own function.

    Args:
        module: of attention, adapted.
        query: [B, H, L, d], or [1, H, L, d] where it is learned and the same for every item.
        key, value: [B, H_kv, S, d] and [B, H_kv, S, d_v], KV heads not repeated.
        attention_mask: of the kind that the module's own implementation has.
        scaling, dropout: of the logits, None for d^-1/2; of the weights. What else is passed: see `arguments`.

    Returns:
        The output [B, L, H, d_v]; the weights of the real tokens [B, H, L, S], without gradients, if these are wanted.

    Raises:
        ValueError: for an argument that changes attention and that we do not handle.
    """
    layer = cast("NTKAttentionLayer", module._modules[CHILD])  # which takes less time than asking the module
    active = layer.active()  # once: another thread may set or delete adapters meanwhile
    given = query, key, value, attention_mask, scaling, dropout
    if (step := step_of(layer)) is not None and (out := step(active, given, kwargs)) is not None:
        return out, None
    watcher, exact = CALLS.watchers.get(layer), CALLS.exact.get(layer)
    positions: Positions | None = kwargs.pop(ROTATION, None)  # no other function may see it
    implementation = own_config(module)._attn_implementation
    if watcher is None and exact is None and not active:
        base, caller = own_function(module, layer, implementation)
        return base(caller, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    check_call(layer, module, implementation, kwargs)
    if casts := torch.is_autocast_enabled(query.device.type):
        query, key, value = autocast_inputs(query, key, value)
    scale, factor = query_scale(module, scaling, query.shape[-1])
    key, value, mask, is_causal = visible_tokens(module, query, key, value, attention_mask, implementation, **kwargs)
    if query.shape[0] != key.shape[0]:  # learned queries, the same for every item
        query = query.expand(key.shape[0], -1, -1, -1)
    tokens, softcap = Tokens(query, key, value, mask, dropout, is_causal, scale), kwargs.get("softcap")
    with without_autocast(query.device.type) if casts else NOTHING:
        states = states_for(layer, active, query, key, value)
        rotation = None if positions is None else positions.of(query, type(module).__name__)
        is_free = rotation is not None and layer.sees_no_positions(active)
        prefixes = Prefixes(states, factor, exact, sink_of(kwargs), rotation if is_free else None)
        if watcher is not None:
            context = watched(watcher, tokens, prefixes, softcap, rotation)
        out = attend(tokens, prefixes, softcap=softcap) if states or exact is not None else context.out
        if implementation == IMPLEMENTATION and len(active) == 1 and not casts:
            bind(layer, active[0], tokens, prefixes, given, {**kwargs, ROTATION: positions})
        weights = None
        if implementation == "eager" and wants_weights(module, kwargs):
            with torch.no_grad():  # asked for or not, checkpointing must find the same tensors the second time
                weights = attention_weights(tokens, prefixes, softcap)
    return out.transpose(1, 2).contiguous(), weights


def watched(
    watcher: Watcher, tokens: Tokens, prefixes: Prefixes, softcap: float | None, rotation: Rotation | None
) -> Block:
    """Show a call to its watcher; returns the block of its real tokens."""
    context, prefix = context_block(tokens, softcap=softcap, sink=prefixes.sink), None
    if prefixes.states or prefixes.exact is not None:
        prefix = states_block(tokens.query, prefixes, tokens.scale, softcap)
    watcher(tokens.query, context, prefix, prefixes.factor, rotation)
    return context


def own_function(module: nn.Module, layer: NTKAttentionLayer, implementation: str) -> tuple[Any, Any]:
    """The attention function of a module as it was, and what to call it with in the module's place."""
    base = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, layer.own.eager)
    # Flash attention reads the name in the config once more.
    return base, Unrouted(module) if implementation in FLASH else module


def states_for(
    layer: NTKAttentionLayer, active: Sequence[PrefixAdapter | RowStates], query: Tensor, key: Tensor, value: Tensor
) -> Sequence[PrefixState | RowStates]:
    """The prefixes that this batch sees, of what is active in the layer.

    Raises:
        ValueError: if one is of other sizes than the tensors of the call.
    """
    states = layer.states(active, query.shape[0])
    for state in states:
        check_state_fits(
            state,
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            head_dim=query.shape[3],
            value_dim=value.shape[-1],
        )
    return states


class Unrouted:
    """A routed module as it was, for functions of transformers that look at its config."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.config = own_config(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def check_call(layer: NTKAttentionLayer, module: nn.Module, implementation: str, arguments: dict[str, Any]) -> None:
    """Raise ValueError for an implementation whose masks we do not read, and for arguments that would be ignored."""
    refused = layer.own.refused.get(implementation)
    if refused is None:  # switched to since the layer was attached: raises
        check_implementation(module, type(module).__name__)
        refused = {}
    for name, argument in arguments.items():
        if argument is not None and name in refused:
            raise ValueError(
                f"{type(module).__name__} passes {name!r} to its attention function, which NTK-Attention does not "
                f"handle under {implementation!r}: {refused[name]}"
            )


def sink_of(arguments: dict[str, Any]) -> Tensor | None:
    """The logits of a key without value: [H], or [B, H, L] where every token has its own."""
    if arguments.get("s_aux") is not None:
        return arguments["s_aux"]
    sinks = arguments.get("sinks")
    return None if sinks is None else sinks.squeeze(-1)


# At import, since a model that was pickled is never attached again.
AttentionInterface.register(ROUTE, ntk_attention_forward)
