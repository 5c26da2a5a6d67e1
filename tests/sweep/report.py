"""docs/models.md out of the rows: a table to search."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from research import recording

from .examine import IN_PART, NOT_BUILT, RESULTS, SILENT, WORKS
from .subject import REFUSED, UNCLEAR

MODELS = recording.ROOT / "docs" / "models.md"
MEANINGS = {
    WORKS: "every attention module has a prefix, and every check holds that applies to the model",
    IN_PART: "the same, but parts have no prefix, or got no inputs here, or something was refused by name",
    REFUSED: "`get_peft_model`, or the first forward pass, says that it cannot and why",
    NOT_BUILT: "no tiny model could be made here to look at: nothing is known",
    SILENT: "outputs or gradients are not what they should be",
    UNCLEAR: "an error that does not say what was given and what was expected",
}
HEAD = ("model type", "class", "result", "with a prefix", "without one, and why", "position shift")
CHECKED = """\
Checked are, where the base model has it: outputs with the adapter disabled and after `unload` (bit by bit), with a
prefix that weighs nothing, with another last token (causality), with padding on either side, generation with dynamic
and static caches against none (also where layers have sliding windows, which are shorter than the text), gradients of
every tensor that trains, the same with activation checkpointing of both kinds, an adapter saved and loaded (bit by
bit), and `calibrate`. What a model lacks, or what changes its own outputs, is not asked of the adapter. The last column
is no check: how far outputs move, relative to the largest, when all positions grow by 5, for the base model and with a
random prefix. These rows are of `positions="rotary"`, where phi sees the query after its rotation. What the default
refuses stands in [positions](concepts/positions.md). All figures are in `results/sweep`."""
LONGEST = 300  # characters of a sentence


def write_report(rows: dict[str, dict[str, Any]], path: Path) -> None:
    path.write_text(report(rows))


def report(rows: dict[str, dict[str, Any]]) -> str:
    counts = Counter(row["result"] for row in rows.values())
    versions = sorted({", ".join(f"{n} {v}" for n, v in row["versions"].items()) for row in rows.values()})
    meanings = [[name, str(counts[name]), MEANINGS[name]] for name in RESULTS]
    body = [line(rows[name]) for name in sorted(rows)]
    return "\n".join(
        (
            "# Model types",
            "",
            f"A tiny random model of every model type of transformers, {len(rows)} in all, with an adapter "
            f"(`python -m tests.sweep`; {'; '.join(versions)}):",
            "",
            recording.table(("result", "types", "meaning"), meanings),
            CHECKED,
            "",
            recording.table(HEAD, body),
        )
    )


def line(row: dict[str, Any]) -> list[str]:
    adapted = ", ".join(f"{count} {kind}" for kind, count in row.get("adapted", {}).items())
    shift = row.get("position_shift")
    moved = f"{shift[0]:.2g} / {shift[1]:.2g}" if shift else ""
    cells = (row["type"], row.get("class", ""), row["result"], adapted, row["reason"], moved)
    return [cell(text) for text in cells]


def cell(text: str) -> str:
    """One line without what Markdown would read as the end of a cell."""
    text = " ".join(text.replace("|", "\\|").split())
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
