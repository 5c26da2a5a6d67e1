"""The rows of results: one JSON line per method and sizes, with what a reader needs to judge it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .timing import Result

ROOT = Path(__file__).parent.parent
SOURCES = ("src", "benchmarks")
SEED = 0

Row = dict[str, Any]


def hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{names[0] if names else platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "peft"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """NTK_COMMIT where it is set; else the commit, with "-dirty-" and a digest if the sources have changed since."""
    if "NTK_COMMIT" in os.environ:
        return os.environ["NTK_COMMIT"]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        head, changes = git("rev-parse", "--short=10", "HEAD"), git("status", "--porcelain", "--", *SOURCES)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-dirty-{digest()}" if changes else head


def digest() -> str:
    paths = sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:8]


class Recorder:
    """Writes the rows of one benchmark, and knows which are there already."""

    def __init__(self, folder: Path, benchmark: str, device: str, again: bool = False):
        self.path = folder / f"{benchmark}.jsonl"
        self.constant: Row = {
            "benchmark": benchmark,
            "hardware": hardware(device),
            "versions": versions(),
            "commit": commit(),
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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def identity(row: Row) -> str:
    names = ("benchmark", "method", "sizes", "hardware", "commit", "seed")
    return json.dumps([row[name] for name in names], sort_keys=True)


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each method, sizes and hardware, whatever the commit."""
    return list({identity({**row, "commit": ""}): row for row in rows}.values())
