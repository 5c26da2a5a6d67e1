"""Which attention modules of a model get a prefix, which do not, and why."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule, check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .config import NTKAttentionConfig
from .coverage import other_attention
from .geometry import geometry_of, is_pair, named
from .routing import CHILD, check_implementation, check_routes, routes

GENERATING = ("CAUSAL_LM", "SEQ_2_SEQ_LM")  # task types whose PEFT model needs a model that generates
# Parts of the names of an adapter's own tensors.
OWN_NAMES = {CHILD, "Z", "Z_A", "Z_B", "log_k", "log_scale", "k_signed", "feature_map", "feed_forward", "projection"}


@dataclass(frozen=True)
class Targets:
    """The attention modules of a model, by what a config says of them.

    Args:
        names: of those that get a prefix, in the order of the model; at least one.
        suffixes: what `target_modules` must hold to mean them, where the config leaves it to the model.
        left_out: class of every other one and why it gets none, by name.
    """

    names: list[str]
    suffixes: set[str]
    left_out: dict[str, tuple[str, str]]


def find_targets(model: nn.Module, config: NTKAttentionConfig) -> Targets:
    """The attention modules that a config means; neither it nor the model is changed.

    Raises:
        ValueError: if there is none, or one that was named does not route or cannot have a prefix.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    routed = [name for name, module in modules.items() if routes(module)]
    left_out = other_attention(model, routed, CHILD)
    if not routed:
        found = [f"{name} ({kind})" for name, (kind, _) in left_out.items()]
        raise ValueError(
            f"{type(model).__name__} has no module that routes through the attention interface of transformers; "
            f"found: {', '.join(found[:3]) or 'no attention module'}"
        )
    suffixes: set[str] = set()
    if config.target_modules is None:
        odd = {name: reason for name in routed if (reason := reason_to_leave_out(modules[name], name))}
        if len(odd) == len(routed):
            raise ValueError(next(iter(odd.values())))
        for name, reason in odd.items():
            left_out[name] = (type(modules[name]).__name__, reason.removeprefix(f"{named(modules[name], name)} "))
        wanted = [name for name in routed if name not in odd]
        suffixes = shortest_suffixes(wanted, [name for name in modules if name not in wanted])
        config = replace(config, target_modules=suffixes)
    check_exclusions(config, routed)
    names = [name for name in modules if CHILD not in name.split(".") and is_target(config, name) is True]
    check_targets(names, modules, model)
    for name in routed:
        if name not in names and name not in left_out:
            left_out[name] = (type(modules[name]).__name__, "left out by the config")
    return Targets(names, suffixes, left_out)


def check_targets(names: Sequence[str], modules: Mapping[str, nn.Module], model: nn.Module) -> None:
    """Raise ValueError if there are none, or one does not route its attention through transformers as we read it."""
    if not names:
        raise ValueError(
            "what target_modules, exclude_modules, modules_to_save and layers_to_transform leave was not found in "
            f"{type(model).__name__}: expected at least one attention module"
        )
    for name in names:
        check_routes(modules[name], name)
        check_implementation(modules[name], name)


def is_target(config: NTKAttentionConfig, name: str) -> Any:
    """PEFT's answer to whether a config means a module: a bool, or a mark of what `exclude_modules` takes out.

    A name in `exclude_modules` means what is inside of such a module, too.
    """
    excluded = config.exclude_modules
    if isinstance(excluded, set | list | tuple) and any(is_inside(name, other) for other in excluded):
        return _ExcludedModule()
    found = check_target_module_exists(config, name)
    return found if isinstance(found, _ExcludedModule) else bool(found)


def check_task(model: nn.Module, config: NTKAttentionConfig) -> None:
    """Raise ValueError for a task as which PEFT could not call the model."""
    task = config.task_type
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


def shortest_suffixes(wanted: list[str], others: list[str]) -> set[str]:
    """The shortest dotted suffixes that match all wanted module names and none of the others."""
    suffixes = set()
    for name in wanted:
        parts = name.split(".")
        candidates = (".".join(parts[i:]) for i in reversed(range(len(parts))))
        suffixes.add(next(s for s in candidates if not any(o == s or o.endswith("." + s) for o in others)))
    return suffixes
