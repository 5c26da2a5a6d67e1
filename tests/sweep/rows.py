"""Rows of results as JSON lines, one for each model type, and which of them are still to be made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from research import recording

from .examine import SILENT
from .subject import UNCLEAR

Row = dict[str, Any]
COMPARED = ("torch", "transformers", "peft")
FOLDER = recording.ROOT / "results" / "sweep"
SOURCES = ("src/ntk_attention", "tests/sweep")
MADE = ("versions", "sources", "commit")  # what `stamp` says
READ = ("type", "class", "result", "reason", "adapted", "position_shift", *MADE)


def stamp() -> Row:
    """What a row depends on: the versions of libraries, and the sources of the library and of the checks."""
    found = recording.versions()
    return {
        "versions": {name: found[name] for name in COMPARED if name in found},
        "sources": recording.digest(*SOURCES),
        "commit": recording.commit(*SOURCES),
    }


def default_path() -> Path:
    """Rows of one version of transformers are in one file."""
    return FOLDER / f"transformers-{recording.versions()['transformers']}.jsonl"


def read(path: Path) -> dict[str, Row]:
    """The newest row of each model type. A killed run may leave half a line at the end, which does not count."""
    if not path.exists():
        return {}
    lines = path.read_text().splitlines()
    rows = {}
    for number, line in enumerate(lines, 1):
        try:
            rows |= {row["type"]: row for row in recording.rows_of(line)}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: expected a row of the sweep, got {line[:40]!r}") from error
    return rows


def write(path: Path, rows: dict[str, Row]) -> None:
    """Whole or not at all, in the order of the types; of what went well no more than docs/models.md reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    recording.write(path, [shortened(rows[name]) for name in sorted(rows)], MADE)


def shortened(row: Row) -> Row:
    """A row with figures of six digits, and with its checks where something is wrong."""
    whole = row["result"] in (SILENT, UNCLEAR)
    return recording.rounded({name: x for name, x in row.items() if whole or name in READ})


def merged(paths: Iterable[Path]) -> dict[str, Row]:
    """Rows of several shards.

    Raises:
        ValueError: if a file is not there, or rows are of different versions.
    """
    rows: dict[str, Row] = {}
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} is not there: expected a file of rows")
        rows |= read(path)
    versions = {json.dumps(row["versions"], sort_keys=True) for row in rows.values()}
    if len(versions) > 1:
        raise ValueError(f"rows of different versions do not go into one file: {', '.join(sorted(versions))}")
    return rows


def is_current(row: Row | None, now: Row) -> bool:
    return row is not None and row["versions"] == now["versions"] and row["sources"] == now["sources"]


def shard_of(names: Sequence[str], shard: str) -> list[str]:
    """The names in one of several shards, "3/8", by their hash: a new model type moves no other.

    Raises:
        ValueError: if the shard is not two numbers of which the first is the smaller.
    """
    first, _, count = shard.partition("/")
    if not (first.isdigit() and count.isdigit() and 1 <= int(first) <= int(count)):
        raise ValueError(f"a shard is written as 3/8, from 1/8 to 8/8, got {shard!r}")
    return [name for name in names if place(name) % int(count) == int(first) - 1]


def place(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
