"""A benchmark is a list of cases; a case is a group of methods that are compared on the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .rows import SEED, Recorder
from .timing import Clock, Prepared, measure, release


@dataclass
class Case:
    """Methods that run interleaved.

    Args:
        sizes: what identifies the case in its rows, next to the name of the method.
        methods: by name; each prepares itself from what `shared` returned.
        shared: makes the common inputs; called with the random generator at its seed.
        clock, repetitions, budget_ms: see `timing.measure`.
    """

    sizes: dict[str, Any]
    methods: dict[str, Callable[[Any], Prepared]]
    shared: Callable[[], Any]
    clock: Clock = "gpu"
    repetitions: int = 20
    budget_ms: float = 600.0

    def run(self, recorder: Recorder, device: str) -> None:
        """Measure what is missing of it."""
        missing = {name: setup for name, setup in self.methods.items() if not recorder.has(name, self.sizes)}
        if not missing:
            return
        release(device)  # what the case before left
        torch.manual_seed(SEED)
        shared = self.shared()
        clock: Clock = self.clock if device == "cuda" else "wall"
        setups = {name: partial(setup, shared) for name, setup in missing.items()}
        for name, result in measure(setups, device, clock, self.repetitions, self.budget_ms).items():
            recorder.add(name, self.sizes, clock, result)
