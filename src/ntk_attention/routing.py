"""How attention modules of transformers models are found and routed through NTK-Attention.

Modules that look up their attention function by ``self.config._attn_implementation`` get a shallow copy of their
config with our name in it. The model keeps its own config, so that it still makes the masks of its own implementation:
a mask is never dropped, and everything outside the attention modules stays as it was.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .masks import IMPLEMENTATIONS, visible_tokens
from .operation import attend, autocast_inputs, check_state_fits, context_block, prefix_blocks, without_autocast

CHILD = "ntk_states"  # name of the NTKAttentionLayer in its attention module
ROUTE = "ntk_attention"  # name of our function in the attention interface


@dataclass(frozen=True)
class Geometry:
    """Sizes of one attention module."""

    num_heads: int  # H
    num_kv_heads: int  # H_kv
    head_dim: int  # d, of queries and keys
    value_dim: int  # d_v
    feed_forward: int = 0  # D, the width of the feed-forward block that goes with it; 0 without one


def routes(module: nn.Module) -> bool:
    """Whether the module's forward looks its attention function up in the attention interface."""
    forward = inspect.unwrap(type(module).forward)
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    return "ALL_ATTENTION_FUNCTIONS" in names and getattr(module, "config", None) is not None


def is_encoder(module: nn.Module) -> bool:
    """Whether an attention module is of a model that looks in both directions and writes nothing, as BERT and ViT."""
    pair = getattr(module.config, "is_encoder_decoder", False)
    return not pair and getattr(module, "is_causal", None) is False


def unrouted_attention(model: nn.Module) -> list[str]:
    """Modules that are attention by name but do not route: for error messages."""
    return [
        f"{name} ({type(module).__name__})"
        for name, module in model.named_modules()
        if "attention" in type(module).__name__.lower() and not routes(module)
    ]


def geometry_of(module: nn.Module, name: str) -> Geometry:
    """Sizes of an attention module, by the names that transformers uses for them.

    Raises:
        ValueError: if a size has none of those names.
    """

    def find(*names: str, default: int | None = None) -> int:
        for holder in (module, module.config):
            for attribute in names:
                if isinstance(getattr(holder, attribute, None), int):
                    return getattr(holder, attribute)
        if default is None:
            raise ValueError(f"{name} ({type(module).__name__}) has none of the attributes {names}: cannot attach")
        return default

    num_heads = find("num_heads", "n_heads", "num_attention_heads", "n_head")
    groups = getattr(module, "num_key_value_groups", None) or 1
    head_dim = find("qk_head_dim", "head_dim", "attention_head_size", "head_size", "key_value_proj_dim", default=-1)
    if head_dim < 0:
        head_dim = find("hidden_size", "d_model", "dim") // num_heads
    return Geometry(num_heads, num_heads // groups, head_dim, find("v_head_dim", default=head_dim))


def check_routes(module: nn.Module, name: str) -> None:
    """Raise ValueError if a module that was named as a target does not route."""
    if not routes(module):
        raise ValueError(
            f"target {name} ({type(module).__name__}) does not route through the attention interface of transformers: "
            "leave target_modules out, or name modules that do"
        )


def check_implementation(module: nn.Module, name: str) -> str:
    """The attention implementation that the module would use without us.

    Raises:
        ValueError: if it is not one whose masks we read.
    """
    layer = getattr(module, CHILD, None)
    config: Any = module.config if layer is None else layer.base_config
    implementation = config._attn_implementation
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{name} uses the attention implementation {implementation!r}; NTK-Attention takes the place of one of "
            f"{IMPLEMENTATIONS}: load the model with attn_implementation='sdpa'"
        )
    return implementation


def attach(module: nn.Module, layer: Any) -> None:
    """Hang a layer on an attention module and route the module through it."""
    routed: Any = copy.copy(module.config)
    routed._attn_implementation_internal = ROUTE
    # Read at every call: the user may switch the model between sdpa and eager, and the masks change with it.
    layer.base_config = module.config
    module.config = routed
    module.add_module(CHILD, layer)


def detach(module: nn.Module) -> None:
    """Undo `attach`."""
    getattr(module, CHILD).remove_hooks()
    module.config = getattr(module, CHILD).base_config
    delattr(module, CHILD)


def base_attention(module: nn.Module, implementation: str) -> Callable[..., Any]:
    """The function that the module would call without us."""
    if implementation != "eager":
        return ALL_ATTENTION_FUNCTIONS[implementation]
    for cls in type(module).__mro__:  # each modeling file has its own eager function
        function = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
        if function is not None:
            return function
    raise ValueError(f"{type(module).__name__} has no eager attention: load the model with attn_implementation='sdpa'")


def query_scale(module: nn.Module, scaling: float | None, head_dim: int) -> tuple[float, float]:
    """The scale of the logits that is still to be applied, and the factor that makes phi's input of the query.

    phi sees sqrt(s) * q with the true scale s of the family. OPT, Whisper and others multiply the query by s
    themselves and pass scaling = 1: there the factor is s^-1/2.
    """
    if scaling is None:
        scaling = head_dim**-0.5
    own = next((v for n in ("scaling", "scale") if isinstance(v := getattr(module, n, None), float)), scaling)
    if scaling == 1.0 and own != 1.0:
        return 1.0, own**-0.5
    return scaling, scaling**0.5


def ntk_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Our entry of the attention interface: query [B, H, L, d], KV heads not repeated; returns [B, L, H, d_v]."""
    layer = getattr(module, CHILD)
    is_active = layer.has_active_state()
    if layer.observer is None and layer.exact is None and not is_active:
        base = base_attention(module, layer.base_config._attn_implementation)
        return base(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)

    implementation = check_implementation(module, type(module).__name__)
    query, key, value = autocast_inputs(query, key, value)
    scale, factor = query_scale(module, scaling, query.shape[-1])
    key, value, mask, is_causal = visible_tokens(module, query, key, value, attention_mask, implementation, **kwargs)
    if query.shape[0] != key.shape[0]:  # learned queries, the same for every item
        query = query.expand(key.shape[0], -1, -1, -1)
    options: dict[str, Any] = {"softcap": kwargs.get("softcap"), "sink": kwargs.get("s_aux")}
    with without_autocast(query.device.type):
        states = layer.states(query.shape[0]) if is_active else []
        for state in states:
            check_state_fits(
                state,
                num_heads=query.shape[1],
                num_kv_heads=key.shape[1],
                head_dim=query.shape[3],
                value_dim=value.shape[-1],
            )
        if layer.observer is not None:
            context = context_block(query, key, value, mask, is_causal, scale, **options)
            given = bool(states) or layer.exact is not None
            prefix = prefix_blocks(query, states, factor, layer.exact, scale, options["softcap"]) if given else None
            layer.observer(query, context, prefix, factor)
        if states or layer.exact is not None:
            options["exact"] = layer.exact
            out = attend(query, key, value, states, factor, mask, dropout, is_causal, scale, **options)
        else:
            out = context.out
    return out.transpose(1, 2).contiguous(), None


# At import, since a model that was pickled is never attached again.
AttentionInterface.register(ROUTE, ntk_attention_forward)
