"""One causal attention in bfloat16: ours against plain attention, prefixes of real tokens and other formulas.

Methods, forward without gradients, or forward and backward with gradients to queries, keys, values and to what stands
for the prefix:

- plain cudnn, flash, efficient: scaled_dot_product_attention without a prefix, each kernel of torch forced;
- ours auto, sdpa, triton: `ntk_attention` by backend, elu features with the constant one (r = d + 1), Z in float32,
  positions free: the rotary positions of all numbers of the queries are undone before phi;
- ours rotary: the same as auto with phi of the queries as they are;
- ours random: 256 positive random features, positions free;
- prefix-cat, prefix-merge: m real prefix tokens, in two ways (see prefix.py);
- naive fp32: the published formula written out, scores and all, r = d;
- softmax + phi M: plain attention plus phi(q) M, the form of PrefixMemory-Tuning, M in bfloat16.

The naive formula, the slower backends and all but the shortest prefix run with 32 KV heads of size 128 only; the naive
formula and the longest prefix by themselves, all others interleaved. "ceiling" rows measure what this GPU can do at
best: a large copy and a large bfloat16 product. With the operations and bytes that an attention cannot do without
(`bounds`), the report derives a floor. Memory is that of the call: what it allocates at its peak, above its inputs.

On a CPU the same runs in float32 with small shapes, which tests the code and measures nothing of interest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from ntk_attention import FeatureMap, PrefixState, feature_map, ntk_attention
from ntk_attention.ops.rotation import Rotation

from .prefix import prefix_cat, prefix_merge
from .runner import Case
from .timing import Prepared

MODES = ("forward", "forward+backward")
SHAPES = ((64, 256), (16, 1024), (4, 4096), (1, 16384))  # B, L
HEADS = ((128, 32), (64, 32), (128, 8), (64, 8))  # d, H_kv
PREFIXES = (16, 256, 4096, 65536)
HEAVY_REPETITIONS = 6
KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass
class Inputs:
    query: Tensor  # [B, H, L, d]
    key: Tensor  # [B, H_kv, L, d]
    value: Tensor
    grad_out: Tensor | None  # None: forward only


Maker = Callable[[Inputs], tuple[Callable[[], Tensor], Sequence[Tensor]]]  # the forward pass, and what gets gradients


def cases(device: str, tiny: bool) -> list[Case]:
    shapes, heads, H, prefixes = (((2, 16),), ((16, 4), (16, 2)), 4, (4, 64)) if tiny else (SHAPES, HEADS, 32, PREFIXES)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    out = [ceilings(device, dtype, tiny)]
    for d, H_kv in heads:
        everything = (d, H_kv) == heads[0]
        for B, L in shapes:
            for mode in MODES:
                sizes = {"B": B, "L": L, "H": H, "H_kv": H_kv, "d": d, "dtype": str(dtype).split(".")[1], "mode": mode}
                shared = partial(make_inputs, sizes, device, {"bounds": lower_bounds(sizes)})
                out.append(Case(sizes, light_methods(device, prefixes, everything), shared))
                if everything:
                    heavy = heavy_methods(prefixes[-1])
                    out += [Case(sizes, {name: heavy[name]}, shared, repetitions=HEAVY_REPETITIONS) for name in heavy]
    return out


def ceilings(device: str, dtype: torch.dtype, tiny: bool) -> Case:
    size, n = (2**20, 128) if tiny else (2**30, 8192) if device == "cuda" else (2**26, 2048)

    def copy(_: Any) -> Prepared:
        source = torch.zeros(size, dtype=torch.uint8, device=device)
        return Prepared(partial(torch.empty_like(source).copy_, source), {"bytes": 2 * size})

    def matmul(_: Any) -> Prepared:
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        return Prepared(partial(torch.mm, a, b), {"flops": 2 * n**3})

    sizes = {"copy_bytes": size, "matmul_size": n, "dtype": str(dtype).split(".")[1]}
    return Case(sizes, {"ceiling copy": copy, "ceiling matmul": matmul}, lambda: None)


def make_inputs(sizes: dict[str, Any], device: str, figures: dict[str, Any]) -> tuple[Inputs, dict[str, Any]]:
    B, L, H, H_kv, d = (sizes[name] for name in ("B", "L", "H", "H_kv", "d"))
    random = partial(torch.randn, device=device, dtype=getattr(torch, sizes["dtype"]))
    query, key, value = (random(B, h, L, d).requires_grad_() for h in (H, H_kv, H_kv))
    grad_out = None if sizes["mode"] == "forward" else random(B, H, L, d)
    return Inputs(query, key, value, grad_out), figures


def light_methods(device: str, prefixes: Sequence[int], everything: bool) -> dict[str, Callable[[Any], Prepared]]:
    kernels = ("cudnn", "flash", "efficient") if device == "cuda" else ("flash",)
    backends = ("auto", "triton", "sdpa") if device == "cuda" else ("auto",)
    if not everything:  # without the slowest
        kernels, backends, prefixes = kernels[:2], backends[:2], prefixes[:2]
    makers: dict[str, Maker] = {f"plain {name}": partial(plain, kernel=KERNELS[name]) for name in kernels}
    makers |= {f"ours {backend}": partial(ours, backend=backend) for backend in backends}
    makers["ours rotary"] = partial(ours, is_free=False)
    if everything:
        makers["ours random"] = partial(ours, phi=feature_map("positive_random", num_features=256))
    makers["softmax + phi M"] = prefix_memory
    for m in prefixes[:-1]:
        makers |= both_ways(m)
    return {name: partial(prepare, maker) for name, maker in makers.items()}


def heavy_methods(m: int) -> dict[str, Callable[[Any], Prepared]]:
    """Those that fill the memory: each runs by itself, for others would wait for the allocator beside it."""
    makers = {**both_ways(m), "naive fp32": naive}
    return {name: partial(prepare, maker) for name, maker in makers.items()}


def both_ways(m: int) -> dict[str, Maker]:
    return {f"prefix-{way} m={m}": partial(prefix, m=m, way=way) for way in ("cat", "merge")}


def prepare(maker: Maker, shared: tuple[Inputs, dict[str, Any]]) -> Prepared:
    """Forward without gradients, or forward and backward to the leaves."""
    inputs, figures = shared
    forward, leaves = maker(inputs)
    if inputs.grad_out is None:
        return Prepared(torch.no_grad()(forward), figures)
    return Prepared(lambda: torch.autograd.grad(forward(), leaves, inputs.grad_out), figures)


def plain(x: Inputs, kernel: SDPBackend):
    enable_gqa = x.query.shape[1] != x.key.shape[1]

    def forward() -> Tensor:
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(x.query, x.key, x.value, is_causal=True, enable_gqa=enable_gqa)

    return forward, (x.query, x.key, x.value)


def ours(x: Inputs, backend: str = "auto", phi: FeatureMap | None = None, is_free: bool = True):
    state = random_state(feature_map("elu", constant=True) if phi is None else phi, x.query)
    options = {"rotation": rotation_of(x.query) if is_free else None, "backend": backend}
    forward = partial(ntk_attention, x.query, x.key, x.value, state, is_causal=True, enable_gqa=True, **options)
    return forward, (x.query, x.key, x.value, state.Z, state.k)


def rotation_of(query: Tensor) -> Rotation:
    """That of a Llama at the positions from 0 on, as all layers of a model share it."""
    *_, L, d = query.shape
    frequencies = 10_000 ** -(torch.arange(d // 2, device=query.device) / (d // 2))
    angles = torch.arange(L, device=query.device)[None, :, None] * frequencies
    return Rotation.of(angles.cos().to(query.dtype), angles.sin().to(query.dtype))


def random_state(phi: FeatureMap, query: Tensor) -> PrefixState:
    """The prefix weighs about as much as a few tokens."""
    _, H, _, d = query.shape
    r = phi.num_features(d)
    Z = torch.randn(H, r, d, device=query.device) / r
    k = torch.empty(H, r, device=query.device).uniform_(0.1 / r, 1 / r)
    log_scale = torch.empty(H, device=query.device).normal_(1.0, 0.1)
    return PrefixState(Z.requires_grad_(), k.requires_grad_(), log_scale, phi.bind(d).to(query.device))


def prefix(x: Inputs, m: int, way: str):
    _, H_kv, L, d = x.key.shape
    random = partial(torch.randn, 1, H_kv, m, d, device=x.key.device, dtype=x.key.dtype)
    keys, values = random().requires_grad_(), random().requires_grad_()
    leaves = (x.query, x.key, x.value, keys, values)
    if way == "cat":
        return partial(prefix_cat, *leaves, causal_lower_right(L, m + L)), leaves
    return partial(prefix_merge, *leaves), leaves


def naive(x: Inputs):
    """(A V + phi(Q) Z) / (A 1 + phi(Q) k) as it stands, in float32, with no maximum taken."""
    _, H, L, d = x.query.shape
    scale = d**-0.5
    Z = (torch.randn(H, d, d, device=x.query.device) / d).requires_grad_()
    k = torch.full((H, d), 1 / d, device=x.query.device).requires_grad_()

    def forward() -> Tensor:
        query, key, value = x.query.float(), x.key.float(), x.value.float()
        causal = torch.ones(L, L, dtype=torch.bool, device=query.device).tril()
        A = torch.exp(scale * query @ key.transpose(-1, -2)).masked_fill(~causal, 0.0)
        phi = F.elu(scale**0.5 * query) + 1
        out = (A @ value + phi @ Z) / (A.sum(dim=-1, keepdim=True) + phi @ k[..., None])
        return out.to(x.query.dtype)

    return forward, (x.query, x.key, x.value, Z, k)


def prefix_memory(x: Inputs):
    _, H, _, d = x.query.shape
    M = torch.randn(H, d, d, device=x.query.device, dtype=x.query.dtype).requires_grad_()
    enable_gqa = x.key.shape[1] != H

    def forward() -> Tensor:
        context = F.scaled_dot_product_attention(x.query, x.key, x.value, is_causal=True, enable_gqa=enable_gqa)
        return context + (F.elu(x.query) + 1) @ M

    return forward, (x.query, x.key, x.value, M)


def lower_bounds(sizes: dict[str, Any]) -> dict[str, dict[str, list[int]]]:
    """Operations and bytes, for each pass of the mode, that plain attention and ours cannot do without.

    The backward pass of attention has 5 products where the forward pass has 2 (it makes the scores again), that of
    phi(q) Z has 2 where the forward pass has 1. Every tensor is read or written once in each pass.
    """
    B, L, H, H_kv, d = (sizes[name] for name in ("B", "L", "H", "H_kv", "d"))
    r = d + 1
    element = getattr(torch, sizes["dtype"]).itemsize
    scores = 2 * B * H * d * L * (L + 1) // 2  # of one product, the causal half of it
    features = 2 * B * H * L * r * (d + 1)
    queries, keys, lse, state = element * B * H * L * d, element * B * H_kv * L * d, 4 * B * H * L, 4 * H * r * (d + 1)
    bytes_moved = [2 * queries + 2 * keys + lse, 4 * queries + 4 * keys + lse]
    passes = 1 if sizes["mode"] == "forward" else 2
    return {
        "plain": {"flops": [2 * scores, 5 * scores][:passes], "bytes": bytes_moved[:passes]},
        "ours": {
            "flops": [2 * scores + features, 5 * scores + 2 * features][:passes],
            "bytes": [bytes_moved[0] + state, bytes_moved[1] + 2 * state][:passes],
        },
    }
