"""README.md and the figures of results/theory, from the rows that `ntk-attention theory` writes."""

from __future__ import annotations

from pathlib import Path

from ntk_attention.theory.experiments import EXPERIMENTS

from .pictures import shrink
from .recording import Row, read

HEAD = """# The theory's experiments

Made by `python -m research theory` from the rows beside this file, which `ntk-attention theory all` writes
with `--out results/theory` and `python -m research tidy` thins. What was asked, and what the sentences mean, stands in
[docs/theory.md](../../docs/theory.md).
"""
CURVES = ("t", "loss", "predicted")
POINTS = 40  # of a curve that is drawn


def write_report(folder: Path) -> list[Path]:
    """Of every experiment that has rows. Raises FileNotFoundError where none has."""
    text, written = [HEAD], [folder / "README.md"]
    for name, parts in EXPERIMENTS.items():
        if found := read(folder / f"{name}.jsonl"):
            made, rows = found[0], found[1:]
            path = folder / f"{name}.png"
            parts.figure(rows, path)
            shrink(path)
            written.append(path)
            text.append(f"## {name}\n\n{made['hardware']}, torch {made['torch']}, seed {made['seed']}.\n")
            text.append(f"![{name}]({path.name})\n")
            text.append("\n".join(f"- {sentence}" for sentence in parts.words(rows)) + "\n")
    if len(text) == 1:
        raise FileNotFoundError(f"{folder} has no rows: run `ntk-attention theory all --out {folder}` first")
    written[0].write_text("\n".join(text))
    return written


def thinned(row: Row) -> Row:
    """With fewer points of the curves of a training run: those that are drawn, or the ends where none is."""
    if row.get("kind") != "run":
        return row
    size = len(row["t"])
    width = max(1, -(-(size - 1) // (POINTS - 1))) if row["draw"] == 0 else max(1, size - 1)
    places = sorted({*range(0, size, width), size - 1})
    return {**row, **{name: [row[name][i] for i in places] for name in CURVES}}
