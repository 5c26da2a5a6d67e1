"""NTK-Attention as methods of the comparison: the default, parts of it taken away or changed, and LoRA beside it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from peft import get_peft_model
from torch import nn

from ntk_attention import NTKAttentionConfig, calibrate
from ntk_attention.calibration.inputs import own_text
from ntk_attention.calibration.moments import inverse_root, row_rms
from ntk_attention.calibration.settings import DEFAULT, CalibrationSettings
from ntk_attention.tuner.adapter import LOG_OF_NOTHING, PrefixAdapter
from ntk_attention.tuner.observation import adapted_layers, evaluating

from . import budgets
from .extensions import Sizes, add_low_rank, as_peft, measured
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


def combined(
    model: nn.Module,
    context: Context,
    *,
    part: float,
    size: float = 1.0,
    pattern: re.Pattern[str] = budgets.FEED_FORWARD,
    unit: float = 1.0,
    output_unit: float | None = None,
    whitens: bool = False,
) -> nn.Module:
    """A state in attention, and LoRA in the feed-forward blocks.

    Args:
        part: of the numbers, in attention, at most a full Z there.
        size: of both, as in `ntk_divided`.
        pattern: of the names of the modules with LoRA.
        unit: of LoRA's numbers: what their steps are, measured by those of the state.
        output_unit: of B relative to the output, for LoRA in units of calibration, where `unit` does not count.
        whitens: whether these have coordinates in which inputs are white, too.
    """
    total = budgets.ours(model, size=size)
    geometry = replace(budgets.geometries(model)[0], feed_forward=model.config.hidden_size)
    rank, _ = budgets.divided(geometry, size, part)
    adapted: Any = ntk(model, context, rank=rank, feed_forward_rank=None)
    base = adapted.get_base_model()
    rest = total - sum(p.numel() for adapter in adapters(adapted) for p in adapter.parameters() if p.requires_grad)
    ranks = budgets.lora_ranks(base, rest, pattern).by_module
    sizes = {} if output_unit is None else sizes_of(adapted, ranks, batches_from(context, "train"), whitens)
    for name, rank in ranks.items():
        linear: Any = base.get_submodule(name)
        if output_unit is None:
            add_low_rank(linear, as_peft(linear, rank, unit))
        else:
            add_low_rank(linear, measured(linear, rank, sizes[name], DEFAULT.input_unit, output_unit))
    return adapted


@torch.no_grad()
def sizes_of(model: Any, names: Iterable[str], batches: list[Batch], whitens: bool) -> dict[str, Sizes]:
    """Those of linear modules: of the median real token, without the adapter."""
    seen: dict[str, list[Any]] = {name: [] for name in names}
    moments: dict[str, Any] = dict.fromkeys(seen, 0.0)
    base, masks = model.get_base_model(), []

    def see(name: str, module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        x, out = (x.flatten(0, -2)[masks[-1]].float() for x in (inputs[0], output))
        seen[name].append(torch.stack([row_rms(x), row_rms(out)]))
        if whitens:
            moments[name] = moments[name] + x.mT @ x / len(x)

    hooks = [base.get_submodule(name).register_forward_hook(partial(see, name)) for name in seen]
    with model.disable_adapter(), evaluating(model):
        for batch in batches:
            masks.append(batch["attention_mask"].flatten().bool().to(model.device))
            model(**{name: x.to(model.device) for name, x in batch.items()})
    for hook in hooks:
        hook.remove()
    found = {}
    for name, sizes in seen.items():
        medians = torch.cat(sizes, dim=1).median(dim=1).values.tolist()
        root = inverse_root(moments[name].double() / len(masks), DEFAULT.eigenvalue_floor).float() if whitens else None
        found[name] = Sizes(*medians, root)
    return found


def without_value(adapter: PrefixAdapter, log_k: float) -> None:
    """A prefix of value zero; what multiplies the zeros is left as calibration has made it."""
    (adapter.Z_B if adapter.is_factored else adapter.Z).zero_()
    adapter.log_k.fill_(log_k / adapter.unit)
