"""Many adapters in one batch: `generate` with a model of 1B parameters, 32 new tokens after 512, milliseconds per call.

The 32 rows take their adapters in turn, of 1 or of all 100 that are on the model, by PEFT's `adapter_names`; "active"
is the ordinary call, with one adapter active and no names. Ours copies the states of the adapters that are named into
one stack per layer, once in a call; then the kernels of one adapter run, which look up the state of each row. "ours" is
in attention alone with a full Z, "ours, blocks too" as `get_peft_model` makes it by default. LoRA (r = 16 on query and
value) is PEFT's own, which loops over the adapters of the batch in every layer. All adapters are in bfloat16, as the
model is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig, get_peft_model

from ntk_attention import NTKAttentionConfig

from .models import ATTENTION_ALONE, llama, model_sizes
from .runner import Case
from .timing import Prepared

BATCH, ADAPTERS, PROMPT, NEW = 32, 100, 512, 32


class Models(NamedTuple):
    plain: Any
    ours: Any
    blocks_too: Any
    lora: Any


def cases(device: str, tiny: bool) -> list[Case]:
    B, adapters, prompt, new = (4, 6, 16, 4) if tiny else (BATCH, ADAPTERS, PROMPT, NEW)

    def models() -> Models:
        ours = NTKAttentionConfig(init_weights=False, **ATTENTION_ALONE)
        blocks_too = NTKAttentionConfig(init_weights=False, task_type="CAUSAL_LM")
        lora = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        configs = (ours, blocks_too, lora)
        return Models(llama(device, tiny).eval(), *(with_adapters(device, tiny, c, adapters) for c in configs))

    methods = {"no adapter": lambda models: prepare(models.plain, None, B, prompt, new, device)}
    for name, shown in (("ours", "ours"), ("blocks_too", "ours, blocks too"), ("lora", "LoRA")):
        for kind, used in (("active", None), ("1 by name", 1), (f"{adapters} by name", adapters)):
            methods[f"{shown}, {kind}"] = lambda models, name=name, used=used: prepare(  # type: ignore[misc]
                getattr(models, name), used, B, prompt, new, device
            )
    sizes = {"B": B, "adapters": adapters, "prompt": prompt, "new": new, "dtype": "bfloat16"}
    return [Case(sizes | model_sizes(tiny), methods, models, "wall", 3 if tiny else 10, budget_ms=20_000)]


def with_adapters(device: str, tiny: bool, config: PeftConfig, count: int) -> Any:
    model = get_peft_model(llama(device, tiny), config, adapter_name="a0", autocast_adapter_dtype=False)
    for i in range(1, count):
        model.add_adapter(f"a{i}", config, autocast_adapter_dtype=False)
    return model.to(torch.bfloat16).eval()


def prepare(model: Any, used: int | None, B: int, prompt: int, new: int, device: str) -> Prepared:
    inputs = torch.randint(3, model.config.vocab_size, (B, prompt), device=device)
    options: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    if used is not None:
        options["adapter_names"] = [f"a{row % used}" for row in range(B)]
    mask = torch.ones_like(inputs)
    figures = {"tokens": B * new, "adapters_in_batch": min(used or 1, B)}
    return Prepared(lambda: model.generate(input_ids=inputs, attention_mask=mask, **options), figures)
