"""Methods of the comparison that peft does not have, or not for encoders: they hang on attention modules as ours does.

- PrefixMemory (arXiv 2506.13674): softmax attention plus phi(q) M, with no term in the denominator.
- ExactPrefix: m real prefix tokens, keys and values trained. peft's own needs a cache, which BERT and ViT have not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ntk_attention.ops.features import feature_map
from ntk_attention.tuner.geometry import Geometry, geometry_of
from ntk_attention.tuner.lookup import Lookup, lookup_of
from ntk_attention.tuner.observation import evaluating
from ntk_attention.tuner.routing import query_scale, routes, visible_tokens

CHILD = ROUTE = "extension"


class Extension(nn.Module):
    """Takes the place of the attention function of one module."""

    implementation: str  # of the base model
    lookup: Lookup  # of the module

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Tensor:
        """query [B, H, L, d], KV heads not repeated; returns [B, L, H, d_v]."""
        raise NotImplementedError

    def base(self, module: nn.Module, *inputs: Any, **options: Any) -> Tensor:
        base = ALL_ATTENTION_FUNCTIONS.get_interface(self.implementation, self.lookup.eager)
        return base(module, *inputs, **options)[0]


class PrefixMemory(Extension):
    """M [H, r, d_v] starts at zero; phi is elu + 1 with the constant feature, as in ours."""

    def __init__(self, geometry: Geometry):
        super().__init__()
        self.feature_map = feature_map("elu", constant=True).bind(geometry.head_dim)
        r = self.feature_map.num_features(geometry.head_dim)
        self.M = nn.Parameter(torch.zeros(geometry.num_heads, r, geometry.value_dim))

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Tensor:
        out = self.base(module, query, key, value, mask, **options)
        _, factor = query_scale(module, options.get("scaling"), query.shape[-1])
        phi, log_scale = self.feature_map.scaled(query.float() * factor)
        memory = (phi * torch.exp(log_scale)[..., None]) @ self.M
        return out + memory.transpose(1, 2).to(out.dtype)


class ExactPrefix(Extension):
    """Keys and values [H_kv, m, d] in front of the real tokens, seen by every query."""

    def __init__(self, geometry: Geometry, m: int):
        super().__init__()
        self.key = nn.Parameter(torch.randn(geometry.num_kv_heads, m, geometry.head_dim))
        self.value = nn.Parameter(torch.randn(geometry.num_kv_heads, m, geometry.value_dim))
        self.start_mask: Tensor | None = None  # [B, L], while the start is read off real tokens

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Tensor:
        if self.start_mask is not None:
            self.start_from(key, value, self.start_mask)
            return self.base(module, query, key, value, mask, **options)
        scaling, dropout = options.pop("scaling", None), options.pop("dropout", 0.0)
        key, value, mask, is_causal = visible_tokens(module, query, key, value, mask, self.implementation, **options)
        B, m = len(query), self.key.shape[1]
        if is_causal:
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device).tril()
        if mask is not None:
            mask = F.pad(mask, (m, 0), value=True if mask.dtype == torch.bool else 0.0)
        key, value = (
            torch.cat([prefix.to(x.dtype).expand(B, -1, -1, -1), x], dim=2)
            for prefix, x in ((self.key, key), (self.value, value))
        )
        grouped = key.shape[1] != query.shape[1]
        out = F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scaling, enable_gqa=grouped)
        return out.transpose(1, 2).contiguous()

    @torch.no_grad()
    def start_from(self, key: Tensor, value: Tensor, counts: Tensor) -> None:
        """Keys and values of m real tokens, spread over a batch; some twice where it has fewer."""
        for own, x in ((self.key, key), (self.value, value)):
            real = x.transpose(1, 2)[counts].transpose(0, 1)  # [H_kv, N, d]
            places = torch.linspace(0, real.shape[1] - 1, own.shape[1], device=x.device).long()
            own.copy_(real[:, places])


def extended_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Our entry of the attention interface."""
    return getattr(module, CHILD).attend(module, query, key, value, attention_mask, **options), None


AttentionInterface.register(ROUTE, extended_forward)


def extend(model: nn.Module, make: Callable[[Geometry], Extension]) -> nn.Module:
    """Freeze the model and hang a new extension on each of its attention modules; a classifier's head still trains."""
    model.requires_grad_(False)
    if isinstance(head := getattr(model, "head", None), nn.Module):
        head.requires_grad_(True)
    for name, module in [(n, m) for n, m in model.named_modules() if n and routes(m)]:
        extension = make(geometry_of(module, name)).to(next(module.parameters()).device)
        extension.implementation = module.config._attn_implementation
        lookup = lookup_of(type(module))
        assert lookup is not None
        extension.lookup = lookup
        routed = copy.copy(module.config)  # the model keeps its own, and so its masks
        routed._attn_implementation_internal = ROUTE
        module.config = routed
        module.add_module(CHILD, extension)
    return model


@torch.no_grad()
def start_from_tokens(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """Start every ExactPrefix as keys and values of real tokens of a batch."""
    device = next(model.parameters()).device
    inputs = {name: x.to(device) for name, x in batch.items() if name != "labels"}
    prefixes = [module for module in model.modules() if isinstance(module, ExactPrefix)]
    for prefix in prefixes:
        prefix.start_mask = start_mask(model, inputs)
    with evaluating(model):
        model(**inputs)
    for prefix in prefixes:
        prefix.start_mask = None


def start_mask(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Which tokens are real: [B, L]."""
    if "attention_mask" in inputs:
        return inputs["attention_mask"].bool()
    config: Any = model.config
    length = 1 + (config.image_size // config.patch_size) ** 2
    return torch.ones(len(inputs["pixel_values"]), length, dtype=torch.bool, device=inputs["pixel_values"].device)
