"""Every table and figure from the rows alone: README.md, PNG files and index.html."""

from __future__ import annotations

from pathlib import Path

from research.recording import Row, read

from . import develop, figures, positions, tables
from .document import Block, Figure, Heading, Text, markdown, page
from .ladder import ladder
from .plan import is_result
from .registry import registry
from .statistics import Result, collect

TITLE = "NTK-Attention against LoRA, prefixes and full fine-tuning"
ABOUT = (
    "Made by `python -m research report` from `rows.jsonl` beside this file; `python -m research run TASK "
    "--method METHOD` runs what is missing of a cell. Every method tries at least four learning rates on a log grid, "
    "and more where the best one is at an end of it; the rate is chosen on validation data with seeds of its own. "
    "Then other seeds train at that rate, and only these see the test data. All methods of a task have the same "
    "base model, batch size, steps, warm-up and decay; a new classifier's head trains at a rate that is the same for "
    "all."
)
LEGEND = (
    "Test: mean and standard deviation over the seeds. Trainable: without the head of a new classifier, which is the "
    "same for all; = marks sizes within 5 % of ours. Seeds: with 2 rates, test data have been seen at two; "
    "the one that is best on validation data counts. Rate: ↑ or ↓ if it is the largest or the smallest that was tried. "
    "Forgetting: the loss that the base model was pretrained for, on unrelated data, after minus before; ≠ marks what "
    "was measured, with some seeds or all, on other passages than ours. Step: median of the time of one step, alone "
    "on the device. Memory: allocated at the peak of training, weights included. File: the adapter as safetensors."
)
EARLIER = (
    "The rows of NTK-Attention are of earlier defaults, with `feed_forward='beside'` and, outside of Positions, "
    "`positions='rotary'`; those of Development are of the present one."
)
BESIDE = (
    "Accuracy on the parts of a test, whose mean is the test metric, and on other data after the same training, mean "
    "over the seeds. The base model's line says how it was before."
)


def write_report(folder: Path) -> list[Path]:
    """Raises FileNotFoundError if there are no rows."""
    rows = read(folder / "rows.jsonl")
    results, of_positions = collect(rows, registry()), read(folder / positions.ROWS)
    developed = [row for row in read(folder / develop.ROWS) if is_result(row) and has_batches_of_today(row)]
    if not (results or of_positions or developed):
        raise FileNotFoundError(f"{folder} has no rows: run an experiment first")
    blocks, pictures = compose(results, rows, folder) if results else ([Heading(TITLE, 1)], [])
    if of_positions:
        blocks += [*positions.tables(of_positions), *tables.provenance(of_positions)]
    if developed:
        blocks += [*develop.tables(developed), *tables.provenance(developed)]
    (folder / "README.md").write_text(markdown(blocks))
    (folder / "index.html").write_text(page(blocks))
    return [folder / "README.md", folder / "index.html", *pictures]


def has_batches_of_today(row: Row) -> bool:
    """Numbers of other batch sizes are not comparable."""
    task = registry().get(row["task"])
    return task is not None and row.get("batch_size", task.batch_size) == task.batch_size


def compose(results: dict[str, dict[str, Result]], rows: list[Row], folder: Path) -> tuple[list[Block], list[Path]]:
    pictures: list[Path] = []

    def figure(name: str, draw: figures.Drawing, text: str) -> list[Block]:
        path = folder / f"{name}.png"
        if not draw(results, path):
            return []
        pictures.append(path)
        return [Figure(path, text)]

    blocks: list[Block] = [
        Heading(TITLE, 1),
        Text(ABOUT),
        Text(EARLIER),
        *ladder(results),
        Heading("In short"),
        Text(
            "Test metric, mean over the seeds; LoRA and the prefixes are each the best of their kind on the test data, "
            "ours is always the default. The last columns are ours over the other, relative, positive is better."
        ),
        tables.summary(results),
        Text(tables.verdict(results)),
    ]
    blocks += figure(
        "differences",
        figures.differences,
        "Ours minus each method of equal size, relative to the method, with the 95 % interval of the paired "
        "differences over seeds; right of zero ours is better.",
    )
    blocks += figure("sizes", figures.sizes, "Test metric against the number of trainable parameters.")
    blocks += [Heading("Task by task"), Text(LEGEND)]
    for own in results.values():
        if any(result.mean is not None for result in own.values()):
            task = next(iter(own.values())).task
            blocks += [Heading(f"{task.name}: {task.group}", 3), Text(tables.describe(task)), tables.task(own)]
    if parts := tables.beside(results):
        blocks += [Heading("Parts, and other benchmarks"), Text(BESIDE), *parts]
    blocks += [
        Heading("Paired differences"),
        Text(
            "Ours minus the other on equal seeds, in the units of the test metric and turned so that positive is "
            "better. By seeds: 95 % interval of Student's t over the seeds. By items, but for variants and other "
            "sizes: 95 % interval over the test items, each averaged over the seeds."
        ),
        *tables.paired(results),
    ]
    blocks += [Heading("Learning rates"), Text("On validation data, mean over the seeds; the chosen rate is bold.")]
    blocks += figure("rates", figures.rates, "Validation data against the learning rate, of some methods.")
    blocks += tables.rates(results)
    if ablations := tables.ablations(results):
        blocks += [Heading("Ablations"), Text("Parts of ours, taken away or changed, one at a time."), *ablations]
    commits = len({row["commit"] for row in rows})
    several = [Text(f"The rows are of {commits} commits.")] if commits > 1 else []
    blocks += [Heading("How it was made"), *several, *tables.provenance(rows)]
    return blocks, pictures
