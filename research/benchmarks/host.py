"""What a call costs the host, Python and launches, beside plain attention: microseconds of calls with small tensors.

The tensors are so small that the device never is what one waits for. Every method runs many times in a loop between two
looks at the host's clock, synchronised before and after; a row holds the times of several loops and the calls in one.

- "plain" and "ours": `scaled_dot_product_attention` and `ntk_attention`, causal; "decode" is one query over a short
  cache. "ours, one thread" runs the backward pass in the calling thread. In rows with B = 64 the device has work to do:
  what a user without CUDA graphs waits for.
- "layer": one decoder layer of a Llama, in a decoding step over a short cache, as `generate` calls it, and in training,
  with gradients to its input and to what trains. "plain layer" is frozen; "ours layer" has an adapter of attention
  alone with a full Z, "ours layer, default" as `get_peft_model` makes it, and LoRA (r = 16) is PEFT's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F

from ntk_attention import NTKAttentionConfig, feature_map, ntk_attention

from .attention import MODES, Inputs, prepare, random_state, rotation_of
from .models import ATTENTION_ALONE, shaped
from .runner import Case
from .timing import Prepared

H, CACHE = 32, 128
SMALL, LARGE = (1, 128), (64, 256)  # B, L
LAYER = {
    "hidden_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 256,
    "vocab_size": 128,
}
CONFIGS: dict[str, PeftConfig | None] = {
    "plain layer": None,
    "ours layer": NTKAttentionConfig(init_weights=False, **ATTENTION_ALONE),
    "ours layer, default": NTKAttentionConfig(init_weights=False, task_type="CAUSAL_LM"),
    "LoRA q,v layer": LoraConfig(r=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
}


def cases(device: str, tiny: bool) -> list[Case]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shapes = [SMALL] if tiny else [SMALL, LARGE]
    heads = ((16, 4, 2), (16, 4, 4)) if tiny else ((64, H, 8), (64, H, H), (128, H, 8), (128, H, H))  # d, H, H_kv
    out = []
    for B, L in shapes:
        for d, num_heads, H_kv in heads:
            for mode in MODES if (B, L) == LARGE else (*MODES, "decode"):
                if (B, L) == LARGE and H_kv != num_heads:
                    continue
                sizes: dict[str, Any] = {"B": B, "L": L, "H": num_heads, "H_kv": H_kv, "d": d, "mode": mode}
                calls = 2 if tiny else 20 if (B, L) == LARGE else 100
                methods = {name: partial(operation, maker, calls=calls) for name, maker in MAKERS.items()}
                if mode == "forward+backward":
                    methods[ONE_THREAD] = partial(in_one_thread, ours, calls=calls)
                out.append(case(sizes, methods, partial(make_inputs, sizes, dtype, device), dtype, tiny))
    for mode in ("layer decode", "layer training"):
        sizes = {"B": 1, "L": SMALL[1], "mode": mode, **LAYER}
        run = partial(decode_layer if mode == "layer decode" else train_layer, calls=2 if tiny else 100)
        methods = {name: partial(in_layer, run, config, dtype, device) for name, config in CONFIGS.items()}
        out.append(case(sizes, methods, lambda: None, dtype, tiny))
    return out


def case(
    sizes: dict[str, Any], methods: dict[str, Any], shared: Callable[[], Any], dtype: torch.dtype, tiny: bool
) -> Case:
    sizes = sizes | {"dtype": str(dtype).split(".")[1]}
    return Case(sizes, methods, shared, "wall", repetitions=2 if tiny else 15, budget_ms=5000)


def looped(run: Callable[[], Any], calls: int) -> Prepared:
    """Many calls, one after another; the report divides by their number."""

    def loop() -> None:
        for _ in range(calls):
            run()

    return Prepared(loop, {"calls": calls})


def make_inputs(sizes: dict[str, Any], dtype: torch.dtype, device: str) -> Inputs:
    B, L, heads, H_kv, d, mode = (sizes[name] for name in ("B", "L", "H", "H_kv", "d", "mode"))
    random = partial(torch.randn, device=device, dtype=dtype)
    queries, keys = (1, CACHE) if mode == "decode" else (L, L)
    query = random(B, heads, queries, d).requires_grad_()
    key, value = (random(B, H_kv, keys, d).requires_grad_() for _ in range(2))
    return Inputs(query, key, value, random(B, heads, L, d) if mode == "forward+backward" else None)


def plain(x: Inputs):
    options = {"is_causal": x.query.shape[2] > 1, "enable_gqa": x.query.shape[1] != x.key.shape[1]}
    return partial(F.scaled_dot_product_attention, x.query, x.key, x.value, **options), (x.query, x.key, x.value)


def ours(x: Inputs):
    state = random_state(feature_map("elu", constant=True), x.query)
    options = {"is_causal": x.query.shape[2] > 1, "enable_gqa": True, "rotation": rotation_of(x.query)}
    leaves = (x.query, x.key, x.value, state.Z, state.k)
    return partial(ntk_attention, x.query, x.key, x.value, state, **options), leaves


MAKERS = {"plain": plain, "ours": ours}
ONE_THREAD = "ours, one thread"


def operation(maker: Any, inputs: Inputs, calls: int) -> Prepared:
    return looped(prepare(maker, (inputs, {})).run, calls)


def in_one_thread(maker: Any, inputs: Inputs, calls: int) -> Prepared:
    """The backward pass in the calling thread."""
    loop = operation(maker, inputs, calls)

    def run() -> None:
        with torch.autograd.set_multithreading_enabled(False):
            loop.run()

    return loop._replace(run=run)


def in_layer(
    run: Callable[..., Prepared], config: PeftConfig | None, dtype: torch.dtype, device: str, _: Any
) -> Prepared:
    model = shaped(LAYER, device, dtype)
    base = model.requires_grad_(False)
    if config is not None:
        model = get_peft_model(model, config)
        base = model.get_base_model()
    hidden = torch.randn(1, SMALL[1], LAYER["hidden_size"], device=device, dtype=dtype)
    return run(model, base.model, hidden)


def decode_layer(model: Any, base: Any, hidden: Tensor, calls: int) -> Prepared:
    """One new token, whose key and value are not kept."""
    model.eval()
    layer, token = base.layers[0], hidden[:, -1:]
    shape = (1, LAYER["num_key_value_heads"], CACHE, LAYER["head_dim"])
    cache = FixedCache(*(torch.randn(shape, device=hidden.device, dtype=hidden.dtype) for _ in range(2)))
    names = inspect.signature(type(layer).forward).parameters  # transformers 5.24 has a new name for it
    options: dict[str, Any] = {"cache" if "cache" in names else "past_key_values": cache}
    options["position_embeddings"] = base.rotary_emb(token, torch.full((1, 1), CACHE, device=hidden.device))
    enable = getattr(model, "_enable_peft_forward_hooks", nullcontext)  # PEFT's, around each call of `generate`
    loop = looped(lambda: layer(token, **options), calls)

    @torch.no_grad()
    def generate() -> None:
        with enable():
            loop.run()

    return loop._replace(run=generate)


class FixedCache:
    """A cache that always holds the same."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.tensors = keys, values

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self.tensors


def train_layer(model: Any, base: Any, hidden: Tensor, calls: int) -> Prepared:
    model.train()
    layer, grad_out = base.layers[0], torch.randn_like(hidden)
    hidden.requires_grad_()
    positions = base.rotary_emb(hidden, torch.arange(hidden.shape[1], device=hidden.device)[None])
    leaves = [hidden, *(p for p in layer.parameters() if p.requires_grad)]
    return looped(lambda: torch.autograd.grad(layer(hidden, position_embeddings=positions), leaves, grad_out), calls)
