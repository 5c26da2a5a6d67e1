"""Figure 3 of the paper: run time of one layer against its number of trainable parameters.

From the paper: one layer, random inputs, L in {32, 64, 128, 256}, d = 32, m in {2^0, ..., 2^16}, parameters on the
x-axis and run time on the y-axis; prefix attention is softmax(Q [P; X] W_K ...) with P [m, d] (Algorithm 1), ours has
Z [r, d] and k [r] with r = d (Algorithm 2); neither is causal.

Ours, since the paper does not say (or we do not know): one head, batch 1, float32, the forward pass without gradients,
an output projection, the fused attention kernels of torch for both methods, and the hardware. A GPU runs each layer
as a CUDA graph: at these sizes, launches would hide everything else. "prefix-kv" is what prefix tuning does in
practice: m trainable key rows and value rows, so 2 m d parameters and no projection of the prefix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ntk_attention import PrefixState, ntk_attention

from .runner import Case
from .timing import Prepared, captured

d = 32
LENGTHS = (32, 64, 128, 256)
PREFIXES = tuple(2**i for i in range(17))


@dataclass
class Layer:
    """Input x [L, d] and the frozen projections, each [d, d]."""

    x: Tensor
    W_Q: Tensor
    W_K: Tensor
    W_V: Tensor
    W_O: Tensor

    def query_key_value(self) -> tuple[Tensor, ...]:
        return tuple(heads(self.x @ W) for W in (self.W_Q, self.W_K, self.W_V))


def cases(device: str, tiny: bool) -> list[Case]:
    lengths, prefixes = ((32, 64), (1, 64, 4096)) if tiny else (LENGTHS, PREFIXES)
    methods: dict[str, Callable[[Any], Prepared]] = {"ours": partial(prepare, ntk_layer, device, 0)}
    for m in prefixes:
        methods[f"prefix m={m}"] = partial(prepare, prefix_layer, device, m)
        methods[f"prefix-kv m={m}"] = partial(prepare, prefix_kv_layer, device, m)
    return [
        Case(
            {"L": L, "d": d, "B": 1, "H": 1, "dtype": "float32"}, methods, partial(make_layer, L, device), budget_ms=300
        )
        for L in lengths
    ]


def make_layer(L: int, device: str) -> Layer:
    return Layer(torch.randn(L, d, device=device), *(d**-0.5 * torch.randn(4, d, d, device=device)))


def prepare(make: Callable, device: str, m: int, layer: Layer) -> Prepared:
    forward, trainable = make(layer, m)
    parameters = sum(x.numel() for x in trainable)
    return Prepared(captured(torch.no_grad()(forward), device), {"parameters": parameters, "m": m})


def ntk_layer(layer: Layer, m: int):
    r = d
    # elu features, the published ones
    state = PrefixState(torch.randn_like(layer.W_V)[None], torch.full_like(layer.x[:1], 1 / r))

    def forward() -> Tensor:
        query, key, value = layer.query_key_value()
        return ntk_attention(query, key, value, state).squeeze() @ layer.W_O

    return forward, (state.Z, state.k)


def prefix_layer(layer: Layer, m: int):
    P = torch.randn(m, d, device=layer.x.device)

    def forward() -> Tensor:
        S = torch.cat([P, layer.x])
        query, key, value = heads(layer.x @ layer.W_Q), heads(S @ layer.W_K), heads(S @ layer.W_V)
        return F.scaled_dot_product_attention(query, key, value).squeeze() @ layer.W_O

    return forward, (P,)


def prefix_kv_layer(layer: Layer, m: int):
    keys, values = (heads(torch.randn(m, d, device=layer.x.device)) for _ in range(2))

    def forward() -> Tensor:
        query, key, value = layer.query_key_value()
        key, value = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
        return F.scaled_dot_product_attention(query, key, value).squeeze() @ layer.W_O

    return forward, (keys, values)


def heads(x: Tensor) -> Tensor:
    """[L, d] -> [B, H, L, d] with B = H = 1"""
    return x[None, None]
