"""Greedy decoding with a model of 1B parameters: milliseconds per token.

A step is one forward pass of `transformers` for one new token of each sequence, and the choice of the next; the static
cache (512 tokens of a prompt, here random numbers, and room for 512 more) is written in place, so that each step goes
on where the last one ended. Methods: no prefix; ours, with a random state in every layer, called as a user calls it, in
attention alone with a full Z, and with prefixes for the feed-forward blocks too; prefixes of m real tokens, which lie
in a cache that is longer by m. "graph" replays a CUDA graph of the step, "eager"
calls the model. Without ours, attention is what transformers makes of "sdpa" (5.17 repeats the KV heads in each step,
5.23 does not; ours never does); "no prefix, grouped" is torch's attention, told of the groups. A static cache has its
full length from the start, and attention reads all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from peft import get_peft_model
from transformers import StaticCache

from ntk_attention import NTKAttentionConfig

from .models import ATTENTION_ALONE, llama, model_sizes
from .runner import Case
from .timing import Prepared, captured

BATCHES = (1, 32)
PROMPT, CAPACITY = 512, 1024
PREFIXES = (256, 4096, 65536)


class Models(NamedTuple):
    plain: Any
    grouped: Any
    ours: Any
    blocks_too: Any


def cases(device: str, tiny: bool) -> list[Case]:
    batches, prompt, capacity, prefixes = ((2,), 16, 64, (8, 32)) if tiny else (BATCHES, PROMPT, CAPACITY, PREFIXES)
    made: list[Models] = []  # one set for all cases

    def models() -> Models:
        if not made:
            ours, blocks_too = (
                get_peft_model(llama(device, tiny), NTKAttentionConfig(init_weights=False, **options))
                for options in (ATTENTION_ALONE, {"task_type": "CAUSAL_LM"})
            )
            grouped = llama(device, tiny, attention="grouped")
            made.append(Models(*(m.eval() for m in (llama(device, tiny), grouped, ours, blocks_too))))
        return made[0]

    def case(B: int, launch: str) -> Case:
        sizes = {"B": B, "prompt": prompt, "capacity": capacity, "launch": launch, "dtype": "bfloat16"}
        setup = partial(prepare, B=B, prompt=prompt, capacity=capacity, device=device, graph=launch == "graph")
        methods: dict[str, Callable[[Any], Prepared]] = {
            "no prefix": lambda models: setup(models.plain, m=0),
            "no prefix, grouped": lambda models: setup(models.grouped, m=0),
            "ours": lambda models: setup(models.ours, m=0),
            "ours, blocks too": lambda models: setup(models.blocks_too, m=0),
        }
        for m in prefixes:
            methods[f"prefix m={m}"] = lambda models, m=m: setup(models.plain, m=m)  # type: ignore[misc]
        repetitions = 3 if tiny else 60 if launch == "graph" else 20
        clock: Any = "gpu" if launch == "graph" else "wall"
        return Case(sizes | model_sizes(tiny), methods, models, clock, repetitions, budget_ms=5000)

    launches = ("graph", "eager") if device == "cuda" else ("eager",)
    return [case(B, launch) for B in batches for launch in launches]


def prepare(model: Any, m: int, B: int, prompt: int, capacity: int, device: str, graph: bool) -> Prepared:
    cache = filled_cache(model.config, B, prompt + m, capacity + m, device)
    token = torch.zeros(B, 1, dtype=torch.long, device=device)

    @torch.no_grad()
    def step() -> None:
        logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
        token.copy_(logits[:, -1:].argmax(dim=-1))

    layer = cache.layers[0]
    cache_bytes = 2 * len(cache.layers) * layer.keys.numel() * layer.keys.element_size()
    return Prepared(captured(step, device) if graph else step, {"m": m, "cache_bytes": cache_bytes})


def filled_cache(config: Any, B: int, length: int, capacity: int, device: str) -> StaticCache:
    """A static cache that holds `length` random tokens."""
    cache = StaticCache(config=config, max_cache_len=capacity)
    cache.early_initialization(B, config.num_key_value_heads, config.head_dim, torch.bfloat16, torch.device(device))
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(length)
    return cache
