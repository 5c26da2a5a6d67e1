"""The command line of what is measured: `python -m research`."""

from pathlib import Path
from typing import Annotated

import typer

from research.benchmarks.commands import bench
from research.experiments.commands import app
from research.experiments.conversion.commands import app as conversion

app.command(no_args_is_help=True)(bench)
app.add_typer(conversion, name="conversion")

Results = Annotated[Path, typer.Argument(help="With a folder of each kind of rows.")]


@app.command()
def theory(folder: Annotated[Path, typer.Argument(help="Of the rows.")] = Path("results/theory")) -> None:
    """Make README.md and the figures of the theory's experiments from their rows."""
    from research.theory import write_report  # running needs no matplotlib

    print("\n".join(map(str, write_report(folder))))


@app.command()
def tidy(folder: Results = Path("results")) -> None:
    """Drop the rows that no table reads, and write what the others share once. Not while something runs."""
    from research.tidying import tidy as write_anew

    for path, (before, after) in write_anew(folder).items():
        print(f"{path}: {before:,} to {after:,} bytes")


if __name__ == "__main__":
    app()
