"""The methods by name: how each adapts a model, and the learning rates that are tried.

Equal parameters: unless its name says another size, a method has as many trainable parameters as NTK-Attention with a
full Z in every query head, within 5 %. Full fine-tuning, IA3, the head alone and prefixes of a given m have their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values
from torch import nn
from transformers import DynamicCache

from ntk_attention import NTKAttentionConfig, calibrate
from ntk_attention.calibration.settings import DEFAULT, CalibrationSettings
from ntk_attention.tuner.adapter import LOG_OF_NOTHING, PrefixAdapter
from ntk_attention.tuner.observation import adapted_layers, evaluating

from . import budgets
from .extensions import ExactPrefix, PrefixMemory, extend, start_from_tokens
from .inputs import with_random_inputs
from .tasks import Base, Batch, Task

Budget = Callable[[nn.Module], int]


@dataclass(frozen=True)
class Context:
    """What a method may look at besides the model."""

    task: Task
    base: Base
    batches: list[Batch]  # of training data, on the CPU


@dataclass(frozen=True)
class Method:
    """One line of the tables.

    Args:
        label: in tables and figures.
        family: "ntk", "lora", "prefix" or "other"; gives the colour.
        tier: cells of a lower tier run first.
        build: adapts a fresh copy of the base model in place and returns it; what requires a gradient is trained.
        rates: learning rates tried, at least four on a log grid.
        ablation: the question that it answers, where it is no method of its own.
        only: the tasks it is for; all by default.
    """

    label: str
    family: str
    tier: int
    build: Callable[[nn.Module, Context], nn.Module]
    rates: tuple[float, ...]
    ablation: str = ""
    only: Callable[[Task], bool] = lambda task: True


def peft_options(task: Task) -> dict[str, Any]:
    return {"modules_to_save": ["head"]} if task.has_head else {"task_type": "CAUSAL_LM"}


# --- NTK-Attention ---


def ntk(
    model: nn.Module,
    context: Context,
    *,
    source: str = "train",
    settings: CalibrationSettings = DEFAULT,
    others: Literal["own", "random", "none"] = "own",
    **options: Any,
) -> nn.Module:
    """As the library makes it: attached and calibrated."""
    layers = options.pop("layers", None)
    if layers is not None:
        count = len(budgets.geometries(model))
        options["layers_to_transform"] = [i for i in range(count) if layers(i, count)]
    model = get_peft_model(model, NTKAttentionConfig(**peft_options(context.task), **options))
    batches = batches_from(context, source)
    seen = with_random_inputs(model, batches) if others == "random" else others == "own"
    calibrate(model, batches, settings=settings, others=seen)
    return model


def batches_from(context: Context, source: str) -> list[Batch]:
    """Batches for calibration without labels, which belong to the task."""
    batches = context.batches if source == "train" else context.task.unrelated_batches(context.base)
    batches = [{name: x for name, x in batch.items() if name != "labels"} for batch in batches]
    if source == "noise":
        generator = torch.Generator().manual_seed(0)
        for batch in batches:
            if "input_ids" in batch:
                size = context.base.tokenizer.vocab_size
                batch["input_ids"] = torch.randint(size, batch["input_ids"].shape, generator=generator)
            else:
                batch["pixel_values"] = torch.randn(batch["pixel_values"].shape, generator=generator)
    return batches


def ntk_published(model: nn.Module, context: Context) -> nn.Module:
    """Z = 0 and |k| = 0, plain coordinates, phi = elu + 1 without a constant feature."""
    options = {"init_weights": "published", "constant_feature": False, **ATTENTION_ALONE}
    return get_peft_model(model, NTKAttentionConfig(**peft_options(context.task), **options))


def ntk_neutral(model: nn.Module, context: Context) -> nn.Module:
    """The library's own start without calibration."""
    return get_peft_model(model, NTKAttentionConfig(**peft_options(context.task)))


def adapters(model: nn.Module) -> list[PrefixAdapter]:
    return [layer["default"] for layer in adapted_layers(model).values()]


@torch.no_grad()
def ntk_scale_only(model: nn.Module, context: Context) -> nn.Module:
    """Calibrated b, share and value of the prefix, but plain coordinates."""
    model = ntk(model, context)
    for adapter in adapters(model):
        for part in [part for part in (adapter, adapter.feed_forward) if part is not None]:
            leading, scaled = part.plain_leading(), part.plain_scaled()
            part.set_coordinates(None, 1.0)
            part.set_plain(leading, scaled)
    return model


@torch.no_grad()
def ntk_whitening_only(model: nn.Module, context: Context) -> nn.Module:
    """Calibrated coordinates, but one scale for all heads (b = 0) and a neutral start."""
    model = ntk(model, context)
    for adapter in adapters(model):
        adapter.log_scale.zero_()
        without_value(adapter, -math.log(adapter.log_k.shape[1]))
    return model


@torch.no_grad()
def ntk_without_normaliser(model: nn.Module, context: Context) -> nn.Module:
    """Calibrated coordinates and b; k weighs nothing and does not train: the prefix only adds to the numerator."""
    model = ntk(model, context)
    for adapter in adapters(model):
        without_value(adapter, LOG_OF_NOTHING)
        adapter.log_k.requires_grad_(False)
    return model


def ntk_divided(
    model: nn.Module, context: Context, *, size: float = 1.0, part: float | None = None, **options: Any
) -> nn.Module:
    """`size` times the numbers of a full Z, `part` of them in attention, at most a full Z, the rest in the blocks.

    By default divided as the library does.
    """
    if part is None:
        part = 1.0 if context.task.has_head and size <= 1 else 1 / 4
    geometry = replace(budgets.geometries(model)[0], feed_forward=model.config.hidden_size)
    rank, in_blocks = budgets.divided(geometry, size, part)
    return ntk(model, context, rank=rank, feed_forward_rank=in_blocks, **options)


def without_value(adapter: PrefixAdapter, log_k: float) -> None:
    """A prefix of value zero; what multiplies the zeros is left as calibration has made it."""
    (adapter.Z_B if adapter.is_factored else adapter.Z).zero_()
    adapter.log_k.fill_(log_k / adapter.unit)


# --- the others ---


def lora(model: nn.Module, context: Context, budget: Budget, pattern: Any = None, dora: bool = False) -> nn.Module:
    ranks = budgets.lora_ranks(model, budget(model), pattern, magnitudes=dora)
    higher = ranks.higher
    config = LoraConfig(
        r=ranks.base,
        lora_alpha=2 * ranks.base,
        target_modules=list(ranks.by_module),
        rank_pattern=higher,
        alpha_pattern={name: 2 * rank for name, rank in higher.items()},
        use_dora=dora,
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


# --- the registry ---

HALF = CalibrationSettings(share=0.5)
ATTENTION_ALONE: dict[str, None] = {"rank": None, "feed_forward_rank": None}  # a full Z, as in the paper
NTK_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
LORA_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
PREFIX_RATES = (3e-3, 1e-2, 3e-2, 1e-1)
RANKS, LENGTHS = (2, 8), (1, 10, 100)
at_ours, at_kv = budgets.ours, partial(budgets.ours, heads="kv")
at_quarter, at_4x = partial(budgets.ours, size=1 / 4), partial(budgets.ours, size=4.0)
qv, attention = budgets.QUERY_VALUE, budgets.ATTENTION


def encodes(task: Task) -> bool:
    return task.has_head


def sees_pictures(task: Task) -> bool:
    return task.sees_pictures


def writes_text(task: Task) -> bool:
    return not task.has_head


def has_large_heads(task: Task) -> bool:
    return task.model == "gemma3-270m"


has_groups = writes_text  # fewer KV heads than query heads: only the language models here


def ablation(label: str, question: str, build: Callable[..., nn.Module] = ntk, **options: Any) -> Method:
    only = options.pop("only", lambda task: True)
    return Method(label, "ntk", 4, partial(build, **options) if options else build, NTK_RATES, question, only)


METHODS: dict[str, Method] = {
    "ntk": Method("NTK-Attention", "ntk", 0, ntk, NTK_RATES),
    "lora-attention": Method(
        "LoRA, attention", "lora", 0, partial(lora, budget=at_ours, pattern=attention), LORA_RATES
    ),
    "prefix": Method("prefix, equal size", "prefix", 0, prefix, PREFIX_RATES),
    "ntk-published": Method("NTK-Attention as published", "ntk", 1, ntk_published, (1e-4, 3e-4, 1e-3, 3e-3)),
    "lora-all": Method("LoRA, all linear", "lora", 1, partial(lora, budget=at_ours), LORA_RATES),
    "lora-qv": Method("LoRA, q and v", "lora", 1, partial(lora, budget=at_ours, pattern=qv), LORA_RATES),
    "prefix-text": Method("prefix, equal size, from text", "prefix", 1, partial(prefix, from_text=True), PREFIX_RATES),
    "prefix-memory": Method("softmax + phi(q) M", "prefix", 1, prefix_memory, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
    "full": Method("full fine-tuning", "other", 1, full, (1e-5, 3e-5, 1e-4, 3e-4)),
    "head": Method("head only", "other", 1, head_only, (1e-3, 3e-3, 1e-2, 3e-2), only=encodes),
    "dora": Method(
        "DoRA, attention", "lora", 2, partial(lora, budget=at_ours, pattern=attention, dora=True), LORA_RATES
    ),
    "ia3": Method("IA3", "other", 2, ia3, (1e-3, 3e-3, 1e-2, 3e-2)),
    "ntk-kv": Method(
        "NTK-Attention, per KV head", "ntk", 2, partial(ntk, state_heads="kv"), NTK_RATES, only=has_groups
    ),
    "lora-attention-kv": Method(
        "LoRA, attention, size of per KV head", "lora", 2, partial(lora, budget=at_kv, pattern=attention), LORA_RATES,
        only=has_groups,
    ),
    **{f"prefix-{m}": Method(f"prefix, m = {m}", "prefix", 3, partial(prefix, m=m), PREFIX_RATES) for m in LENGTHS},
    "ntk-quarter": Method(
        "NTK-Attention, a quarter of the size", "ntk", 3, partial(ntk_divided, size=1 / 4), NTK_RATES
    ),
    "lora-attention-quarter": Method(
        "LoRA, attention, a quarter of the size", "lora", 3, partial(lora, budget=at_quarter, pattern=attention),
        LORA_RATES,
    ),
    "ntk-4x": Method("NTK-Attention, four times the size", "ntk", 3, partial(ntk_divided, size=4.0), NTK_RATES),
    "lora-all-4x": Method(
        "LoRA, all linear, four times the size", "lora", 3, partial(lora, budget=at_4x), LORA_RATES
    ),
    "attention-alone": ablation(
        "attention alone, half of it at the start", "feed-forward blocks", settings=HALF, **ATTENTION_ALONE
    ),
    "attention-15": ablation(
        "attention alone, 15 % at the start", "feed-forward blocks", settings=CalibrationSettings(share=0.15),
        **ATTENTION_ALONE,
        only=writes_text,  # the default of encoders
    ),
    "with-blocks": ablation(
        "as language models: blocks too, half of the attention at the start, even steps", "feed-forward blocks",
        ntk_divided, part=1 / 4, settings=CalibrationSettings(share=0.5, last_picture_step=1.0),
        only=encodes,  # elsewhere the default
    ),
    "as-small-heads": ablation(
        "half of the attention at the start and the steps of small heads", "large heads",
        settings=CalibrationSettings(large_head_dim=None), only=has_large_heads,
    ),
    "rotary": ablation("phi sees rotated queries", "positions", positions="rotary", only=writes_text),
    "rotary-alone": ablation(
        "attention alone, phi sees rotated queries", "positions", settings=HALF, positions="rotary", **ATTENTION_ALONE,
        only=writes_text,
    ),
    "even-steps": ablation(
        "the same steps in all layers", "steps", settings=CalibrationSettings(last_picture_step=1.0), only=sees_pictures
    ),
    "half-in-blocks": ablation(
        "rank d / 4, half of the size in blocks", "feed-forward blocks", ntk_divided, part=1 / 2
    ),
    **{
        f"rank-{s}": ablation(f"attention alone, rank {s}", "rank of Z", rank=s, feed_forward_rank=None) for s in RANKS
    },
    "output-unit": ablation(
        "blocks in units of their output", "feed-forward blocks",
        settings=CalibrationSettings(stream_unit=math.inf, output_unit=1.0, input_unit=1.0), only=writes_text,
    ),
    "start-neutral": ablation("neutral start, not calibrated", "start", ntk_neutral),
    "start-scale": ablation("scale only", "start", ntk_scale_only),
    "start-whitening": ablation("whitening only", "start", ntk_whitening_only),
    "no-normaliser": ablation("without the normaliser k", "normaliser", ntk_without_normaliser),
    **{
        f"random-{r}": ablation(
            f"positive random features, r = {r}", "feature map and r", feature_map="positive_random",
            feature_map_options={"num_features": r, "seed": 0},
        )
        for r in (16, 64, 256)
    },
    "taylor": ablation(
        "Taylor features of degree 2", "feature map and r", feature_map="taylor", feature_map_options={"degree": 2},
        only=encodes,  # r = 561 with d = 32, 2,145 with d = 64
    ),
    "layers-half": ablation("every second layer", "layers", layers=lambda i, count: i % 2 == 1),
    "layers-upper": ablation("the upper half of the layers", "layers", layers=lambda i, count: i >= count // 2),
    "layers-lower": ablation("the lower half of the layers", "layers", layers=lambda i, count: i < count // 2),
    "data-unrelated": ablation("calibrated on unrelated data", "calibration data", source="unrelated"),
    "data-noise": ablation("calibrated on random inputs", "calibration data", source="noise"),
    "data-alone": ablation(
        "calibrated on training data alone", "calibration data", others="none", **ATTENTION_ALONE,
        only=writes_text,  # the default of encoders
    ),
    "others-random": ablation(
        "coordinates see random tokens beside the task", "calibration data", others="random", **ATTENTION_ALONE
    ),
    "share-5": ablation("prefix holds 5 % at the start", "share", settings=CalibrationSettings(share=0.05)),
    "share-15": ablation(
        "prefix holds 15 % at the start", "share", settings=CalibrationSettings(share=0.15), only=writes_text
    ),
}  # fmt: skip
