"""The command `bench`."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

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
    only: Annotated[
        list[str] | None, typer.Option(help="Only methods whose names begin so; may be given several times.")
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(help="Only cases of this size, such as cache=dynamic; likewise.", metavar="SIZE=X"),
    ] = None,
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
        chosen = Choice(tuple(only or ()), tuple(where or ()))
        run(names, out, tiny, device or ("cuda" if torch.cuda.is_available() else "cpu"), again, chosen)


class Choice(NamedTuple):
    """Which rows of a benchmark are wanted."""

    only: tuple[str, ...]
    where: tuple[str, ...]

    def of(self, cases: Sequence[Any], name: str) -> list[Any]:
        """The cases, with the methods, that are wanted.

        Raises:
            typer.BadParameter: if there are none.
        """
        if not (self.only or self.where):
            return list(cases)
        found = []
        for case in cases:
            sizes = {f"{key}={value}" for key, value in case.sizes.items()}
            methods = {m: x for m, x in case.methods.items() if not self.only or m.startswith(self.only)}
            if methods and sizes.issuperset(self.where):
                found.append(replace(case, methods=methods))
        if not found:
            raise typer.BadParameter(f"{name} has no row of {' '.join(self.only)} where {' '.join(self.where)}")
        return found


def run(names: list[str], out: Path, tiny: bool, device: str, again: bool, chosen: Choice) -> None:
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
            cases = chosen.of(benchmark.cases(target, tiny), name)
            task = progress.add_task(name, total=len(cases), case="")
            for case in cases:
                progress.update(task, case=" ".join(f"{k}={v}" for k, v in list(case.sizes.items())[:7]))
                case.run(recorder, target)
                progress.advance(task)
            progress.update(task, case=str(recorder.path))
