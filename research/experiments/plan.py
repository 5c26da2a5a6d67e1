"""Which cells are to be run next: learning rates first, on validation data, then seeds at the chosen one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from statistics import fmean

from research.recording import Row

from . import develop, positions
from .methods import METHODS
from .tasks import Task
from .train import Cell

MOST_TRIES = 2  # of a cell that fails, in one run
MAX_EXTENSIONS = 4  # rates added at an end of the grid while the best one is there


def pairs(tasks: Sequence[Task], methods: Sequence[str]) -> list[tuple[Task, str]]:
    """Tasks and methods, the most informative first: the first task of each group with the methods of tier 0."""
    places: dict[str, int] = {}
    ranks = {}
    for task in tasks:
        ranks[task.name] = places.get(task.group, 0)
        places[task.group] = ranks[task.name] + 1
    found = [(task, method) for task in tasks for method in methods if METHODS[method].only(task)]
    return sorted(found, key=lambda pair: (METHODS[pair[1]].tier + ranks[pair[0].name], METHODS[pair[1]].tier))


def next_cells(rows: Iterable[Row], task: Task, method: str, seeds: int | None = None) -> list[Cell]:
    """Of one task and method, what can be run now that is not in the rows; the first `seeds` final ones, or all."""
    own = [row for row in rows if belongs(row, task, method)]
    if not METHODS[method].rates:
        return [] if any(row["stage"] == "final" for row in own) else untrained_cells(task, method, "final")
    selected = [row for row in own if row["stage"] == "select"]
    tried = {(row["learning_rate"], row["seed"]) for row in selected}
    rates = list(METHODS[method].rates)
    more = sorted({rate for rate, _ in tried} - set(rates))
    missing = untried(task, method, rates + more, tried)
    if missing:
        return missing
    if not all(is_result(row) for row in selected):  # the choice would rest on what is left
        return []
    best = best_rate(task, selected)
    if best is None:  # nothing works: no final runs
        return []
    if best in (min(rates + more), max(rates + more)):
        up = best == max(rates + more)
        beyond = [rate for rate in more if (rate > max(rates) if up else rate < min(rates))]
        if len(beyond) < MAX_EXTENSIONS:
            return untried(task, method, [neighbour(best, up)], tried)
    done = {row["seed"] for row in own if row["stage"] == "final" and row["learning_rate"] == best}
    return [Cell(task.name, method, best, seed, "final") for seed in task.final_seeds[:seeds] if seed not in done]


def untried(task: Task, method: str, rates: Iterable[float], tried: Collection[tuple[float, int]]) -> list[Cell]:
    pairs = [(rate, seed) for rate in rates for seed in task.selection_seeds if (rate, seed) not in tried]
    return [Cell(task.name, method, rate, seed, "select") for rate, seed in pairs]


def untrained_cells(task: Task, method: str, stage: str) -> list[Cell]:
    """Of a method that trains nothing: no rate and no seed makes a difference."""
    return [Cell(task.name, method, 0.0, task.final_seeds[0], stage)]


def timing_cells(rows: Iterable[Row], task: Task, method: str) -> list[Cell]:
    done = any(belongs(row, task, method) and row["stage"] == "time" for row in rows)
    return (
        []
        if done or not METHODS[method].rates
        else [Cell(task.name, method, METHODS[method].rates[0], task.selection_seeds[0], "time")]
    )


def position_cells(
    rows: Iterable[Row], task: Task, methods: Iterable[str], rates: Sequence[float], seeds: int
) -> list[Cell]:
    """Of the experiment on positions, what is not in the rows."""
    rows = [row for row in rows if row["task"] == task.name and row["steps"] == task.steps]
    done = {(row["method"], row["learning_rate"], row["seed"]) for row in rows}
    wanted = [(method, rate, seed) for seed in range(seeds) for rate in rates for method in methods]
    return [Cell(task.name, *cell, positions.STAGE) for cell in wanted if cell not in done]


def develop_cells(
    rows: Iterable[Row], task: Task, method: str, rates: Sequence[float] | None, seeds: int
) -> list[Cell]:
    """Of one task and method, what has no result in the rows and has not failed twice; by default at its own rates."""
    tries: Counter[tuple[float, int]] = Counter()
    for row in rows:
        if belongs(row, task, method):
            tries[row["learning_rate"], row["seed"]] += MOST_TRIES if is_result(row) else 1
    wanted = [
        Cell(task.name, method, rate, seed, develop.STAGE)
        for seed in range(seeds)
        for rate in rates or METHODS[method].rates
    ]
    if not METHODS[method].rates:
        wanted = untrained_cells(task, method, develop.STAGE)
    return [cell for cell in wanted if tries[cell.learning_rate, cell.seed] < MOST_TRIES]


def is_result(row: Row) -> bool:
    """Whether its cell is done: also if the loss was not finite, or it cannot have its size; other errors may pass."""
    return "error" not in row or row["error"].startswith(("the loss is not finite", "ValueError: no ranks give"))


def belongs(row: Row, task: Task, method: str) -> bool:
    """Whether a row is of this task as it is now; those of failures do not say their batches."""
    own = (row["task"], row["method"], row.get("steps"), row.get("batch_size", task.batch_size))
    return own == (task.name, method, task.steps, task.batch_size)


def best_rate(task: Task, selected: Iterable[Row]) -> float | None:
    """By the validation data: a language model's smallest loss, a classifier's largest accuracy and then loss."""
    scored = {rate: score for rate, score in validation(task, selected).items() if score is not None}
    return max(scored, key=lambda rate: quality(scored[rate])) if scored else None


def validation(task: Task, selected: Iterable[Row]) -> dict[float, dict[str, float] | None]:
    """Scores on validation data by learning rate, averaged over the seeds of the selection; None if one has failed.

    Rates that not all of these seeds have tried are left out.
    """
    by_rate: dict[float, dict[int, dict[str, float] | None]] = {}
    for row in selected:
        if row["seed"] in task.selection_seeds:
            by_rate.setdefault(row["learning_rate"], {})[row["seed"]] = row.get("validation")
    whole = {rate: scores for rate, scores in sorted(by_rate.items()) if len(scores) == len(task.selection_seeds)}
    return {rate: average(list(scores.values())) for rate, scores in whole.items()}


def average(scores: Sequence[dict[str, float] | None]) -> dict[str, float] | None:
    found = [score for score in scores if score is not None]
    if len(found) < len(scores):
        return None
    return {name: fmean(score[name] for score in found) for name in found[0]}


def quality(score: dict[str, float]) -> tuple[float, float]:
    return score.get("share", 0.0), -score["loss"]


def neighbour(rate: float, up: bool) -> float:
    """The next of ..., 1e-3, 3e-3, 1e-2, ..."""
    exponent = round(2 * math.log10(rate)) + (1 if up else -1)
    return float(f"{(1 if exponent % 2 == 0 else 3) * 10.0 ** (exponent // 2):.0e}")
