"""Modules that train and are saved beside an adapter, as `modules_to_save` and PEFT have it; and embeddings."""

from __future__ import annotations

from collections.abc import Iterable

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .config import NTKAttentionConfig

# What PEFT adds to modules_to_save, whether the model has it or not; for these task types only after it injected.
HEADS = {"TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}


def modules_to_save(model: nn.Module, config: NTKAttentionConfig) -> dict[str, nn.Module]:
    """Modules that PEFT will train and save besides the states, by its rule: their names end like this."""
    ends = tuple(config.modules_to_save or ())
    wrappers = [n for n, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    return {
        name: module.original_module if name in wrappers else module
        for name, module in model.named_modules(remove_duplicate=False)
        if ends and name.endswith(ends) and not any(name.startswith(f"{wrapper}.") for wrapper in wrappers)
    }


def check_modules_to_save(model: nn.Module, config: NTKAttentionConfig, adapted: Iterable[str]) -> None:
    """Raise ValueError if PEFT would not find or could not copy one of them, or it overlaps another or what is adapted.

    Args:
        model: of transformers.
        config: whose `modules_to_save` these are.
        adapted: names of the modules that the adapter has a prefix for.
    """
    modules = modules_to_save(model, config)
    for name in config.modules_to_save or ():
        is_added = any(name in heads for heads in HEADS.values())
        if not is_added and not any(found.endswith(name) for found in modules):
            raise ValueError(f"modules_to_save holds {name!r}, but {type(model).__name__} has no such module")
    for name, module in modules.items():
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            raise ValueError(f"modules_to_save means {name}, a {type(module).__name__}, which PEFT cannot copy")
        for other in (*adapted, *(other for other in modules if other != name)):
            if f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}."):
                raise ValueError(f"modules_to_save means {name}, which overlaps {other}: expected modules apart")


def embeddings_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The input and output embeddings, with their names, where the model has some."""
    found = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, name)())
        except (AttributeError, NotImplementedError):
            continue
    return [(name, module) for name, module in model.named_modules() if any(module is layer for layer in found)]


def embedding_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that PEFT adds to a file when tokens were added to the model."""
    return {
        f"base_model.model.{name}.{part}{tensor}": tuple(x.shape)
        for name, layer in embeddings_of(model)
        for tensor, x in layer.state_dict().items()
        for part in ("", "original_module.")  # the second one where they train
    }
