"""The commands of the comparison."""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from research.recording import Row, append, commit, hardware, read, versions

from . import assets, develop, positions, recipes, suite
from .language import LanguageTask
from .methods import METHODS
from .plan import belongs, develop_cells, is_result, next_cells, pairs, position_cells, timing_cells
from .registry import registry
from .rows import STAGES
from .runner import Job, Worker, run_inline, run_jobs
from .tasks import Task
from .train import Cell

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ABOUT = "What is measured: ours against other methods at equal size and tuned learning rates, and how fast it is."
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, help=ABOUT)
console = Console(highlight=False)
SOURCES = ("src", "research/experiments")
RESULTS = Path("results/experiments")
ROWS = "rows.jsonl"

Names = Annotated[list[str] | None, typer.Argument(help="Tasks; by default all that need no hub.", metavar="TASK...")]
Methods = Annotated[list[str] | None, typer.Option("--method", "-m", help="Only these methods; may be repeated.")]
MaxTier = Annotated[int, typer.Option(help="Methods up to this tier; 3 leaves the ablations out.")]
Device = Annotated[str | None, typer.Option(help="cuda or cpu; a GPU where there is one.")]
Out = Annotated[Path, typer.Option(help=f"Folder of {ROWS}, which is added to.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Of training, in place of the task's own: to try the code.")]
Minutes = Annotated[float, typer.Option(min=0, help="Stop after that long, and begin no cell that would last longer.")]
Again = Annotated[bool, typer.Option("--again", help="Run what has a row of another commit only.")]


@app.command(name="list")
def list_() -> None:
    """Show the tasks and methods."""
    tasks = Table("task", "group", "model", "data", "steps x batch", "here")
    for task in registry().values():
        here = "hub or local copy" if task in recipes.RECIPES else "no" if refusal(task) else "yes"
        tasks.add_row(task.name, task.group, task.model, task.data, f"{task.steps} x {task.batch_size}", here)
    methods = Table("method", "tier", "in tables", "learning rates")
    for name, method in METHODS.items():
        methods.add_row(name, str(method.tier), method.label, " ".join(f"{rate:g}" for rate in method.rates))
    console.print(tasks, methods)


@app.command()
def prepare(
    names: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(assets.ASSETS)}; all by default.")] = None,
) -> None:
    """Fetch and make the models and data that need no hub."""
    failed = []
    for name in names or assets.ASSETS:
        try:
            assets.prepare(name)
            console.print(f"{name}: done")
        except ValueError as error:
            console.print(f"{name}: {error}", soft_wrap=True)
            failed.append(name)
    if failed:
        raise typer.Exit(1)


@app.command()
def pretrain(device: Device = None, steps: Steps = None) -> None:
    """Pretrain the ViT of the picture tasks."""
    from . import pretraining

    with refusing():
        record = pretraining.pretrain(
            device_or_default(device),
            steps or pretraining.STEPS,
            lambda step, loss: console.print(f"step {step}: loss {loss}"),
        )
    console.print({name: value for name, value in record.items() if name != "curve"})


@app.command()
def run(
    names: Names = None,
    method: Methods = None,
    max_tier: MaxTier = 4,
    jobs: Annotated[int, typer.Option(min=1, help="Processes side by side, on all GPUs together.")] = 1,
    minutes: Minutes = 10**6,
    seeds: Annotated[int | None, typer.Option(min=1, help="Final runs at most; 3, or 8 of classifiers.")] = None,
    again: Again = False,
    steps: Steps = None,
    out: Out = RESULTS,
    device: Device = None,
) -> None:
    """Run what is missing: learning rates on validation data, then seeds at the best one, the most informative first.

    Rows are written as cells finish; a run that was stopped goes on where it was. The exit status is 1 if cells failed.
    """
    device = device_or_default(device)
    refuse_test_data(names)
    tasks, todo = chosen_pairs(names, method, max_tier, steps)
    own_commit, path = commit(*SOURCES), out / ROWS
    rows = rows_so_far(path, own_commit if again else None)

    def planner() -> list[Job]:
        return [(cell, task) for task, name in todo for cell in next_cells(rows, task, name, seeds)]

    for task in tasks:
        task.warm_up()
    total = sum(max(0, expected(task, name, seeds) - sum(belongs(r, task, name) for r in rows)) for task, name in todo)
    execute(planner, rows, path, own_commit, device, jobs, minutes, max(1, total))


def expected(task: Task, method: str, seeds: int | None) -> int:
    """Cells of a task and method, if the grid of rates need not grow."""
    if not METHODS[method].rates:
        return 1
    return len(METHODS[method].rates) * len(task.selection_seeds) + len(task.final_seeds[:seeds])


@app.command(name="time")
def time_(
    names: Names = None,
    method: Methods = None,
    max_tier: MaxTier = 2,
    minutes: Minutes = 10**6,
    again: Again = False,
    out: Out = RESULTS,
    device: Device = None,
) -> None:
    """Measure the step time of every method on every task, with nothing beside it on the device."""
    device = device_or_default(device)
    _, todo = chosen_pairs(names, method, max_tier, None)
    own_commit, path = commit(*SOURCES), out / ROWS
    rows = rows_so_far(path, own_commit if again else None)

    def planner() -> list[Job]:
        return [(cell, task) for task, name in todo for cell in timing_cells(rows, task, name)]

    execute(planner, rows, path, own_commit, device, 1, minutes, len(planner()))


@app.command(name="positions")
def positions_(
    names: Annotated[
        list[str] | None,
        typer.Argument(help=f"Of language models; by default {', '.join(positions.TASKS)}.", metavar="TASK..."),
    ] = None,
    rate: Annotated[
        list[float] | None, typer.Option(help="Learning rates; may be repeated; by default 3e-3 and 1e-2.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many, from 0 on.")] = 1,
    jobs: Annotated[int, typer.Option(min=1, help="Processes side by side, on all GPUs together.")] = 1,
    minutes: Minutes = 10**6,
    again: Again = False,
    steps: Steps = None,
    out: Annotated[Path, typer.Option(help=f"Folder of {positions.ROWS}, which is added to.")] = RESULTS,
    device: Device = None,
) -> None:
    """Adapters whose phi sees queries with and without their positions, trained and then read at other positions.

    What has a row is not run again. Validation data alone.
    """
    device = device_or_default(device)
    tasks, _ = chosen(names or list(positions.TASKS), None, 0, steps, check=False)
    for task in tasks:
        if not isinstance(task, LanguageTask) or task in recipes.RECIPES:
            raise typer.BadParameter(f"{task.name}: expected a task of a language model that needs no hub")
        with refusing():
            task.check_training()
    own_commit, path = commit(*SOURCES), out / positions.ROWS
    rows = rows_so_far(path, own_commit if again else None)
    rates = rate or list(positions.RATES)

    def planner() -> list[Job]:
        return [(cell, task) for task in tasks for cell in position_cells(rows, task, positions.VARIANTS, rates, seeds)]

    for task in tasks:
        task.warm_up()
    execute(planner, rows, path, own_commit, device, jobs, minutes, max(1, len(planner())))


@app.command(name="develop")
def develop_(
    names: Annotated[
        list[str] | None, typer.Argument(help="Tasks; by default those of the development suite.", metavar="TASK...")
    ] = None,
    method: Methods = None,
    max_tier: MaxTier = 2,
    rate: Annotated[
        list[float] | None, typer.Option(help="Learning rates; may be repeated; by default those of each method.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many, from 0 on.")] = 1,
    jobs: Annotated[int, typer.Option(min=1, help="Processes side by side, on all GPUs together.")] = 1,
    minutes: Minutes = 10**6,
    again: Again = False,
    steps: Steps = None,
    out: Annotated[Path, typer.Option(help=f"Folder of {develop.ROWS}, which is added to.")] = RESULTS,
    device: Device = None,
) -> None:
    """Compare methods at each learning rate on validation data alone, to choose a default: no cell sees test data.

    What has a row is not run again. Cells that fail, for want of memory perhaps, are tried once more, one at a time.
    """
    device = device_or_default(device)
    tasks, todo = chosen_pairs(names or [task.name for task in suite.SUITE], method, max_tier, steps)
    own_commit, path = commit(*SOURCES), out / develop.ROWS
    rows = rows_so_far(path, own_commit if again else None)

    def planner() -> list[Job]:
        return [(cell, task) for task, name in todo for cell in develop_cells(rows, task, name, rate, seeds)]

    for task in tasks:
        task.warm_up()
    execute(planner, rows, path, own_commit, device, jobs, minutes, max(1, len(planner())))


@app.command()
def cell(
    name: Annotated[str, typer.Argument(help="A task.", metavar="TASK")],
    method: Annotated[str, typer.Argument(help="A method.", metavar="METHOD")],
    rate: Annotated[float, typer.Option(min=0, help="The learning rate.")],
    seed: Annotated[int, typer.Option(min=0, help="Of the order of the data and of what is random in the method.")],
    stage: Annotated[str, typer.Option(help=f"{', '.join(STAGES)}: only final sees test data.")] = "final",
    steps: Steps = None,
    out: Out = RESULTS,
    device: Device = None,
) -> None:
    """Run one cell, whether it has a row or not, and print the row that it adds. The exit status is 1 if it fails."""
    if stage not in STAGES:
        raise typer.BadParameter(f"unknown stage {stage!r}: expected one of {', '.join(STAGES)}")
    refuse_test_data([name] if stage == "final" else None)
    device = device_or_default(device)
    _, [(task, _)] = chosen_pairs([name], [method], 0, steps)
    own_commit = commit(*SOURCES)  # of the code that runs, whatever is edited meanwhile
    task.warm_up()
    row = Worker(device)(Cell(name, method, rate, seed, stage), task) | where_made(device, own_commit, 1)
    append(out / ROWS, row)
    print(json.dumps(row))
    if not is_result(row):
        raise typer.Exit(1)


def rows_so_far(path: Path, only_of: str | None) -> list[Row]:
    """The results there are, all or of one commit."""
    with refusing():
        return [row for row in read(path) if is_result(row) and only_of in (None, row["commit"])]


def execute(
    planner: Callable[[], list[Job]],
    rows: list[Row],
    path: Path,
    own_commit: str,
    device: str,
    jobs: int,
    minutes: float,
    total: int,
) -> None:
    """Run what the planner wants, side by side, and what it still wants of what has failed once more, alone."""
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    made = where_made(device, own_commit, jobs)
    failed: dict[Cell, str] = {}
    columns = (TextColumn("cells"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[last]}"), console=console) as progress:
        bar = progress.add_task("", total=total, last="")

        def write(row: Row) -> None:
            rows.append({**row, **made})
            append(path, rows[-1])
            ran = Cell(*(row[f.name] for f in fields(Cell)))
            failed.pop(ran, None)
            if not is_result(row):
                failed[ran] = in_short(row)
            progress.update(bar, advance=1, last=in_short(row))
            if not console.is_terminal:
                console.print(in_short(row), soft_wrap=True)

        deadline = time.monotonic() + 60 * minutes
        if jobs == 1:
            run_inline(planner, device, write, deadline)
        else:
            run_jobs(planner, device, write, deadline, jobs)
            if failed:
                run_jobs(planner, device, write, deadline, 1)
    if failed:
        last = list(failed.values())[-1]
        console.print(f"{len(failed)} failed, which the next run tries again; the last: {last}", soft_wrap=True)
        raise typer.Exit(1)


def where_made(device: str, own_commit: str, jobs: int) -> Row:
    """What every row says beside its result."""
    return {"hardware": hardware(device), "versions": versions(), "commit": own_commit, "jobs": jobs}


def in_short(row: Row) -> str:
    scores = row.get("test") or row.get("validation") or {"ms": row.get("step_milliseconds")}
    result = row.get("error") or " ".join(f"{name} {value:.4g}" for name, value in scores.items() if value is not None)
    seconds = f" ({row['seconds']:.0f} s)" if "seconds" in row else ""
    return f"{row['task']} {row['method']} {row['learning_rate']:g} {row['stage']} {row['seed']}: {result}{seconds}"


@app.command()
def report(out: Out = RESULTS) -> None:
    """Make every table and figure: README.md, PNG files, and one page index.html that holds all."""
    from .report import write_report  # running needs no matplotlib

    with refusing():
        written = write_report(out)
    console.print(f"wrote {', '.join(map(str, written))}", soft_wrap=True)


@app.command(name="dry-run")
def dry_run(
    names: Annotated[list[str], typer.Argument(help="Recipes of the paper, or any task.", metavar="TASK...")],
    method: Methods = None,
    max_tier: MaxTier = 1,
) -> None:
    """Check recipes without weights and data: sizes of ours, LoRAs and prefixes on the real model, an item."""
    tasks, methods = chosen(names, method, max_tier, None, check=False)
    for task in tasks:
        with refusing():
            for line in recipes.dry_run(task, methods):
                console.print(line, soft_wrap=True)


def chosen(
    names: list[str] | None, methods: list[str] | None, max_tier: int, steps: int | None, check: bool = True
) -> tuple[list[Task], list[str]]:
    """Tasks that can run here, and methods. Unknown names, and tasks that were named but cannot run, are refused."""
    known = registry()
    for given, expected, what in ((names, known, "task"), (methods, METHODS, "method")):
        for name in given or ():
            if name not in expected:
                raise typer.BadParameter(f"unknown {what} {name!r}: expected one of {', '.join(expected)}")
    left_out = (*recipes.RECIPES, *suite.SUITE)
    tasks = [known[name] for name in names] if names else [t for t in known.values() if t not in left_out]
    refused = {task.name: reason for task in tasks if check and (reason := refusal(task))}
    for name, reason in refused.items():
        if names:
            raise typer.BadParameter(f"{name}: {reason}")
        console.print(f"{name} is left out: {reason}", soft_wrap=True)
    tasks = [replace(task, steps=steps or task.steps) for task in tasks if task.name not in refused]
    return tasks, methods or [name for name, method in METHODS.items() if method.tier <= max_tier]


def chosen_pairs(
    names: list[str] | None, methods: list[str] | None, max_tier: int, steps: int | None
) -> tuple[list[Task], list[tuple[Task, str]]]:
    """With the pairs of them; it is refused if there are none."""
    tasks, chosen_methods = chosen(names, methods, max_tier, steps)
    if not (todo := pairs(tasks, chosen_methods)):
        raise typer.BadParameter(
            f"{', '.join(chosen_methods)} cannot run on {', '.join(task.name for task in tasks) or 'any task here'}: "
            "`python -m research list` shows what there is"
        )
    return tasks, todo


def refuse_test_data(names: list[str] | None) -> None:
    """Of the tasks that defaults are chosen on."""
    for name in names or ():
        if name in {task.name for task in suite.SUITE}:
            raise typer.BadParameter(
                f"{name} is of the development suite, whose test data stay unseen: `python -m research develop {name}`"
            )


def refusal(task: Task) -> str | None:
    try:
        task.check()
    except ValueError as error:
        return str(error)
    return None


class refusing:  # noqa: N801
    """Bad input becomes a message without a traceback."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError | FileNotFoundError):
            raise typer.BadParameter(str(error)) from None


def device_or_default(device: str | None) -> str:
    if device not in (None, "cuda", "cpu"):
        raise typer.BadParameter(f"unknown device {device!r}: expected cuda or cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no GPU here: expected --device cpu, or none")
    return device or ("cuda" if torch.cuda.is_available() else "cpu")
