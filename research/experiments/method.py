"""What a method of the comparison is, and what it may look at. Those that there are stand in methods.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .tasks import Base, Batch, Task

Budget = Callable[[nn.Module], int]  # trainable parameters of the methods of equal size


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
        rates: learning rates tried, at least four on a log grid; none where nothing is trained.
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
