"""One training step of ours on a frozen model of 1B parameters, by how that model is held and run.

The model, batch and optimizer of the benchmark `training`; the adapter is not calibrated. Every method starts from a
fresh model. Memory is all that is allocated: weights and optimizer state, and the step at its peak.

- checkpointing: transformers' activation checkpointing, not reentrant.
- offloaded: accelerate keeps all weights of the model on the CPU, and brings those of a layer when it runs.
- FlexAttention: the base model's attention, whose mask ours reads; on a GPU.
- torch.compile: the whole model in one graph, by the inductor (at tiny sizes without it).
- 8 and 4 bits: weights quantised by bitsandbytes or torchao, where these are installed; what is computed is bfloat16.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import cpu_offload
from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ntk_attention import NTKAttentionConfig

from .models import ATTENTION_ALONE, llama, model_sizes
from .runner import Case
from .timing import Prepared
from .training import BATCH, LENGTH, train

PLAIN = "bf16"


def cases(device: str, tiny: bool) -> list[Case]:
    B, L = (2, 16) if tiny else (BATCH, LENGTH)
    backend = "aot_eager" if tiny else "inductor"
    plain = partial(llama, device, tiny)
    methods: dict[str, Callable[[Tensor], Prepared]] = {
        PLAIN: partial(prepare, plain),
        "bf16, checkpointing": partial(prepare, plain, checkpointing=True),
        "bf16, torch.compile": partial(prepare, plain, backend=backend),
        "bf16, checkpointing, torch.compile": partial(prepare, plain, checkpointing=True, backend=backend),
        "bf16, offloaded, checkpointing": partial(prepare, partial(offloaded, device, tiny), checkpointing=True),
    }
    if device == "cuda":
        methods["bf16, FlexAttention"] = partial(prepare, partial(plain, attention="flex_attention"))
    for name, config in quantisations().items():
        make = partial(quantised, device, tiny, config)
        methods[name] = partial(prepare, make)
        methods[f"{name}, checkpointing"] = partial(prepare, make, checkpointing=True)
    sizes = {"B": B, "L": L, "dtype": "bfloat16", **model_sizes(tiny)}
    ids = partial(torch.randint, model_sizes(tiny)["vocab_size"], (B, L), device=device)
    return [
        Case(sizes, {name: setup}, ids, "wall", repetitions=2 if tiny else 10, budget_ms=5000)
        for name, setup in methods.items()
    ]


def quantisations() -> dict[str, Any]:
    """Those whose libraries are installed."""
    found: dict[str, Any] = {}
    if importlib.util.find_spec("bitsandbytes"):
        found["8 bit, bitsandbytes"] = BitsAndBytesConfig(load_in_8bit=True)
        found["4 bit, bitsandbytes nf4"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    if importlib.util.find_spec("torchao"):
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        found["8 bit, torchao"] = TorchAoConfig(Int8WeightOnlyConfig())
    return found


def offloaded(device: str, tiny: bool) -> Any:
    return cpu_offload(llama(device, tiny).cpu(), torch.device(device))


def quantised(device: str, tiny: bool, config: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:  # the way of a user: quantised while it is loaded
        llama(device, tiny).save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=torch.bfloat16, device_map={"": device}
        )


def prepare(make: Callable[[], Any], ids: Tensor, checkpointing: bool = False, backend: str | None = None) -> Prepared:
    base = make()
    model = get_peft_model(base, NTKAttentionConfig(**ATTENTION_ALONE)).train()
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.disable_input_require_grads()  # for the reentrant mode; no graph holds it
        base.config.use_cache = False
    return train(model if backend is None else torch.compile(model, fullgraph=True, backend=backend), ids)
