"""What a row of the comparison holds: no more than tables and figures read, so that results stay small."""

from __future__ import annotations

from research.recording import Row, rounded

from . import develop, positions
from .methods import METHODS

STAGES = ("select", "final", "time")
SETTING = ("task", "method", "learning_rate", "seed", "stage", "steps")  # of equal ones the last row counts
MADE = ("hardware", "versions", "commit", "jobs")
ALWAYS = (*SETTING, "batch_size", "error", "seconds", *MADE)
FORGOTTEN = ("unrelated_loss_before", "forgetting")
FIELDS: dict[str, tuple[str, ...]] = {
    "select": ("validation",),
    "final": ("data_digest", "trainable_parameters", "adapter_bytes", "peak_memory_bytes", "training_seconds", "test",
              "test_correct", "beside", *FORGOTTEN),
    "time": ("trainable_parameters", "peak_memory_bytes", "step_milliseconds"),
    develop.STAGE: ("trainable_parameters", "validation", *FORGOTTEN),
    positions.STAGE: ("validation", "shifted", "left_padded", "base"),
}  # fmt: skip


def kept(row: Row) -> Row:
    """What is read of a row. Which test items are right is kept of the methods that are compared, not of variants."""
    names = {*ALWAYS, *FIELDS[row["stage"]]}
    if row["method"] in METHODS and METHODS[row["method"]].ablation:
        names -= {"test_correct"}
    return rounded({name: value for name, value in row.items() if name in names and value is not None})
