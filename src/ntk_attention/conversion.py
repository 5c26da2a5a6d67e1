"""A prefix that exists already, the KV cache of a text or a prefix-tuning adapter, becomes an NTK-Attention adapter."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from .config import NTKAttentionConfig
from .exact import LayerPrefix
from .routing import CHILD, geometry_of, query_scale, routes
from .state import PrefixState


def adapter_from_prefix(
    model: nn.Module, prefix: Sequence[LayerPrefix], config: NTKAttentionConfig | None = None
) -> PeftModel:
    """An ordinary NTK-Attention adapter whose states are the sums over a prefix.

    It is as exact as phi(q).phi(c) is near exp(scale q.c): very, where logits are below 1; not for the logits of real
    language models, whose prefixes need maps of a higher degree or a state that is trained on.

    Args:
        model: the frozen model, whose layers the prefix belongs to.
        prefix: one entry per attention layer, by `layer_idx`; from `prefix_of_cache` or `prefix_of_adapter`.
        config: feature map, rank and target modules, by default `taylor` of degree 2 everywhere. The states are one per
            KV head. A layer that is not a target sees no prefix.

    Raises:
        ValueError: if layers or heads do not fit the model, or a value is not finite. The model is as it was then.
    """
    config = NTKAttentionConfig(feature_map="taylor", constant_feature=False) if config is None else copy.copy(config)
    config.state_heads = "kv"
    modules = attention_modules(model)
    if len(prefix) != len(modules):
        raise ValueError(f"the prefix has {len(prefix)} layers, the model {len(modules)} attention layers")
    phi = config.make_feature_map()
    phi.constant = False  # a sum over tokens has none; the adapter gives it no weight
    states = {}
    for (name, module), layer in zip(modules, prefix, strict=True):
        sizes = geometry_of(module, name)
        H, d, d_v = layer.keys.shape[0], layer.keys.shape[-1], layer.values.shape[-1]
        if (H, d, d_v) != (sizes.num_kv_heads, sizes.head_dim, sizes.value_dim):
            raise ValueError(
                f"{name} has {sizes.num_kv_heads} KV heads, keys of size {sizes.head_dim} and values of size "
                f"{sizes.value_dim}; the prefix has {H}, {d} and {d_v}: it is of another model"
            )
        _, factor = query_scale(module, getattr(module, "scaling", None), d)
        try:
            states[name] = PrefixState.from_prefix(layer.keys, layer.values, copy.deepcopy(phi), scale=factor**2)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    peft_model = get_peft_model(model, config)  # type: ignore[arg-type]
    for name, module in modules:
        adapters = getattr(module, CHILD, None)
        if adapters is not None:
            adapters[peft_model.active_adapter].load_state(states[name])
    return peft_model


def prefix_of_cache(model: nn.Module, cache: Any) -> list[LayerPrefix]:
    """The prefix that a KV cache holds, moved to the positions before 0, so that what follows it starts at 0.

    Args:
        model: the model that filled the cache.
        cache: `past_key_values` of one sequence of m tokens at the positions 0 ... m - 1.

    Raises:
        ValueError: if the cache is empty, of several sequences or of another model, or lacks tokens of a layer (sliding
            windows); or if the positions of the model cannot be moved, since they are not rotary.
    """
    layers = list(getattr(cache, "layers", []))
    if not layers or any(getattr(layer, "keys", None) is None or layer.keys.numel() == 0 for layer in layers):
        raise ValueError(f"the cache {type(cache).__name__} holds no keys: run the model over the prefix first")
    modules = attention_modules(model)
    if len(layers) != len(modules):
        raise ValueError(f"the cache has {len(layers)} layers, the model {len(modules)} attention layers")
    m = cache.get_seq_length()
    prefix = []
    for (name, module), layer in zip(modules, layers, strict=True):
        keys, values = layer.keys[..., :m, :], layer.values[..., :m, :]
        if keys.shape[0] != 1:
            raise ValueError(f"{name}: the cache must hold one sequence, got {keys.shape[0]}")
        if keys.shape[2] != m:
            raise ValueError(f"{name}: the cache keeps {keys.shape[2]} of {m} tokens: sliding windows are not covered")
        prefix.append(LayerPrefix(rotated_back(model, module, keys, m)[0].detach(), values[0].detach()))
    return prefix


@torch.no_grad()
def prefix_of_adapter(model: PeftModel) -> list[LayerPrefix]:
    """The prefix of a prefix-tuning or cartridge adapter of PEFT; errors as in `prefix_of_cache`."""
    config = model.active_peft_config
    if config.peft_type not in ("PREFIX_TUNING", "CARTRIDGE"):
        raise ValueError(f"expected a prefix-tuning or cartridge adapter, got {config.peft_type}")
    return prefix_of_cache(model.get_base_model(), model.get_prompt(batch_size=1))


def attention_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The self-attention layers in the order of their `layer_idx`, which is that of a cache."""
    found = [
        (name, module) for name, module in model.named_modules() if routes(module) and hasattr(module, "layer_idx")
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention layer with a place in a KV cache")
    return sorted(found, key=lambda item: item[1].layer_idx)


def rotated_back(model: nn.Module, module: nn.Module, keys: Tensor, offset: int) -> Tensor:
    """Rotary keys [1, H_kv, m, d] as if every position were smaller by `offset`; what matters are differences."""
    rotate = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    rotary = next((x for x in model.modules() if type(x).__name__.endswith("RotaryEmbedding")), None)
    if rotate is None or rotary is None:
        raise ValueError(
            f"{type(module).__name__} has no rotary positions: the positions of its prefix cannot be moved"
        )
    exact = keys.to(torch.promote_types(keys.dtype, torch.float32))
    cos, sin = rotary(exact, torch.tensor([[offset]], device=keys.device))
    length = torch.sqrt(cos.square() + sin.square())  # some models scale their keys here, too
    return rotate(exact, exact, cos / length, -sin / length)[1].to(keys.dtype)


def by_layer(model: nn.Module, prefix: Sequence[LayerPrefix]) -> dict[str, LayerPrefix]:
    """The prefix of a model by the names of its NTK-Attention layers, without layers that have none."""
    modules = dict(model.named_modules())
    found = [
        (f"{name}.{CHILD}", tokens)
        for (name, _), tokens in zip(attention_modules(model), prefix, strict=True)
        if f"{name}.{CHILD}" in modules
    ]
    return dict(found)
