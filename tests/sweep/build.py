"""Tiny random models: which classes a model type has, and one of them with weights that are far from zero."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from .shrink import tiny_config

MOST_PARAMETERS = 120_000_000
MOST_CLASSES = 6  # tried of one model type
# Heads that are most useful come first; then come all others, and the classes of the type's own modeling file.
PREFERRED = (
    "SPEECH_SEQ_2_SEQ",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
)
MAPPINGS = {
    name.removeprefix("MODEL_FOR_").removesuffix("_MAPPING_NAMES"): name
    for name in dir(modeling_auto)
    if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES")
}
BASE = "MODEL"  # what remains of MODEL_MAPPING_NAMES


@dataclass(frozen=True)
class Built:
    """A model in evaluation mode, and how much of the published config is left."""

    model: PreTrainedModel
    size: str


def model_types() -> list[str]:
    """All of the installed transformers."""
    return sorted(CONFIG_MAPPING_NAMES)


def class_names(model_type: str) -> list[str]:
    """Of the classes that the auto mappings name, the most useful head first."""
    order = [*PREFERRED, BASE, *(name for name in MAPPINGS if name not in (*PREFERRED, BASE))]
    names: list[str] = []
    for kind in order:
        found = getattr(modeling_auto, MAPPINGS[kind]).get(model_type, ()) if kind in MAPPINGS else ()
        names += [found] if isinstance(found, str) else list(found)
    return list(dict.fromkeys(names))


def model_classes(model_type: str) -> list[type[PreTrainedModel]]:
    """By the auto mappings, and then those of the modeling file that are made for this config."""
    found = [getattr(transformers, name, None) for name in class_names(model_type)]
    config_class = CONFIG_MAPPING[model_type]
    package = importlib.import_module(config_class.__module__.rpartition(".")[0])
    for path in sorted(Path(package.__path__[0]).glob("modeling_*.py")):
        try:
            modeling = importlib.import_module(f"{package.__name__}.{path.stem}")
        except ImportError:
            continue
        for name, cls in inspect.getmembers(modeling, inspect.isclass):
            if issubclass(cls, PreTrainedModel) and cls.__module__ == modeling.__name__:
                is_whole = not name.endswith("PreTrainedModel")
                found += [cls] if is_whole and getattr(cls, "config_class", None) is config_class else []
    return [cls for cls in dict.fromkeys(found) if inspect.isclass(cls)][:MOST_CLASSES]


def builds(model_type: str, problems: list[str]) -> Iterator[Built]:
    """The model's classes one after another, each as small as it can be built; adds to `problems` what failed."""
    configs: list[tuple[str, PreTrainedConfig]] = []
    for size, only_layers in (("tiny", False), ("few layers", True)):
        try:
            configs.append((size, tiny_config(model_type, only_layers=only_layers)))
        except Exception as error:
            problems.append(f"{size} config: {summary(error)}")
    try:
        configs.append(("as published", CONFIG_MAPPING[model_type]()))
    except Exception as error:
        problems.append(f"published config: {summary(error)}")
    for size, config in configs:
        for cls in model_classes(model_type):
            try:
                yield Built(build(cls, config), size)
            except Exception as error:
                problems.append(f"{cls.__name__}, {size}: {summary(error)}")


def build(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The same random model each time.

    Raises:
        ValueError: if it would be too large.
    """
    with torch.device("meta"):
        try:
            size = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
        except (RuntimeError, NotImplementedError):  # some classes compute while they are made
            size = 0
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f} million parameters, at most {MOST_PARAMETERS / 1e6:.0f} are built")
    torch.manual_seed(0)
    model = cls._from_config(copy.deepcopy(config), dtype=torch.float32)
    randomise(model)
    if model.can_generate():  # to the last token that is asked for, from a first that is there
        config = model.generation_config
        config.eos_token_id, config.pad_token_id, config.decoder_start_token_id = None, 0, 0
        config.forced_eos_token_id = config.forced_bos_token_id = None
    return model.float().eval().requires_grad_(False)  # as under an adapter: some kernels round otherwise


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Move weights away from zero, so that attention is not almost uniform, and keep them of a size with which hidden
    states stay about as large from layer to layer."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel():
            shape = parameter.shape
            fan_in = max(shape[1:]) if 1 < len(shape) < 4 else shape[1:].numel()
            noise = torch.randn(shape, generator=generator)
            if len(shape) > 1:
                size = fan_in**-0.5
                parameter.mul_(min(1.0, size / max(parameter.square().mean().sqrt().item(), 1e-12)))
                parameter.add_(size * noise)
            else:  # gains and offsets, by a tenth of what they are
                parameter.add_(0.1 * noise * torch.where(parameter == 0, 1.0, parameter.abs().clamp_max(1.0)))


def summary(error: BaseException, length: int = 300) -> str:
    """The error's kind and its first words, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:length]
