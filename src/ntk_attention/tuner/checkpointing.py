"""Reentrant activation checkpointing beside adapters.

It gives no gradient to what lies inside a checkpointed layer unless an input of the layer has one. Frozen embeddings
make inputs without; transformers lets them ask for one, but for embeddings that it finds, which are not those of every
tower.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

FUNCTION = "_gradient_checkpointing_func"  # of transformers, on each module that checkpoints


def let_inputs_have_gradients(names: Iterable[str], model: nn.Module, *_: Any) -> None:
    """Before a call of the model: make the inputs of checkpointed layers ask for a gradient.

    Args:
        names: of the model's attention modules with adapters.
        model: of transformers.
    """
    if torch.compiler.is_compiling() or not (model.training and torch.is_grad_enabled()):
        return
    if not getattr(model, "is_gradient_checkpointing", False):
        return
    for module in around(model, names):
        function = getattr(module, FUNCTION, None)
        if isinstance(function, partial) and function.keywords.get("use_reentrant"):
            setattr(module, FUNCTION, partial(call_with_gradients, function))


def stop(names: Iterable[str], model: nn.Module) -> None:
    """Undo it."""
    for module in around(model, names):
        function = getattr(module, FUNCTION, None)
        if isinstance(function, partial) and function.func is call_with_gradients:
            setattr(module, FUNCTION, function.args[0])


def call_with_gradients(checkpoint: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a checkpointing function of torch, with an input that asks for a gradient where none does."""
    if torch.is_grad_enabled() and not any(isinstance(x, Tensor) and x.requires_grad for x in args):
        place = next((i for i, x in enumerate(args) if isinstance(x, Tensor) and x.is_floating_point()), None)
        if place is not None:
            args = (*args[:place], args[place].detach().requires_grad_(), *args[place + 1 :])
    return checkpoint(function, *args, **kwargs)


def around(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """The modules that hold some of these, the innermost last; the model itself first."""
    found = {name[:i] for name in names for i, letter in enumerate(name) if letter == "."}
    return [model, *(model.get_submodule(name) for name in sorted(found))]
