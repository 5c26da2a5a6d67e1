"""Data-driven initialisation: where the prefix of every head starts, and in which coordinates it trains.

In a real model the log-normalisers of the heads differ by many nats, the features are almost constant and correlated,
and values differ in size between layers. With one start for all, the prefix is invisible in some heads and drowns
others. Passes of a few batches through the frozen model measure, per head,

1. b, the mean log-sum-exp of its attention, and phi(q).1 against it: they set k so that the prefix holds its share of
   the attention on average;
2. the moments of g(q) = d out / d Z = phi(q) e^{b - lse}, which say how an output answers to a change of Z. They give
   - coordinates in which the features are centred on the constant one and white, in units of the head's output; these
     moments see text that the model writes itself too, since what a task's queries rarely do other text does often;
   - the prefix's value at the start: the head's mean output, of all fixed values the one that changes outputs least.

The parts of the feed-forward block beside get coordinates in which their inputs are white and steps are parts of the
outputs that they change. In encoders of pictures the units shrink with depth, and in large heads with their size.

All of it is a change of coordinates and a start: saved files hold plain Z, k and b.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..progress import SILENT, Reporter
from ..tuner.batches import checked_batches
from ..tuner.calls import without_adapters
from ..tuner.layer import NTKAttentionLayer
from ..tuner.observation import adapted_layers, observe
from ..tuner.routing import CHILD
from .blocks import FeedForwardStatistics
from .heads import HeadStatistics, HeadUnits
from .inputs import own_text
from .settings import DEFAULT, CalibrationSettings


def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    adapter_name: str = "default",
    settings: CalibrationSettings = DEFAULT,
    others: bool | Iterable[Mapping[str, Any]] = True,
    reporter: Reporter = SILENT,
) -> None:
    """Start an adapter near the frozen model, in coordinates that train well.

    Call it after `get_peft_model` and before the optimizer is made. A few thousand tokens are enough.

    Args:
        model: with an NTK-Attention adapter, whose Z, k and b are replaced.
        batches: keyword arguments of the model's forward, a few batches of the training data. Tokens whose
            `attention_mask` is 0 do not count.
        adapter_name: which adapter.
        settings: the numbers of the start, such as the share of the attention that the prefix holds.
        others: batches of other inputs, which the coordinates see too. The data of a task may hold queries of few
            kinds; what these rarely do would weigh much in their coordinates, and training would spoil the model for
            all else. True: text that the model writes itself, if it writes text from its first token. False: nothing.
        reporter: is told of every batch.

    Raises:
        ValueError: without such an adapter, without its constant feature, if the moments would not fit into
            `settings.max_bytes`, with `batches` that are empty or no arguments of the model's forward, that reach no
            adapted layer or give NaN there, or inside `torch.inference_mode()`. The adapter is as it was then.

    Warns:
        UserWarning: if there are layers that no token reaches, such as a vision tower without pictures, which start as
            they were; or if a language model does not run on its first token alone.
    """
    layers = adapted_layers(model, adapter_name)
    check_call(layers, adapter_name, settings)
    units = head_units(model, layers, settings)
    batches = checked_batches(batches, model=model)
    beside = [] if isinstance(others, bool) else checked_batches(others, least=0, source="others", model=model)

    with without_adapters(layers.values()):
        if others is True:
            beside = own_text(model, batches, settings)
        heads = {name: HeadStatistics(layer[adapter_name]) for name, layer in layers.items()}
        reporter.stage("calibrate", 2 * len(batches) + len(beside))
        observers = {name: s.observe_scale for name, s in heads.items()}
        observe(model, layers, Told(batches, reporter), observers, None, "batches", adapter_name)
        check_finite(heads, "batches")
        layers = reached(layers, heads)
        heads = {name: heads[name] for name in layers}
        for name, s in heads.items():
            s.set_scale(units[name].share)
        blocks = measure_moments(model, layers, heads, {"batches": batches, "others": beside}, adapter_name, reporter)

    generator = torch.Generator().manual_seed(0)  # every process, and every call, makes the same start
    for name, s in heads.items():
        s.set_coordinates_and_start(units[name], settings.eigenvalue_floor, generator)
    for block in blocks.values():
        block.set_coordinates_and_start(settings, generator)
    for layer in layers.values():
        layer.lead(adapter_name)


@dataclass(frozen=True)
class Told:
    """Batches; the reporter hears of each when it is done."""

    batches: Iterable[Mapping[str, Any]]
    reporter: Reporter

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for batch in self.batches:
            yield batch
            self.reporter.advance()


def check_call(layers: Mapping[str, NTKAttentionLayer], adapter_name: str, settings: CalibrationSettings) -> None:
    """Raise ValueError if these adapters cannot be calibrated, here or at all."""
    if torch.is_inference_mode_enabled():
        raise ValueError("calibrate was called inside torch.inference_mode(), where nothing that trains can be made")
    if not isinstance(settings, CalibrationSettings):
        raise ValueError(f"settings must be CalibrationSettings, got {settings!r}")
    if not all(layer[adapter_name].feature_map.constant for layer in layers.values()):
        raise ValueError("calibrate needs the constant feature: make the config with constant_feature=True")
    check_size(layers, adapter_name, settings.max_bytes)


def check_size(
    layers: Mapping[str, NTKAttentionLayer], adapter_name: str = "default", max_bytes: int = DEFAULT.max_bytes
) -> None:
    """Raise ValueError if the moments and coordinates, r x r for every head, would not fit into so many bytes."""
    adapters = [layer[adapter_name] for layer in layers.values()]
    size = sum(12 * len(adapter.log_k) * adapter.num_features**2 for adapter in adapters)
    for layer in layers.values():  # moments, their root, and what each part keeps of it
        parts = [layer.parts[name] for name in layer[adapter_name].parts]
        seen = [part.size.in_features for part in parts if not part.sees_hidden]
        size += (4 * len(seen) + 8) * max(seen, default=0) ** 2
    if size > max_bytes:
        raise ValueError(
            f"calibration would hold {size / 2**30:.3g} GiB of r x r matrices, at most {max_bytes / 2**30:.3g} are "
            "expected: take a feature map with fewer features, fewer layers, or feed_forward_rank=None"
        )


def reached(
    layers: Mapping[str, NTKAttentionLayer], statistics: Mapping[str, HeadStatistics]
) -> dict[str, NTKAttentionLayer]:
    """The layers that tokens of the batches have reached; warns of the others.

    Raises:
        ValueError: if there are none.
    """
    found = {name: layer for name, layer in layers.items() if statistics[name].num_rows}
    if not found:
        raise ValueError(
            f"no token of the batches reached any of the {len(layers)} adapted attention modules, such as "
            f"{next(iter(layers)).removesuffix(f'.{CHILD}')}: either all of them are padding, or what the batches "
            "hold does not lead there"
        )
    others = [name for name in layers if name not in found]
    if others:
        warnings.warn(
            f"calibrate: no token of the batches reached {len(others)} of {len(layers)} attention modules, such as "
            f"{others[0].removesuffix(f'.{CHILD}')}; they start as they were",
            stacklevel=3,
        )
    return found


def measure_moments(
    model: nn.Module,
    layers: Mapping[str, NTKAttentionLayer],
    heads: Mapping[str, HeadStatistics],
    kinds: Mapping[str, list[Mapping[str, Any]]],
    adapter_name: str,
    reporter: Reporter,
) -> dict[str, FeedForwardStatistics]:
    """The second pass: show every kind of input, by what it was given as, to heads and feed-forward blocks.

    Returns:
        The statistics of the feed-forward blocks, by the layer whose adapter looks after them.
    """
    blocks = {
        name: FeedForwardStatistics(parts, [place for place in parts if layer.parts[place].sees_hidden])
        for name, layer in layers.items()
        if (parts := layer[adapter_name].parts)
    }
    for source, batches in kinds.items():
        if batches:
            observers = {name: s.observe_moments for name, s in heads.items()}
            observe(model, layers, Told(batches, reporter), observers, blocks, source, adapter_name)
            for statistics in heads.values():
                statistics.end_of_kind()
            for block in blocks.values():
                block.end_of_kind()
            check_finite(heads, source)
            check_finite(blocks, source)
    return blocks


def check_finite(measured: Mapping[str, HeadStatistics] | Mapping[str, FeedForwardStatistics], source: str) -> None:
    """Raise ValueError if there is anything in a layer that cannot be measured."""
    for name, statistics in measured.items():
        if not statistics.is_finite:
            raise ValueError(
                f"the frozen model computes NaN or inf in {name.removesuffix(f'.{CHILD}')} or beside it from {source}: "
                "expected finite numbers, for which its dtype may be too narrow"
            )


def head_units(
    model: nn.Module, layers: Mapping[str, NTKAttentionLayer], settings: CalibrationSettings
) -> dict[str, HeadUnits]:
    """How the heads of every layer start and train, by layer."""
    encodes = all(layer.encodes for layer in layers.values())
    found = {}
    for name, layer in layers.items():
        head_dim = layer.geometry.head_dim
        share, step = settings.share_of(head_dim, encodes), settings.head_step * settings.size_step(head_dim)
        log_k = step * settings.log_k_step / share
        if encodes and not hasattr(layer.get_base_layer().config, "vocab_size"):  # a tower of text has a vocabulary
            step *= 1 - (1 - settings.last_picture_step) * depth(model, name)
        found[name] = HeadUnits(share, step, log_k)
    return found


def depth(model: nn.Module, name: str) -> float:
    """Where a module stands in the list of layers that it is in, from 0, the first, to 1; 0 without one."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        siblings = model.get_submodule(".".join(parts[:i])) if part.isdigit() else None
        if isinstance(siblings, nn.ModuleList):
            return int(part) / max(1, len(siblings) - 1)
    return 0.0
