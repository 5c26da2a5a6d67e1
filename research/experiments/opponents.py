"""What NTK-Attention is compared with: LoRA and its kin, OFT, IA3, prefixes and full fine-tuning."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft import IA3Config, LoraConfig, OFTConfig, PrefixTuningConfig, get_peft_model
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values
from torch import nn
from transformers import DynamicCache

from ntk_attention.tuner.observation import evaluating

from . import budgets
from .extensions import ExactPrefix, PrefixMemory, extend, start_from_tokens
from .method import Budget, Context, peft_options
from .tasks import Batch


def lora(
    model: nn.Module,
    context: Context,
    budget: Budget,
    pattern: Any = None,
    dora: bool = False,
    alpha: float = 2.0,
    **options: Any,
) -> nn.Module:
    """alpha: lora_alpha over the rank, the same in all modules."""
    ranks = budgets.lora_ranks(model, budget(model), pattern, magnitudes=dora)
    higher = ranks.higher
    config = LoraConfig(
        r=ranks.base,
        lora_alpha=alpha * ranks.base,
        target_modules=list(ranks.by_module),
        rank_pattern=higher,
        alpha_pattern={name: alpha * rank for name, rank in higher.items()},
        use_dora=dora,
        **options,
        **peft_options(context.task),
    )
    return get_peft_model(model, config)


def rank_stabilised(model: nn.Module, context: Context, budget: Budget, pattern: Any = None) -> nn.Module:
    """LoRA whose product is multiplied by 16 over the root of the rank (arXiv 2312.03732)."""
    ranks = budgets.lora_ranks(model, budget(model), pattern)
    config = LoraConfig(
        r=ranks.base,
        lora_alpha=16,
        target_modules=list(ranks.by_module),
        rank_pattern=ranks.higher,
        use_rslora=True,
        **peft_options(context.task),
    )
    return get_peft_model(model, config)


# LoRA that starts at the largest singular values of the weights, taken out of these (arXiv 2404.02948).
pissa = partial(lora, alpha=1.0, init_lora_weights="pissa_niter_4")


def oft(model: nn.Module, context: Context, budget: Budget) -> nn.Module:
    """Rotations of the inputs of all linear modules, in blocks (arXiv 2306.07280)."""
    config = OFTConfig(
        oft_block_size=budgets.oft_block_size(model, budget(model)),
        target_modules=list(budgets.linear_modules(model)),
        **peft_options(context.task),
    )
    return get_peft_model(model, config)


def ia3(model: nn.Module, context: Context) -> nn.Module:
    """Keys, values and the last linear layer of each feed-forward block."""
    names = list(budgets.linear_modules(model))
    last = [
        n for n in names if n.endswith(("down_proj", "fc2")) or (n.endswith("output.dense") and "attention" not in n)
    ]
    keys_values = [n for n in names if n.endswith(("k_proj", "v_proj", ".key", ".value"))]
    config = IA3Config(target_modules=keys_values + last, feedforward_modules=last, **peft_options(context.task))
    return get_peft_model(model, config)


def prefix(model: nn.Module, context: Context, m: int | None = None, from_text: bool = False) -> nn.Module:
    """peft's for language models, started at random or from real tokens; ours (ExactPrefix) for encoders."""
    m = m or budgets.prefix_length(model, budgets.ours(model))
    if context.task.has_head:
        model = extend(model, partial(ExactPrefix, m=m))
        if from_text:
            start_from_tokens(model, context.batches[0])
        return model
    model = get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=m, **peft_options(context.task)))
    tokens = model.prompt_tokens  # peft leaves them on the CPU and copies them in every forward pass
    tokens["default"] = tokens["default"].to(model.device)
    if from_text:
        start_from_text(model, context.batches, m)
    return model


@torch.no_grad()
def start_from_text(model: Any, batches: list[Batch], m: int) -> None:
    """The prefix as keys and values of the first m tokens of the training data, all of them also in sliding layers."""
    tokens = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in batches])
    tokens = tokens.repeat(-(-m // len(tokens)))[None, :m].to(model.device)
    with model.disable_adapter(), evaluating(model):
        cache = model.get_base_model()(input_ids=tokens, past_key_values=DynamicCache(), use_cache=True).past_key_values
    initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)


def prefix_memory(model: nn.Module, context: Context) -> nn.Module:
    return extend(model, PrefixMemory)


def full(model: nn.Module, context: Context) -> nn.Module:
    return model.float().requires_grad_(True)


def head_only(model: nn.Module, context: Context) -> nn.Module:
    model.requires_grad_(False)
    model.get_submodule("head").requires_grad_(True)
    return model


def zero_shot(model: nn.Module, context: Context) -> nn.Module:
    """The base model as it is."""
    return model
