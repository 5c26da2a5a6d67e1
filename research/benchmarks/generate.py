"""`generate` as users call it: milliseconds per call of a model of 1B parameters, 128 new tokens after 512.

"dynamic" is the ordinary call, in which the GPU waits for Python. "static" is `cache_implementation="static"`, with
which transformers compiles the step of a new token into a CUDA graph (on a GPU; the call that does so is not timed).
"ours" is in attention alone with a full Z, "ours, blocks too" as `get_peft_model` makes it by default. LoRA (r = 16) is
PEFT's own, not merged. All adapters are in bfloat16, as the model is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model

from ntk_attention import NTKAttentionConfig

from .models import ATTENTION_ALONE, llama, model_sizes
from .runner import Case
from .timing import Prepared

BATCHES, PROMPT, NEW = (1, 32), 512, 128
LORA: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 16, "init_lora_weights": False}
CONFIGS: dict[str, PeftConfig] = {
    "ours": NTKAttentionConfig(init_weights=False, **ATTENTION_ALONE),
    "ours, blocks too": NTKAttentionConfig(init_weights=False, task_type="CAUSAL_LM"),
    "LoRA q,v": LoraConfig(target_modules=["q_proj", "v_proj"], **LORA),
    "LoRA all linear": LoraConfig(target_modules="all-linear", **LORA),
}


def cases(device: str, tiny: bool) -> list[Case]:
    batches, prompt, new = ((2,), 16, 4) if tiny else (BATCHES, PROMPT, NEW)
    made: dict[str, Any] = {}  # one set for all cases

    def models() -> dict[str, Any]:
        if not made:
            made["no adapter"] = llama(device, tiny).eval()
            for name, config in CONFIGS.items():
                model = get_peft_model(llama(device, tiny), config, autocast_adapter_dtype=False)
                made[name] = model.to(torch.bfloat16).eval()
        return made

    def case(B: int, cache: str) -> Case:
        sizes = {"B": B, "prompt": prompt, "new": new, "cache": cache, "dtype": "bfloat16"} | model_sizes(tiny)
        methods: dict[str, Callable[[Any], Prepared]] = {
            name: partial(prepare, name=name, B=B, prompt=prompt, new=new, cache=cache, device=device)
            for name in ("no adapter", *CONFIGS)
        }
        return Case(sizes, methods, models, "wall", 3 if tiny else 10, budget_ms=10_000)

    return [case(B, cache) for B in batches for cache in ("dynamic", "static")]


def prepare(models: dict[str, Any], *, name: str, B: int, prompt: int, new: int, cache: str, device: str) -> Prepared:
    model = models[name]
    inputs = torch.randint(3, model.config.vocab_size, (B, prompt), device=device)
    options: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    if cache == "static":
        options["cache_implementation"] = "static"
    mask = torch.ones_like(inputs)
    return Prepared(lambda: model.generate(input_ids=inputs, attention_mask=mask, **options), {"tokens": B * new})
