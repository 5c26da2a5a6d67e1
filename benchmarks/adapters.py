"""Many adapters in one batch: milliseconds per token of greedy decoding with a model of 1B parameters.

32 sequences of 512 cached tokens, a static cache with room for 512 more, one new token each. The rows take their
adapters in turn, of 100 on the model or of 1. Ours gathers the states of the rows once, before the first token, and a
step is the model's forward after that; LoRA (r = 16 on query and value, in bfloat16) goes through PEFT's own mixed
batches, `adapter_names`, which loop over the adapters in every layer. "one adapter, plain" is the call without names.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig, get_peft_model

from ntk_attention import NTKAttentionConfig

from .decode import filled_cache
from .models import llama, model_sizes
from .runner import Case
from .timing import Prepared

BATCH, ADAPTERS, PROMPT, CAPACITY = 32, 100, 512, 1024


class Models(NamedTuple):
    plain: Any
    ours: Any
    lora: Any


def cases(device: str, tiny: bool) -> list[Case]:
    B, adapters, prompt, capacity = (4, 6, 16, 64) if tiny else (BATCH, ADAPTERS, PROMPT, CAPACITY)
    made: list[Models] = []

    def models() -> Models:
        if not made:
            ours = NTKAttentionConfig(task_type="CAUSAL_LM", init_weights=False)
            lora = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
            plain = llama(device, tiny).eval()
            made.append(Models(plain, with_adapters(device, tiny, ours, adapters), with_adapters(device, tiny, lora, adapters)))
        return made[0]

    setup = partial(prepare, B=B, prompt=prompt, capacity=capacity, device=device)
    methods = {
        "no adapter": lambda models: setup(models.plain, used=0),
        "ours, one adapter, plain": lambda models: setup(models.ours, used=0),
        "ours, one adapter, by name": lambda models: setup(models.ours, used=1),
        f"ours, {adapters} adapters": lambda models: setup(models.ours, used=adapters),
        "LoRA, one adapter, plain": lambda models: setup(models.lora, used=0),
        "LoRA, one adapter, by name": lambda models: setup(models.lora, used=1),
        f"LoRA, {adapters} adapters": lambda models: setup(models.lora, used=adapters),
    }
    sizes = {"B": B, "adapters": adapters, "prompt": prompt, "capacity": capacity, "dtype": "bfloat16"}
    return [Case(sizes | model_sizes(tiny), methods, models, "wall", 3 if tiny else 20, budget_ms=10_000)]


def with_adapters(device: str, tiny: bool, config: PeftConfig, count: int) -> Any:
    model = get_peft_model(llama(device, tiny), config, adapter_name="0", autocast_adapter_dtype=False)
    for i in range(1, count):
        model.add_adapter(str(i), config, autocast_adapter_dtype=False)
    return model.eval()


def prepare(model: Any, used: int, B: int, prompt: int, capacity: int, device: str) -> Prepared:
    """A step with the first `used` adapters in turn, by name; with 0, as without names."""
    cache = filled_cache(model.config, B, prompt, capacity, device)
    token = torch.zeros(B, 1, dtype=torch.long, device=device)
    names = [str(row % used) for row in range(B)] if used else None
    stack = ExitStack()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if names is not None:  # what `generate` does around all of its steps
        stack.enter_context(model._enable_peft_forward_hooks(adapter_names=names))

    @torch.no_grad()
    def step() -> None:
        logits = base(input_ids=token, past_key_values=cache, use_cache=True).logits
        token.copy_(logits[:, -1:].argmax(dim=-1))

    return Prepared(step, {"adapters_used": min(used, B)}, stack.close)
