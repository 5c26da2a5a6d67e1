"""NTK-Attention as methods of the comparison: the default, parts of it taken away or changed, and LoRA beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from peft import get_peft_model
from torch import nn

from ntk_attention import NTKAttentionConfig, calibrate
from ntk_attention.calibration.inputs import own_text
from ntk_attention.calibration.settings import DEFAULT, CalibrationSettings
from ntk_attention.tuner.adapter import LOG_OF_NOTHING, PrefixAdapter
from ntk_attention.tuner.observation import adapted_layers
from ntk_attention.tuner.plan import plan_adapter

from . import budgets
from .inputs import with_random_inputs
from .method import Context, peft_options
from .tasks import Base, Batch

ATTENTION_ALONE: dict[str, None] = {"rank": None, "feed_forward_rank": None}  # a full Z, as in the paper


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
    model = get_peft_model(model, NTKAttentionConfig(**peft_options(context.task), **options))
    batches = batches_from(context, source)
    beside: bool | list[Mapping[str, Any]] = False
    if others == "random":
        beside = with_random_inputs(model, batches)
    elif others == "own":
        beside = kept_text(context.base, batches, settings)
    calibrate(model, batches, settings=settings, others=beside)
    return model


def kept_text(base: Base, batches: list[Batch], settings: CalibrationSettings) -> list[Mapping[str, Any]]:
    """What `calibrate` would have the base model write, once per process: it is the same for every cell."""
    key = f"own text, {settings.own_rows} rows of {settings.own_length}"
    if key not in base.kept:
        base.kept[key] = own_text(base.model, list(batches), settings)
    return base.kept[key]


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
        for part in (adapter, *adapter.parts.values()):
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
        part = 1.0 if context.task.has_head and size <= 1 else 1 / 2
    plan = plan_adapter(model, NTKAttentionConfig(feed_forward_rank=1))
    rank, in_blocks = budgets.divided(next(iter(plan.sites.values())).geometry, size, part)
    return ntk(model, context, rank=rank, feed_forward_rank=in_blocks, **options)


def without_value(adapter: PrefixAdapter, log_k: float) -> None:
    """A prefix of value zero; what multiplies the zeros is left as calibration has made it."""
    (adapter.Z_B if adapter.is_factored else adapter.Z).zero_()
    adapter.log_k.fill_(log_k / adapter.unit)
