"""The command `bench`."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .registry import BENCHMARKS
from .rows import Recorder

console = Console(highlight=False)
RESULTS, TINY_RESULTS = Path("results/benchmarks"), Path("runs/benchmarks-tiny")


def bench(
    names: Annotated[list[str], typer.Argument(help="Benchmarks to run; or `list`, or `report`.", metavar="NAME...")],
    out: Annotated[Path | None, typer.Option(help=f"Folder of rows and report; {RESULTS}, or {TINY_RESULTS}.")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Tiny sizes, which test the code.")] = False,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; a GPU where there is one.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure again what has a row already.")] = False,
) -> None:
    """Measure speed and memory, one row of JSON per measurement; a run that was killed goes on where it stopped."""
    out = out or (TINY_RESULTS if tiny else RESULTS)
    if names == ["list"]:
        table = Table("name", "what it measures")
        for name, benchmark in BENCHMARKS.items():
            table.add_row(name, benchmark.summary)
        console.print(table)
    elif names == ["report"]:
        from .report import write_report  # measuring needs no matplotlib

        try:
            written = write_report(out)
        except (FileNotFoundError, ValueError) as error:
            raise typer.BadParameter(str(error)) from None
        console.print(f"wrote {', '.join(map(str, written))}", soft_wrap=True)
    else:
        run(names, out, tiny, device or ("cuda" if torch.cuda.is_available() else "cpu"), again)


def run(names: list[str], out: Path, tiny: bool, device: str, again: bool) -> None:
    for name in names:
        if name not in BENCHMARKS:
            raise typer.BadParameter(f"unknown benchmark {name!r}: expected {', '.join(BENCHMARKS)}, list or report")
    if device not in ("cuda", "cpu"):
        raise typer.BadParameter(f"unknown device {device!r}: expected cuda or cpu")
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    columns = (TextColumn("{task.description:10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[case]}"), console=console) as progress:
        for name in names:
            benchmark = BENCHMARKS[name]
            target = "cpu" if benchmark.on_cpu else device
            recorder = Recorder(out, name, target, again)
            cases = benchmark.cases(target, tiny)
            task = progress.add_task(name, total=len(cases), case="")
            for case in cases:
                progress.update(task, case=" ".join(f"{k}={v}" for k, v in list(case.sizes.items())[:7]))
                case.run(recorder, target)
                progress.advance(task)
            progress.update(task, case=str(recorder.path))
