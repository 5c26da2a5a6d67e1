"""A prefix that exists already, the KV cache of a text or a prefix-tuning adapter, becomes an NTK-Attention adapter."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache

from ..ops.exact import LayerPrefix
from ..ops.state import PrefixState, check_tokens
from ..tuner.config import NTKAttentionConfig
from ..tuner.geometry import geometry_of
from ..tuner.layer import NTKAttentionLayer
from ..tuner.routing import CHILD, query_scale, routes


def adapter_from_prefix(
    model: nn.Module, prefix: Sequence[LayerPrefix], config: NTKAttentionConfig | None = None
) -> PeftModel:
    """An ordinary NTK-Attention adapter whose states are the sums over a prefix.

    It is as exact as phi(q).phi(c) is near exp(scale q.c): very, where logits are below 1; not for the logits of real
    language models, whose prefixes need maps of a higher degree or a state that is trained on.

    Args:
        model: the frozen model, whose layers the prefix belongs to.
        prefix: one entry per attention layer, by `layer_idx`; from `prefix_of_cache` or `prefix_of_adapter`.
        config: feature map, rank and target modules, by default `taylor` of degree 2 with a full Z everywhere. The
            states are one per KV head. A layer that is not a target sees no prefix.

    Raises:
        ValueError: if layers or heads do not fit the model, or a value is not finite. The model is as it was then.
    """
    config = config or NTKAttentionConfig(feature_map="taylor", constant_feature=False)
    config = config.for_given_prefix()
    config.state_heads = "kv"
    check_prefix(model, prefix)
    modules = attention_modules(model)
    phi = config.make_feature_map()
    phi.constant = False  # a sum over tokens has none; the adapter gives it no weight
    states = {}
    for (name, module), layer in zip(modules, prefix, strict=True):
        _, factor = query_scale(module, getattr(module, "scaling", None), layer.keys.shape[-1])
        states[name] = PrefixState.from_prefix(layer.keys, layer.values, copy.deepcopy(phi), scale=factor**2)
    peft_model = get_peft_model(model, config)  # type: ignore[arg-type]
    for name, module in modules:
        adapters = getattr(module, CHILD, None)
        if adapters is not None:
            adapters.load_state(peft_model.active_adapter, states[name])
    return peft_model


def check_prefix(model: nn.Module, prefix: Sequence[LayerPrefix]) -> None:
    """Raise ValueError unless a prefix has the layers and heads of the model, at least one token and finite values."""
    modules = attention_modules(model)
    if len(prefix) != len(modules):
        raise ValueError(f"the prefix has {len(prefix)} layers, the model {len(modules)} attention layers")
    for (name, module), layer in zip(modules, prefix, strict=True):
        check_sizes(name, module, layer.keys, layer.values)
        try:
            check_tokens(layer.keys, layer.values)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def check_sizes(name: str, module: nn.Module, keys: Tensor, values: Tensor) -> None:
    sizes = geometry_of(module, name)
    H, d, d_v = keys.shape[-3], keys.shape[-1], values.shape[-1]
    if (H, d, d_v) != (sizes.num_kv_heads, sizes.head_dim, sizes.value_dim):
        raise ValueError(
            f"{name} has {sizes.num_kv_heads} KV heads, keys of size {sizes.head_dim} and values of size "
            f"{sizes.value_dim}; the prefix has {H}, {d} and {d_v}: it is of another model"
        )


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
        check_sizes(name, module, keys, values)
        if keys.shape[0] != 1:
            raise ValueError(f"{name}: the cache must hold one sequence, got {keys.shape[0]}")
        if keys.shape[2] != m:
            raise ValueError(f"{name}: the cache keeps {keys.shape[2]} of {m} tokens: sliding windows are not covered")
        prefix.append(LayerPrefix(rotated_back(model, module, keys, m)[0].detach(), values[0].detach()))
    return prefix


@torch.no_grad()
def prefix_of_text(
    model: Any,
    tokens: Tensor,
    *,
    window: int | None = None,
    chunk_size: int = 512,
    progress: Callable[[int], None] = lambda n: None,
) -> list[LayerPrefix]:
    """The prefix that a text of any length is, read in chunks.

    A text longer than the window is read in parts that do not see each other, as short as the window demands and all
    of one size. Each lies right before position 0, so that no query is further from a key than the model knows.

    Args:
        model: a frozen causal language model.
        tokens: of the text [m].
        window: tokens of a part at most; three quarters of the model's context by default.
        chunk_size: tokens of one forward pass.
        progress: called with the number of tokens of each pass.

    Raises:
        ValueError: if the text is empty, or an NTK-Attention adapter is active, through which it would be read; else as
            in `prefix_of_cache`.
    """
    if tokens.numel() == 0:
        raise ValueError("the text is empty: expected at least one token")
    layers = [name for name, x in model.named_modules() if isinstance(x, NTKAttentionLayer) and x.active()]
    if layers:
        raise ValueError(
            f"an adapter is active in {len(layers)} attention modules, such as {layers[0].removesuffix(f'.{CHILD}')}: "
            "expected a text to be read without, as under model.disable_adapter()"
        )
    window = window or context_length(model) * 3 // 4
    num_parts = math.ceil(len(tokens) / window)
    device = next(model.parameters()).device
    parts = []
    for part in tokens.to(device).tensor_split(num_parts):
        cache = DynamicCache()
        for chunk in part.split(chunk_size):
            model(input_ids=chunk[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
            progress(len(chunk))
        parts.append(prefix_of_cache(model, cache))
    return [
        LayerPrefix(torch.cat([x.keys for x in layer], dim=1), torch.cat([x.values for x in layer], dim=1))
        for layer in zip(*parts, strict=True)
    ]


def context_length(model: Any) -> int:
    """Positions that the model knows."""
    return getattr(model.config, "max_position_embeddings", None) or 2**20


def save_cache(path: str | Path, cache: Any, tokens: Tensor | None = None) -> None:
    """Write `past_key_values` of one sequence to a safetensors file that `ntk-attention compress --cache` reads.

    Args:
        path: of the file.
        cache: a cache of transformers.
        tokens: [m], what it was made of, if anything; then pieces of it can be studied.
    """
    held = {} if tokens is None else {"tokens": tokens.contiguous()}
    for i, layer in enumerate(cache.layers):
        held |= {f"{i}.keys": layer.keys.contiguous(), f"{i}.values": layer.values.contiguous()}
    save_file(held, path)


def load_cache(path: str | Path) -> tuple[DynamicCache, Tensor]:
    """A cache that `save_cache` wrote, and its tokens, none where they are not known.

    Raises:
        ValueError: if the file is not such a cache.
    """
    try:
        held = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
    tokens = held.pop("tokens", torch.empty(0, dtype=torch.long))
    expected = {f"{i}.{kind}" for i in range(len(held) // 2) for kind in ("keys", "values")}
    if not held or held.keys() != expected:
        names = ", ".join(sorted(held)[:4])
        raise ValueError(f"{path} is not a KV cache: expected tensors 0.keys, 0.values, 1.keys, ..., got {names}")
    cache = DynamicCache()
    for i in range(len(held) // 2):
        cache.update(held[f"{i}.keys"], held[f"{i}.values"], i)
    return cache, tokens


@torch.no_grad()
def prefix_of_adapter(model: PeftModel) -> list[LayerPrefix]:
    """The prefix of a prefix-tuning or cartridge adapter of PEFT; errors as in `prefix_of_cache`."""
    config = model.active_peft_config
    if config.peft_type not in ("PREFIX_TUNING", "CARTRIDGE"):
        raise ValueError(f"expected a prefix-tuning or cartridge adapter, got {config.peft_type.value}")
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
