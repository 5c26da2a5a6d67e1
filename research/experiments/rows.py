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


OF_ITEMS = 2  # methods up to this tier are compared item by item; beyond are other sizes and variants


def kept(row: Row) -> Row:
    """What is read of a row; which test items are right only of methods whose intervals over items are shown."""
    names = {*ALWAYS, *FIELDS[row["stage"]]}
    if METHODS[row["method"]].tier > OF_ITEMS:
        names -= {"test_correct"}
    return rounded({name: value for name, value in row.items() if name in names and value is not None})
