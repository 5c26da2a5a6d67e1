"""The rows of results: one JSON line per method and sizes, with what a reader needs to judge it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from research.recording import Row, append, commit, hardware, read, versions

from .timing import Result

SOURCES = ("src", "research/benchmarks")
SEED = 0


class Recorder:
    """Writes the rows of one benchmark, and knows which are there already."""

    def __init__(self, folder: Path, benchmark: str, device: str, again: bool = False):
        self.path = folder / f"{benchmark}.jsonl"
        self.constant: Row = {
            "benchmark": benchmark,
            "hardware": hardware(device),
            "versions": versions(),
            "commit": commit(*SOURCES),
            "seed": SEED,
        }
        self.seen = set() if again else {identity(row) for row in read(self.path)}

    def has(self, method: str, sizes: dict[str, Any]) -> bool:
        return identity({**self.constant, "method": method, "sizes": sizes}) in self.seen

    def add(self, method: str, sizes: dict[str, Any], clock: str, result: Result) -> None:
        times = result.milliseconds
        row: Row = {**self.constant, "method": method, "sizes": sizes, "clock": clock}
        if result.error:
            row["error"] = result.error
        elif times:
            row["milliseconds"] = {
                "median": round(statistics.median(times), 5),
                "min": round(min(times), 5),
                "max": round(max(times), 5),
                "repetitions": len(times),
            }
            row["peak_memory_bytes"] = result.peak_memory_bytes
            row["held_memory_bytes"] = result.held_memory_bytes
        row["figures"] = result.figures
        append(self.path, row)


def identity(row: Row) -> str:
    names = ("benchmark", "method", "sizes", "hardware", "commit", "seed")
    return json.dumps([row[name] for name in names], sort_keys=True)


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each method, sizes and hardware, whatever the commit."""
    return list({identity({**row, "commit": ""}): row for row in rows}.values())
