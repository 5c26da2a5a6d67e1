"""What the experiments have in common: sizes, seeds, rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..progress import Reporter

Row = dict[str, Any]  # one measurement: one line of JSON


@dataclass(frozen=True)
class Setting:
    """Sizes of an experiment; each experiment says in its docstring what it does with them.

    Raises:
        ValueError: if a size is not positive.
    """

    n: int = 8  # samples
    d: int = 8  # dimension
    sigma: float = 1.0  # of W(0)
    largest: int = 16  # log2 of the largest m
    draws: int = 5  # of W(0)
    inputs: str = "random"  # or "image"
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n", "d", "sigma", "draws"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.inputs not in ("random", "image"):
            raise ValueError(f"inputs must be 'random' or 'image', got {self.inputs!r}")
        if not 8 <= self.largest <= 24:
            raise ValueError(f"the largest m must be 2^8 to 2^24, got 2^{self.largest}")

    def generator(self, stream: int = 0) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(1000 * self.seed + stream)


Loader = Callable[[], tuple[Any, Any]]  # of a causal language model in float32 and its tokenizer
Experiment = Callable[[Setting, Reporter, Loader], list[Row]]  # few look at a model
