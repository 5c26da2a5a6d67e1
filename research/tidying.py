"""Rows that results keep: those that tables and figures read, each once, what neighbours share written once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from research.benchmarks.registry import BENCHMARKS
from research.benchmarks.rows import latest
from research.recording import Row, read, rounded, write

from .experiments import develop, positions
from .experiments.methods import METHODS
from .experiments.registry import registry
from .experiments.rows import MADE, kept
from .experiments.statistics import collect, newest
from .theory import EXPERIMENTS, thinned

Choice = Callable[[list[Row]], Iterable[Row]]
CELLS = ("task", "method", "stage", *MADE)
MEASURED = ("hardware", "versions", "commit")
CONVERSIONS = ("accuracy", "documents", "facts", "prefix_tuning")
CONVERTED = ("d", "entry_bound", "L", "map", "text", *MEASURED)
OF_THEORY = ("experiment", "kind", "varied", "direction", "inputs", "sigma", "n", "d", "m", "map", "start")


def tidy(results: Path) -> dict[Path, tuple[int, int]]:
    """Write every file of rows in this folder anew; the sizes of each, in bytes, before and after."""
    choices: dict[Path, tuple[Choice, tuple[str, ...]]] = {
        results / "experiments" / "rows.jsonl": (of_comparison, CELLS),
        results / "experiments" / develop.ROWS: (cells, CELLS),
        results / "experiments" / positions.ROWS: (cells, CELLS),
        **{results / "benchmarks" / f"{name}.jsonl": (latest, MEASURED) for name in BENCHMARKS},
        **{results / "conversion" / f"{name}.jsonl": (shortened, CONVERTED) for name in CONVERSIONS},
        **{results / "theory" / f"{name}.jsonl": (of_theory, OF_THEORY) for name in EXPERIMENTS},
    }
    sizes = {}
    for path, (choice, together) in choices.items():
        if path.exists():
            before = path.stat().st_size
            write(path, choice(read(path)), together)
            sizes[path] = before, path.stat().st_size
    return sizes


def cells(rows: list[Row]) -> list[Row]:
    """The newest of equal ones, methods of a task beside each other."""
    tasks, methods = list(registry()), list(METHODS)
    known = [kept(row) for row in newest(rows) if row["task"] in tasks and row["method"] in methods]
    return sorted(known, key=lambda row: (tasks.index(row["task"]), methods.index(row["method"]), row["stage"]))


def of_comparison(rows: list[Row]) -> list[Row]:
    """What `collect` reads. Of final runs at another rate than the chosen one it reads only that there were some."""
    found = []
    results = collect(rows, registry())
    for row in cells(rows):
        result = results.get(row["task"], {}).get(row["method"])
        if result is None or row["steps"] != result.task.steps:
            continue
        if row["stage"] == "final":
            if row["seed"] not in result.task.final_seeds:
                continue
            if row["learning_rate"] != result.rate:
                row.pop("test_correct", None)
        elif row["stage"] == "select" and row["seed"] not in result.task.selection_seeds:
            continue
        found.append(row)
    return found


def shortened(rows: list[Row]) -> list[Row]:
    return [rounded(row) for row in rows]


def of_theory(rows: list[Row]) -> list[Row]:
    """With fewer points of curves; rows that differ in what is measured alone lie beside each other."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in OF_THEORY), []).append(rounded(thinned(row)))
    return [row for own in groups.values() for row in own]
