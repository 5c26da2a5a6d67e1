"""Which cells are to be run next: learning rates first, on validation data, then seeds at the chosen one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from recording import Row

from .methods import METHODS
from .tasks import Task
from .train import Cell

SELECTION_SEED = 0
FINAL_SEEDS = (1, 2, 3)
MAX_EXTENSIONS = 2  # rates added where the best one is at an end of the grid


def pairs(tasks: Sequence[Task], methods: Sequence[str]) -> list[tuple[Task, str]]:
    """Tasks and methods, the most informative first: the first task of each group with the methods of tier 0."""
    places: dict[str, int] = {}
    ranks = {}
    for task in tasks:
        ranks[task.name] = places.get(task.group, 0)
        places[task.group] = ranks[task.name] + 1
    found = [(task, method) for task in tasks for method in methods if METHODS[method].only(task)]
    return sorted(found, key=lambda pair: (METHODS[pair[1]].tier + ranks[pair[0].name], METHODS[pair[1]].tier))


def next_cells(rows: Iterable[Row], task: Task, method: str, seeds: Sequence[int] = FINAL_SEEDS) -> list[Cell]:
    """Of one task and method, what can be run now that is not in the rows."""
    own = [row for row in rows if belongs(row, task, method)]
    tried = {row["learning_rate"]: row for row in own if row["stage"] == "select"}
    rates = METHODS[method].rates
    missing = [rate for rate in rates if rate not in tried]
    if not missing:
        best = best_rate(task, tried.values())
        if best is None:  # nothing works: no final runs
            return []
        if len(tried) < len(rates) + MAX_EXTENSIONS and best in (min(tried), max(tried)):
            missing = [neighbour(best, up=best == max(tried))]
        else:
            done = {row["seed"] for row in own if row["stage"] == "final" and row["learning_rate"] == best}
            return [Cell(task.name, method, best, seed, "final") for seed in seeds if seed not in done]
    return [Cell(task.name, method, rate, SELECTION_SEED, "select") for rate in missing]


def timing_cells(rows: Iterable[Row], task: Task, method: str) -> list[Cell]:
    done = any(belongs(row, task, method) and row["stage"] == "time" for row in rows)
    return [] if done else [Cell(task.name, method, METHODS[method].rates[0], SELECTION_SEED, "time")]


def belongs(row: Row, task: Task, method: str) -> bool:
    """Whether a row is of this task as it is now."""
    return (row["task"], row["method"], row.get("steps")) == (task.name, method, task.steps)


def best_rate(task: Task, selected: Iterable[Row]) -> float | None:
    """By the validation data: a language model's smallest loss, a classifier's largest accuracy and then loss."""
    scored = [row for row in selected if "validation" in row]
    return max(scored, key=lambda row: quality(row["validation"]))["learning_rate"] if scored else None


def quality(validation: dict[str, float]) -> tuple[float, float]:
    return validation.get("share", 0.0), -validation["loss"]


def neighbour(rate: float, up: bool) -> float:
    """The next of ..., 1e-3, 3e-3, 1e-2, ..."""
    exponent = round(2 * math.log10(rate)) + (1 if up else -1)
    return float(f"{(1 if exponent % 2 == 0 else 3) * 10.0 ** (exponent // 2):.0e}")
