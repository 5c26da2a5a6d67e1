"""What is to be run next, and the small pieces of a cell."""

from dataclasses import replace

from research.experiments.methods import METHODS
from research.experiments.plan import best_rate, neighbour, next_cells, pairs
from research.experiments.registry import registry
from research.experiments.statistics import Result
from research.experiments.train import Cell, packed, training_order, unpacked


def test_plan():
    """All rates first, then more at an end of the grid, then seeds at the best; rows of other steps do not count."""
    task, rates = replace(registry()["sections-16"], steps=4), METHODS["ntk"].rates
    seeds = task.selection_seeds
    numbers = {name: (len(task.selection_seeds), len(task.final_seeds)) for name, task in registry().items()}
    names = ("sections-16", "sections", "vit-cifar100", "perl")
    assert [numbers[name] for name in names] == [(8, 8), (8, 8), (1, 3), (1, 3)]

    def row(rate, share, stage="select", seed=0, steps=4):
        return {"task": task.name, "method": "ntk", "learning_rate": rate, "seed": seed, "stage": stage, "steps": steps,
                "validation": {"loss": 1.0, "share": share}}  # fmt: skip

    grid = [Cell(task.name, "ntk", rate, seed, "select") for rate in rates for seed in seeds]
    assert next_cells([], task, "ntk") == grid
    assert len(next_cells([row(rates[0], 0.5, steps=5)], task, "ntk")) == len(grid)
    rows = [row(rate, 0.5 + i / 10, seed=seed) for i, rate in enumerate(rates) for seed in seeds]
    lucky = {**rows[0], "validation": {"loss": 1.0, "share": 0.9}}
    assert best_rate(task, [lucky, *rows[1:]]) == rates[-1]  # the mean over the seeds counts
    assert [cell.learning_rate for cell in next_cells(rows, task, "ntk")] == [0.1] * len(seeds)
    rows += [row(0.1, 1.0, seed=seed) for seed in seeds]
    del rows[-1]["validation"]
    rows[-1]["error"] = "OutOfMemoryError: CUDA out of memory"
    assert next_cells(rows, task, "ntk") == []  # no choice without this cell, which another run may have
    rows[-1]["error"] = "the loss is not finite"
    cells = next_cells(rows, task, "ntk")
    assert [(cell.learning_rate, cell.seed, cell.stage) for cell in cells] == [
        (rates[-1], s, "final") for s in task.final_seeds
    ]
    assert next_cells(rows, task, "ntk", seeds=3) == cells[:3]
    rows += [row(rates[-1], 0.8, "final", seed) for seed in (1, 3)]
    assert [cell.seed for cell in next_cells(rows, task, "ntk", seeds=3)] == [2]
    assert best_rate(task, [*rows, row(1.0, 0.99)]) == rates[-1]  # one seed is no choice
    assert best_rate(task, [{"learning_rate": 1e-3, "seed": seed, "error": "diverged"} for seed in seeds]) is None
    rows = [row(rate, 0.5 + i / 10, seed=seed) for i, rate in enumerate(rates) for seed in seeds]
    for i, rate in enumerate((0.1, 0.3, 1.0, 3.0)):
        assert [cell.learning_rate for cell in next_cells(rows, task, "ntk")] == [rate] * len(seeds)
        rows += [row(rate, 0.9 + i / 100, seed=seed) for seed in seeds]
    assert {cell.stage for cell in next_cells(rows, task, "ntk")} == {"final"}  # far enough
    assert Result(task, "ntk", rows).at_end == "↑"
    assert Result(task, "ntk", [*rows, *(row(10.0, 0.5, seed=seed) for seed in seeds)]).at_end == ""
    assert [neighbour(rate, True) for rate in (1e-5, 3e-4, 0.01, 0.3)] == [3e-5, 1e-3, 0.03, 1.0]
    assert [neighbour(rate, False) for rate in (1e-5, 3e-4, 1.0)] == [3e-6, 1e-4, 0.3]


def test_the_most_informative_come_first():
    tasks = [task for task in registry().values() if "/" not in task.model]
    found = [(task.group, method) for task, method in pairs(tasks, list(METHODS))]
    groups = {task.group for task in tasks}
    assert set(found[: 3 * len(groups)]) == {(g, m) for g in groups for m in ("ntk", "lora-attention", "prefix")}


def test_small_pieces():
    correct = [True, False, False, True, True, False, True, False, True]
    assert unpacked(packed(correct)) == correct
    assert unpacked(packed([False, False])) == [False, False]
    labels = [0, 1, 1, 0]
    few, all_of_them = registry()["sections-16"], registry()["sections"]
    assert few.few(labels, 1) != few.few(labels, 2)
    # examples are kept by the process: their order must not come from the seed that it meets first
    assert all_of_them.few(labels, 1) == all_of_them.few(labels, 2) == [0, 1, 2, 3]
    order = training_order(5, 12, seed=1)
    assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5))
    assert len(order) == 12
    assert order != training_order(5, 12, seed=2)
