"""One training step: forward, loss, backward and AdamW on the trainable parameters, without CUDA graphs.

A model of 1B parameters with a batch of 8 x 1,024 tokens, where the GPU is what one waits for, and one of the shape of
SmolLM2-135M with 32 x 64, where it may be Python; bfloat16, attention by sdpa, no gradient checkpointing. Of the large
one every method starts from a fresh model; LoRA (query and value) and ours run twice, in turn, to show how far two runs
differ. The small ones run interleaved. Memory is all that is allocated: weights, optimizer state, and the step at its
peak.

- frozen: nothing is trained, but the gradient goes back to the output of the embedding. Every method that changes the
  first layer needs at least this.
- full: all parameters, weights and optimizer state in bfloat16.
- LoRA r=16: peft's default targets (query and value), and all linear layers.
- prefix m: peft's prefix tuning without projection.
- ours, in attention alone with a full Z; calibrated, where Z is trained in other coordinates; and, as `get_peft_model`
  makes it by default, with prefixes for the feed-forward blocks too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import Tensor

from ntk_attention import NTKAttentionConfig, calibrate

from .models import ATTENTION_ALONE, SMOL, TINY, llama, model_sizes, shaped
from .runner import Case
from .timing import Prepared

BATCH, LENGTH = 8, 1024
SMALL_BATCH, SMALL_LENGTH = 32, 64
SMALL_METHODS = ("frozen", "LoRA q,v", "ours", "LoRA all linear", "ours calibrated", "ours, blocks too")
CALIBRATION_TOKENS = 256
PREFIXES = (100, 4096)
LORA, OURS = "LoRA q,v", "ours"


def cases(device: str, tiny: bool) -> list[Case]:
    B, L, prefixes = (2, 16, (4, 32)) if tiny else (BATCH, LENGTH, PREFIXES)
    methods: dict[str, Callable[..., Prepared]] = {
        "frozen": frozen,
        LORA: partial(adapted, config=LoraConfig(r=16, task_type="CAUSAL_LM")),
        OURS: partial(adapted, config=NTKAttentionConfig(**ATTENTION_ALONE)),
        "LoRA all linear": partial(
            adapted, config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
        ),
        "ours calibrated": calibrated,
        "ours, blocks too": partial(adapted, config=NTKAttentionConfig(task_type="CAUSAL_LM")),
        "full": full,
    }
    for m in prefixes:
        config = PrefixTuningConfig(num_virtual_tokens=m, task_type="CAUSAL_LM")
        methods[f"prefix m={m}"] = partial(adapted, config=config)
    runs = [(name, 1) for name in methods] + ([] if tiny else [(LORA, 2), (OURS, 2)])
    order = sorted(runs, key=lambda run: (list(methods).index(run[0]) > 2, run[1]))

    def case(name: str, run: int) -> Case:
        sizes = {"B": B, "L": L, "run": run, "dtype": "bfloat16", **model_sizes(tiny)}

        def setup(ids: Tensor) -> Prepared:
            return methods[name](llama(device, tiny).train(), ids)

        shared = partial(torch.randint, model_sizes(tiny)["vocab_size"], (B, L), device=device)
        return Case(sizes, {name: setup}, shared, "wall", repetitions=2 if tiny else 10, budget_ms=5000)

    small = {name: partial(small_step, methods[name], TINY if tiny else SMOL, device) for name in SMALL_METHODS}
    B, L = (2, 8) if tiny else (SMALL_BATCH, SMALL_LENGTH)
    sizes = {"B": B, "L": L, "run": 1, "dtype": "bfloat16", **(TINY if tiny else SMOL)}
    shared = partial(torch.randint, sizes["vocab_size"], (B, L), device=device)
    together = Case(sizes, small, shared, "wall", repetitions=2 if tiny else 25, budget_ms=5000)
    return [together, *(case(*run) for run in order)]


def small_step(method: Callable[..., Prepared], sizes: dict[str, Any], device: str, ids: Tensor) -> Prepared:
    return method(shaped(sizes, device, torch.bfloat16).train(), ids)


def frozen(model: Any, ids: Tensor) -> Prepared:
    model.requires_grad_(False)

    def step() -> None:
        embedded = model.get_input_embeddings()(ids).requires_grad_()
        model(inputs_embeds=embedded, labels=ids).loss.backward()

    return Prepared(step, {"trainable_parameters": 0})


def adapted(model: Any, ids: Tensor, config: Any) -> Prepared:
    model = get_peft_model(model, config)
    return train(model, ids)


def calibrated(model: Any, ids: Tensor) -> Prepared:
    model = get_peft_model(model, NTKAttentionConfig(**ATTENTION_ALONE))
    calibrate(model, [{"input_ids": ids[:1, :CALIBRATION_TOKENS]}])
    return train(model, ids)


def full(model: Any, ids: Tensor) -> Prepared:
    return train(model, ids)


def train(model: Any, ids: Tensor) -> Prepared:
    parameters = trainable(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Prepared(step, {"trainable_parameters": sum(p.numel() for p in parameters)})


def trainable(parameters: Iterable[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    return [p for p in parameters if p.requires_grad]
