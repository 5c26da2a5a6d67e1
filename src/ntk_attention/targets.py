"""Where the adapters of a model go, and what is refused before the model is touched."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .config import NTKAttentionConfig
from .geometry import geometry_of, is_pair
from .routing import CHILD, check_implementation

GENERATING = ("CAUSAL_LM", "SEQ_2_SEQ_LM")  # task types whose PEFT model needs a model that generates
# Parts of the names of an adapter's own tensors.
OWN_NAMES = {CHILD, "Z", "Z_A", "Z_B", "log_k", "log_scale", "k_signed", "feature_map", "feed_forward", "projection"}


def check_task(model: nn.Module, peft_config: NTKAttentionConfig) -> None:
    """Raise ValueError for a task as which PEFT could not call the model."""
    task = peft_config.task_type
    if task is None:
        return
    kind = type(model).__name__
    if task in GENERATING and not hasattr(model, "prepare_inputs_for_generation"):
        raise ValueError(f"task_type is {task!r}, but {kind} cannot generate")
    if task in GENERATING and is_pair(model) != (task == "SEQ_2_SEQ_LM"):
        fitting = "SEQ_2_SEQ_LM" if is_pair(model) else "CAUSAL_LM"
        raise ValueError(f"task_type is {task!r}, but {kind} is a model for {fitting!r}")
    parameters = inspect.signature(model.forward).parameters
    # Keyword arguments of any name may be input_ids, unless the model itself names another input.
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    main = getattr(model, "main_input_name", "input_ids")
    if "input_ids" not in parameters and not (takes_any and main == "input_ids"):
        first = next(iter(parameters), None)
        raise ValueError(
            f"task_type is {task!r}, for which PEFT passes input_ids, but {kind} takes {first!r}: leave task_type out"
        )


def reason_to_leave_out(module: nn.Module, name: str) -> str | None:
    """Why a module that routes can have no prefix; None if it can."""
    try:
        geometry_of(module, name)
        check_implementation(module, name)
    except ValueError as error:
        return str(error)
    return None


def check_adapter_name(model: nn.Module, adapter_name: str) -> None:
    """Raise ValueError for a name that files or modules could not keep apart from others."""
    if not re.fullmatch(r"[^./\\]+", adapter_name):
        raise ValueError(f"an adapter is saved in a folder of its name: expected no . / or \\, got {adapter_name!r}")
    wrappers = [n for n, m in model.named_modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    inside = tuple(f"{name}." for name in wrappers)
    taken = {part for name in model.state_dict() if not name.startswith(inside) for part in name.split(".")}
    if adapter_name in taken | OWN_NAMES or hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(
            f"an adapter cannot be named {adapter_name!r}, as a part of the model is: PEFT could not tell their "
            "tensors apart in files"
        )


def is_inside(key: str, name: str) -> bool:
    """Whether a module of this name is the one of the other, or is in such a one."""
    return f".{name}." in f".{key}."


def check_exclusions(config: NTKAttentionConfig, routed: Sequence[str]) -> None:
    """Raise ValueError if `exclude_modules` means no attention module."""
    excluded = config.exclude_modules
    if not excluded:
        return
    names = [excluded] if isinstance(excluded, str) else sorted(excluded)
    for name in names:
        means = re.compile(name).fullmatch if isinstance(excluded, str) else partial(is_inside, name=name)
        if not any(means(key) for key in routed):
            raise ValueError(
                f"exclude_modules holds {name!r}, which means none of the attention modules, such as {routed[0]!r}"
            )


def embeddings_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The input and output embeddings, with their names, where the model has some."""
    found = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, name)())
        except (AttributeError, NotImplementedError):
            continue
    return [(name, module) for name, module in model.named_modules() if any(module is layer for layer in found)]


def describe(geometry: dict[str, Any]) -> str:
    sizes = ", ".join(
        f"{h} heads, {kv} KV heads, head_dim {d}, value dim {v}{f', feed-forward width {D}' if D else ''}"
        for h, kv, d, v, D in geometry["sizes"]
    )
    return f"{geometry['num_modules']} attention modules ({sizes})"


def shortest_suffixes(wanted: list[str], others: list[str]) -> set[str]:
    """The shortest dotted suffixes that match all wanted module names and none of the others."""
    suffixes = set()
    for name in wanted:
        parts = name.split(".")
        candidates = (".".join(parts[i:]) for i in reversed(range(len(parts))))
        suffixes.add(next(s for s in candidates if not any(o == s or o.endswith("." + s) for o in others)))
    return suffixes
