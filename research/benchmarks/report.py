"""Markdown tables and plots, from the rows alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from . import plots
from .registry import BENCHMARKS
from .rows import Row, latest, read
from .tables import TABLES

HEAD = """# Benchmarks

Made by `python -m research bench report` from the JSON lines beside this file. `python -m research bench NAME` measures
what is missing for the current commit and hardware. Times are medians; methods in one row of a table ran interleaved
unless the benchmark says otherwise. What is measured, and how, stands in `research/benchmarks/NAME.py`.

Ours sees queries without their rotary positions in rows of an H200 and of an Intel host, and as they are
(`positions="rotary"`) in rows of an H100 and of an AMD host.
"""


def write_report(folder: Path) -> list[Path]:
    """README.md and the plots of every benchmark that has rows: of the GPU, and of the host, that ran it last."""
    rows = {name: latest(read(folder / f"{name}.jsonl")) for name in BENCHMARKS}
    if not any(rows.values()):
        raise FileNotFoundError(f"{folder} has no rows: run a benchmark first")
    text, written = [HEAD], []
    for name, own in rows.items():
        groups = by_hardware(own)
        last = {is_host(hardware): hardware for hardware in groups}
        for hardware, group in groups.items():
            text += [f"## {name}: {hardware}\n", f"{BENCHMARKS[name].summary}\n", f"{provenance(group)}\n"]
            if hardware in last.values():
                path = folder / f"{name}-{plots.slug(hardware)}.png"
                plots.PLOTS[name](group, path)
                text.append(f"![{name}]({path.name})\n")
                written.append(path)
            text += TABLES[name](group)
    (folder / "README.md").write_text("\n".join(text))
    return [folder / "README.md", *written]


def is_host(hardware: str) -> bool:
    """As `recording.hardware` names one."""
    return " thread" in hardware


def by_hardware(rows: Iterable[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["hardware"], []).append(row)
    return groups


def provenance(rows: list[Row]) -> str:
    """Versions and commits, all of them where rows differ."""

    def distinct(values: Iterable[str]) -> str:
        return " / ".join(dict.fromkeys(values))

    packages = {name: None for row in rows for name in row["versions"]}
    found = [f"{name} {distinct(row['versions'].get(name, 'none') for row in rows)}" for name in packages]
    return f"{', '.join(found)}; commit {distinct(row['commit'] for row in rows)}; seed {rows[0]['seed']}."
