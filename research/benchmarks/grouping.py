"""Rows brought together by sizes, and numbers in short, for tables and plots."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from .rows import Row


class Group(NamedTuple):
    sizes: dict[str, Any]
    rows: dict[str, Row]  # by method


def by_sizes(rows: Iterable[Row], *, without: Sequence[str] = ()) -> list[Group]:
    """Groups with equal sizes, in the order of their first row; the sizes named in `without` go to the method."""
    groups: dict[str, Group] = {}
    for row in rows:
        sizes = {name: value for name, value in row["sizes"].items() if name not in without}
        method = " ".join([row["method"], *(str(row["sizes"][name]) for name in without)])
        groups.setdefault(json.dumps(sizes), Group(sizes, {})).rows[method] = row
    return list(groups.values())


def median(row: Row | None) -> float | None:
    return row["milliseconds"]["median"] if row and "milliseconds" in row else None


def fastest(rows: dict[str, Row], *starts: str) -> Row | None:
    """Of the methods whose names start so; one with an error where all have one."""
    candidates = [row for name, row in rows.items() if name.startswith(starts)]
    timed = [row for row in candidates if median(row) is not None]
    return min(timed, key=lambda row: row["milliseconds"]["median"]) if timed else next(iter(candidates), None)


def prefix_lengths(rows: dict[str, Row]) -> list[int]:
    return sorted({int(name.rsplit("=", 1)[1]) for name in rows if "m=" in name})


def fastest_prefix(rows: dict[str, Row], m: int) -> Row | None:
    return fastest({name: row for name, row in rows.items() if name.endswith(f" m={m}")}, "prefix")


def number(x: float) -> str:
    """In short, for people."""
    return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"
