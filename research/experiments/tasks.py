"""What a task is. Those that there are stand in registry.py."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .steps import Loss, own_loss

Batch = dict[str, torch.Tensor]


@dataclass
class Base:
    """A pretrained model as it was loaded, which every cell copies, and what goes with it."""

    model: nn.Module
    tokenizer: Any = None
    source_head: nn.Module | None = None  # what a picture model was pretrained with
    kept: dict[str, Any] = field(default_factory=dict)  # what depends on nothing else, and cells would make again


@dataclass(frozen=True)
class Score:
    """On one split: the loss, the share of items that are right, where items can be, and of exact completions.

    parts: the share of right items in each part of the split, where it has several.
    """

    loss: float
    share: float | None = None
    correct: Sequence[bool] | None = None
    exact: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Task(ABC):
    """One model on one data set.

    Args:
        group: of tasks that ask the same question.
        model: an asset, a folder or a name on the hub.
        data: likewise.
        steps, batch_size: of training, the same for every method.
        calibration_batches: how many training batches calibration sees.
    """

    name: str
    group: str
    model: str
    data: str
    steps: int
    batch_size: int
    calibration_batches: int = 4

    metric = "accuracy"
    higher_is_better = True
    has_head = False  # a new classifier on top, trained by every method
    sees_pictures = False  # where the library's steps fall with depth

    @property
    def selection_seeds(self) -> tuple[int, ...]:
        """Of the runs that choose a learning rate, by validation data."""
        return (0,)

    @property
    def final_seeds(self) -> tuple[int, ...]:
        """Of the runs at the chosen rate, which see the test data."""
        return (1, 2, 3)

    @abstractmethod
    def check(self) -> None:
        """Raise ValueError if the model or the data are missing."""

    def warm_up(self) -> None:  # noqa: B027
        """What is to be done once, before several processes load the model. Nothing, unless a task says otherwise."""

    @abstractmethod
    def load(self, device: str) -> Base: ...

    @abstractmethod
    def examples(self, base: Base, split: str, seed: int) -> Sequence[Any]:
        """Of one split. Only few-shot training examples depend on the seed."""

    @abstractmethod
    def batch(self, base: Base, examples: Sequence[Any]) -> Batch:
        """Keyword arguments of the model, labels included, on the CPU."""

    def loss(self, batches: Sequence[Sequence[Any]]) -> Loss:
        """How a model's loss on a training batch is computed, given the examples of all that there will be."""
        return own_loss

    @abstractmethod
    def score(self, base: Base, model: nn.Module, examples: Sequence[Any], with_answers: bool) -> Score:
        """With answers where the metric needs generation; selection does without, by the loss."""

    def scores_beside(self, base: Base, model: nn.Module) -> dict[str, float]:
        """Of the tests of other data that final runs see too."""
        return {}

    @abstractmethod
    def unrelated_loss(self, base: Base, model: nn.Module) -> float | None:
        """A loss that the base model was pretrained for, on data that have nothing to do with the task; or none."""

    @abstractmethod
    def unrelated_batches(self, base: Base) -> list[Batch]:
        """Inputs that have nothing to do with the task."""

    def fresh(self, base: Base, seed: int) -> nn.Module:
        """A copy of the base model to adapt."""
        return copy.deepcopy(base.model)
