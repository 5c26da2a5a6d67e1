"""The benchmarks by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

from . import adapters, attention, building, cpu, decode, figure3, generate, host, large, processes, training
from .runner import Case


@dataclass(frozen=True)
class Benchmark:
    module: ModuleType
    on_cpu: bool = False  # whatever device is asked for

    @property
    def cases(self) -> Callable[[str, bool], Sequence[Case | processes.Launch]]:
        """Of a device ("cuda" or "cpu") and whether the sizes are tiny."""
        return self.module.cases

    @property
    def summary(self) -> str:
        return (self.module.__doc__ or "").splitlines()[0]


BENCHMARKS = {
    "attention": Benchmark(attention),
    "figure3": Benchmark(figure3),
    "decode": Benchmark(decode),
    "generate": Benchmark(generate),
    "training": Benchmark(training),
    "large": Benchmark(large),
    "processes": Benchmark(processes),
    "adapters": Benchmark(adapters),
    "building": Benchmark(building),
    "cpu": Benchmark(cpu, on_cpu=True),
    "host": Benchmark(host),
}
