"""The command line of what is measured: `python -m research`."""

from research.benchmarks.commands import bench
from research.experiments.commands import app
from research.experiments.conversion.commands import app as conversion

app.command(no_args_is_help=True)(bench)
app.add_typer(conversion, name="conversion")

if __name__ == "__main__":
    app()
