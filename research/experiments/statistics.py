"""From rows to results: the chosen learning rate, mean and deviation over seeds, paired differences."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from research.recording import Row

from .methods import METHODS
from .plan import best_rate, is_result, validation
from .rows import SETTING
from .tasks import Task
from .train import unpacked

# Student's t, two-sided 95 %, by degrees of freedom; above 15 the normal's, which is at most 8 % smaller
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
Z95 = 1.960


@dataclass
class Result:
    """One method on one task."""

    task: Task
    method: str
    selected: list[Row] = field(default_factory=list)  # on validation data
    finals: dict[int, Row] = field(default_factory=dict)  # by seed, at the chosen rate
    diverged: set[int] = field(default_factory=set)  # seeds of final runs at that rate whose loss was not finite
    tested: set[float] = field(default_factory=set)  # rates at which test data were seen
    timed: Row | None = None

    @property
    def rate(self) -> float | None:
        """The chosen one; 0 of a method that trains nothing."""
        return best_rate(self.task, self.selected) if METHODS[self.method].rates else 0.0

    @property
    def validation(self) -> dict[float, dict[str, float] | None]:
        """By learning rate that all seeds have tried, averaged over them; None if one has failed."""
        return validation(self.task, self.selected)

    @property
    def complete(self) -> bool:
        """All seeds have run, of the selection and of the test."""
        rates = {row["learning_rate"] for row in self.selected}
        tried = bool(rates) and rates <= self.validation.keys()
        return tried and (self.rate is None or set(self.task.final_seeds) <= self.finals.keys() | self.diverged)

    @property
    def at_end(self) -> str:
        """An arrow if the chosen rate is the largest or the smallest of those tried."""
        tried = self.validation.keys()
        return "" if not self.rate else "↑" if self.rate == max(tried) else "↓" if self.rate == min(tried) else ""

    @property
    def any_row(self) -> Row:
        rows = [*self.finals.values(), *self.selected, *([self.timed] if self.timed else [])]
        return next((row for row in rows if "trainable_parameters" in row), rows[0])

    def values(self) -> dict[int, float]:
        """The test metric by seed."""
        return {seed: metric(row["test"]) for seed, row in sorted(self.finals.items())}

    @property
    def mean(self) -> float | None:
        """None also if a run has diverged: the mean of the others would flatter."""
        values = self.values()
        return statistics.fmean(values.values()) if values and not self.diverged else None

    @property
    def deviation(self) -> float | None:
        values = self.values()
        return statistics.stdev(values.values()) if len(values) > 1 else None

    def average(self, name: str) -> float | None:
        found = [row[name] for row in self.finals.values() if row.get(name) is not None]
        return statistics.fmean(found) if found else None


def metric(score: dict[str, float]) -> float:
    return score.get("share", score["loss"])


def newest(rows: Iterable[Row]) -> list[Row]:
    """Of rows with equal settings the last one that is a result."""
    return list({json.dumps([row.get(name) for name in SETTING]): row for row in rows if is_result(row)}.values())


def collect(rows: Iterable[Row], tasks: dict[str, Task]) -> dict[str, dict[str, Result]]:
    """Results by task and method. Of rows with equal settings the last one that is a result counts."""
    latest = newest(rows)
    found: dict[str, dict[str, Result]] = {}
    for row in latest:
        task = tasks.get(row["task"])
        if task is None or row.get("steps") != task.steps or row["method"] not in METHODS:
            continue
        result = found.setdefault(task.name, {}).setdefault(row["method"], Result(task, row["method"]))
        if row["stage"] == "select":
            result.selected.append(row)
        elif row["stage"] == "time" and "error" not in row:
            result.timed = row
    for row in latest:
        result_ = found.get(row["task"], {}).get(row["method"])
        if row["stage"] != "final" or result_ is None or row["seed"] not in result_.task.final_seeds:
            continue
        if "test" in row:
            result_.tested.add(row["learning_rate"])
        if row["learning_rate"] == result_.rate and "test" in row:
            result_.finals[row["seed"]] = row
        elif row["learning_rate"] == result_.rate:
            result_.diverged.add(row["seed"])
    return {name: found[name] for name in tasks if name in found}


@dataclass(frozen=True)
class Difference:
    """Ours minus another method, in units of the test metric, turned so that positive is better."""

    mean: float
    by_seeds: float | None  # half width of the 95 % interval from the differences of equal seeds
    by_items: float | None  # the same from the test items, each averaged over the seeds
    seeds: int
    relative: float  # to the other's mean


def difference(ours: Result, other: Result) -> Difference | None:
    """Over the seeds that both have; None without, or if runs have diverged."""
    a, b = ours.values(), other.values()
    seeds = [seed for seed in a if seed in b]
    if not seeds or ours.diverged or other.diverged:
        return None
    sign = 1 if ours.task.higher_is_better else -1
    differences = [sign * (a[seed] - b[seed]) for seed in seeds]
    mean, reference = statistics.fmean(differences), statistics.fmean(b[seed] for seed in seeds)
    relative = mean / abs(reference) if reference else math.copysign(math.inf, mean) if mean else 0.0
    return Difference(mean, half_width(differences), over_items(ours, other, seeds), len(seeds), relative)


def same_passages(ours: Result, other: Result) -> bool:
    """Whether all final runs forgot the same unrelated data: the base model has equal losses on them."""
    finals = [*ours.finals.values(), *other.finals.values()]
    before = [row["unrelated_loss_before"] for row in finals if row.get("unrelated_loss_before") is not None]
    return not before or math.isclose(min(before), max(before), rel_tol=1e-3)


def half_width(values: Sequence[float]) -> float | None:
    n = len(values)
    if n < 2:
        return None
    t = T95[n - 2] if n - 2 < len(T95) else Z95
    return t * statistics.stdev(values) / math.sqrt(n)


def over_items(ours: Result, other: Result, seeds: Sequence[int]) -> float | None:
    pairs = [(ours.finals[seed].get("test_correct"), other.finals[seed].get("test_correct")) for seed in seeds]
    data = {result.finals[seed].get("data_digest") for result in (ours, other) for seed in seeds} - {None}
    if not all(a and b for a, b in pairs) or len(data) > 1:  # other data, other items
        return None
    columns = [[x - y for x, y in zip(unpacked(a), unpacked(b), strict=True)] for a, b in pairs]
    items = [statistics.fmean(item) for item in zip(*columns, strict=True)]
    return Z95 * statistics.stdev(items) / math.sqrt(len(items)) if len(items) > 1 else None


def best_of(results: dict[str, Result], names: Iterable[str]) -> Result | None:
    """By the mean of the test metric, of those that have one."""
    scored: list[Any] = [results[name] for name in names if name in results and results[name].mean is not None]
    if not scored:
        return None
    return (max if scored[0].task.higher_is_better else min)(scored, key=lambda result: result.mean)
