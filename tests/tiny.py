"""A tiny adapted Llama and what tests ask of it."""

import torch
from peft import get_peft_model

from ntk_attention import NTKAttentionConfig
from ntk_attention.layer import NTKAttentionLayer

from .families import FAMILIES

TINY = FAMILIES["llama"]
INPUTS = TINY.inputs(torch.float32)


def tiny(dtype=torch.float32):
    return TINY.build(dtype=dtype)


def adapted(base=None, adapter_name="default", **options):
    base = tiny() if base is None else base
    config = NTKAttentionConfig(**{"init_weights": False, "task_type": "CAUSAL_LM", **options})
    torch.manual_seed(2)
    return get_peft_model(base, config, adapter_name=adapter_name).eval()


@torch.no_grad()
def logits(model, inputs=INPUTS):
    return TINY.run(model, inputs)


def adapters(model, name="default"):
    return [layer[name] for layer in model.modules() if isinstance(layer, NTKAttentionLayer)]


def loss_of(model, inputs=INPUTS):
    return model(**inputs, labels=inputs["input_ids"]).loss


def losses_of_training(model, steps, learning_rate):
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=learning_rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
