"""What `benchmarks` and `experiments` share: rows of results as JSON lines, and where a number was made."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]  # of the repository

Row = dict[str, Any]
EACH = "each"  # of a line that holds several: what they do not share
DIGITS = 6  # of a stored number


def read(path: Path) -> list[Row]:
    """No rows without a file. Raises ValueError where a line is no JSON: a killed run may leave half of one."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            rows += rows_of(line)
        except (json.JSONDecodeError, AttributeError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: expected a row of JSON, got {line[:40]!r}; remove it") from error
    return rows


def rows_of(line: str) -> list[Row]:
    """One, or several that share what the line says once."""
    shared = json.loads(line)
    return [{**shared, **row} for row in shared.pop(EACH, [{}])]


def append(path: Path, row: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def write(path: Path, rows: Iterable[Row], together: Sequence[str]) -> None:
    """All rows anew, whole or not at all: neighbours that agree on what is named by `together` share a line.

    Such a line says once what is equal in all of its rows, and under EACH what is not.
    """
    lines = []
    for _, group in groupby(rows, key=lambda row: [row.get(name) for name in together]):
        own = list(group)
        first = own[0]
        shared = {k: x for k, x in first.items() if all(k in row and row[k] == x for row in own)}
        rest = [{k: x for k, x in row.items() if k not in shared} for row in own]
        line = first if len(own) == 1 else {**shared, EACH: rest}
        lines.append(json.dumps(line, separators=(",", ":")) + "\n")
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text("".join(lines))
    partial.replace(path)


def rounded(value: Any) -> Any:
    """A row, or a part of one, with DIGITS significant digits; shares stay exact, since equal ones are a tie."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {name: x if name == "share" else rounded(x) for name, x in value.items()}
    return [rounded(x) for x in value] if isinstance(value, list) else value


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
    for name in ("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "torchao"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit(*sources: str) -> str:
    """NTK_COMMIT where it is set; else the commit, with "-dirty-" and a digest if the folders have changed since."""
    if "NTK_COMMIT" in os.environ:
        return os.environ["NTK_COMMIT"]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        head, changes = git("rev-parse", "--short=10", "HEAD"), git("status", "--porcelain", "--", *sources)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-dirty-{digest(*sources)}" if changes else head


def digest(*sources: str) -> str:
    paths = sorted(path for folder in sources for path in (ROOT / folder).rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:8]


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Markdown, without the columns that are empty."""
    used = [i for i in range(len(head)) if any(line[i] for line in body)]
    lines = [[head[i] for i in used], ["---"] * len(used), *([line[i] for i in used] for line in body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
