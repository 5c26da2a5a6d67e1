"""Rows of a task of the comparison, made up."""

from research.experiments.methods import METHODS
from research.experiments.registry import registry
from research.experiments.train import packed

TASK = registry()["sections"]


def row_of(method, stage, rate, seed, **more):
    made = {"hardware": "a GPU", "versions": {"torch": "2"}, "commit": "c", "jobs": 1}
    return {"task": TASK.name, "method": method, "learning_rate": rate, "seed": seed, "stage": stage,
            "steps": TASK.steps, "batch_size": TASK.batch_size, "seconds": 1.5, **made, **more}  # fmt: skip


def selected_and_tested(method, gain=0.0):
    score = {rate: {"loss": 1 / 3, "share": 0.7 if rate == 3e-3 else 2 / 3} for rate in METHODS[method].rates}
    rows = [row_of(method, "select", r, seed, validation=x) for r, x in score.items() for seed in TASK.selection_seeds]
    for seed in TASK.final_seeds:
        share = 0.6 + gain + 0.01 * (seed % 2)
        tested = {"test": {"loss": 1.0, "share": share}, "test_correct": packed([i < 100 * share for i in range(100)])}
        described = {
            "trainable_parameters": 1000,
            "adapter_bytes": 4000,
            "unrelated_loss_before": 2.0,
            "forgetting": 0.5,
        }
        rows.append(row_of(method, "final", 3e-3, seed, **tested, **described, data_digest="d"))
    return rows
