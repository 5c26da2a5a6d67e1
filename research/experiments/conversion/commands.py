"""The commands `conversion accuracy`, `documents`, `prefix-tuning` and `report`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import transformers
import typer

from ntk_attention.cli.models import EMBEDDED
from ntk_attention.convert.own_text import SOURCES

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Out = Annotated[Path, typer.Option(help="Folder of the rows (JSON lines) and figures.")]
RESULTS = Path("results/conversion")


@app.callback()
def quiet() -> None:
    """Prefixes that exist become states: how near they come."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@app.command()
def accuracy(
    out: Out = RESULTS,
    largest: Annotated[int, typer.Option(help="m goes to 2 to this power.")] = 18,
    budget: Annotated[float, typer.Option(help="Multiplications that a map may cost; others are left out.")] = 1e12,
    seed: int = 0,
) -> None:
    """T - PrefixAttn for sums over random prefixes, beside the a-priori bound."""
    from .accuracy import run

    run(out, largest=largest, seed=seed, budget=budget)


@app.command()
def documents(
    out: Out = RESULTS,
    work: Annotated[Path, typer.Option(help="Folder that keeps the calibration texts.")] = Path("runs/documents"),
    texts: Annotated[str, typer.Option(help="Names or files, separated by commas; all names by default.")] = "",
    methods: Annotated[str, typer.Option(help="Names, separated by semicolons; all by default.")] = "",
    model: str = EMBEDDED,
    held_out: Annotated[int, typer.Option(help="Tokens of the continuation.")] = 512,
    limit: Annotated[int, typer.Option(help="Tokens of a document at most, before the needles.")] = 2**20,
    steps: Annotated[int, typer.Option(help="Of distillation.")] = 120,
    rows: Annotated[int, typer.Option(help="Of calibration text.")] = 32,
    length: Annotated[int, typer.Option(help="Tokens of such a row.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Rows of a step.")] = 8,
    source: Annotated[str, typer.Option(help="Of the calibration text: samples, chunks or both.")] = "samples",
    state_rate: Annotated[float, typer.Option(help="Learning rate of states.")] = 2e-3,
    cache_rate: Annotated[float, typer.Option(help="Learning rate of trained caches.")] = 5e-3,
    seed: int = 0,
) -> None:
    """What is lost when a document's KV cache makes room for something small."""
    from .documents import run
    from .methods import METHODS, Setting
    from .texts import TEXTS

    files = {name: None for name in texts.split(",") if Path(name).is_file()}
    chosen = chosen_from(texts, ",", {**TEXTS, **files}), chosen_from(methods, ";", METHODS)
    if source not in SOURCES:
        raise typer.BadParameter(f"unknown source {source!r}: expected one of {SOURCES}")
    rates = {"state": state_rate, "cache": cache_rate}
    setting = Setting(model, held_out, limit, steps, rows, length, batch_size, source, rates, seed)
    run(out, work, *chosen, setting)


@app.command()
def prefix_tuning(
    out: Out = RESULTS,
    work: Annotated[Path, typer.Option(help="Folder that keeps the trained adapters.")] = Path("runs/prefix-tuning"),
    tokens: Annotated[str, typer.Option(help="m, separated by commas.")] = "32,256,2048",
    model: str = EMBEDDED,
    task: str = "chain-sum",
    train_steps: int = 300,
    batch_size: int = 32,
    train_rates: Annotated[str, typer.Option(help="Of prefix tuning; the best on validation counts.")] = "1e-2,3e-3",
    calibration_batches: int = 24,
    steps: Annotated[int, typer.Option(help="Of distillation.")] = 200,
    learning_rate: Annotated[float, typer.Option(help="Of distillation.")] = 2e-3,
    held_out: int = 300,
    seed: int = 0,
) -> None:
    """Prefix-tuning adapters, trained and converted."""
    from .prefix_tuning import Setting, run

    rates = tuple(float(rate) for rate in train_rates.split(","))
    training = model, task, train_steps, batch_size, rates
    setting = Setting(*training, calibration_batches, steps, learning_rate, held_out, seed)
    run(out, work, [int(m) for m in tokens.split(",")], setting)


@app.command()
def report(out: Out = RESULTS) -> None:
    """Tables and figures of the rows."""
    from .report import write_report

    print("\n".join(map(str, write_report(out))))


def chosen_from(names: str, separator: str, known: dict) -> list[str]:
    chosen = [name.strip() for name in names.split(separator)] if names else list(known)
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise typer.BadParameter(f"unknown {unknown[0]!r}: expected some of {list(known)}")
    return chosen
