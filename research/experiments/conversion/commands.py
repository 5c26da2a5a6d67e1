"""The commands `conversion accuracy`, `documents`, `facts`, `prefix-tuning` and `report`."""

from __future__ import annotations

import math
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
def facts(
    out: Out = RESULTS,
    work: Annotated[Path, typer.Option(help="Folder that keeps the calibration texts.")] = Path("runs/documents"),
    documents: Annotated[str, typer.Option(help="Names, separated by commas; all by default.")] = "",
    methods: Annotated[str, typer.Option(help="Names, separated by semicolons; all by default.")] = "",
    budgets: Annotated[str, typer.Option(help="MiB that are kept, separated by commas.")] = "2,8,32",
    seeds: Annotated[str, typer.Option(help="Of calibration texts and methods, separated by commas.")] = "0,1,2",
    minutes: Annotated[float, typer.Option(help="No row is begun after so many; run again to go on.")] = math.inf,
    model: Annotated[str, typer.Option(help="An asset, a folder or a name on the hub.")] = "qwen2.5-coder-0.5b",
    held_out: Annotated[int, typer.Option(help="Tokens of the continuation.")] = 512,
    limit: Annotated[int, typer.Option(help="Tokens of a document at most.")] = 2**14,
    steps: Annotated[int, typer.Option(help="Of distillation.")] = 120,
    rows: Annotated[int, typer.Option(help="Of calibration text.")] = 32,
    length: Annotated[int, typer.Option(help="Tokens of such a row.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Rows of a step.")] = 8,
    source: Annotated[str, typer.Option(help="Of the calibration text: samples, chunks or both.")] = "samples",
    state_rate: Annotated[float, typer.Option(help="Learning rate of states.")] = 2e-3,
    cache_rate: Annotated[float, typer.Option(help="Learning rate of trained caches.")] = 5e-3,
) -> None:
    """Which facts of a document are left in so many bytes, beside other ways to spend them."""
    from .fact_methods import FACT_METHODS
    from .facts import cells, known_documents, run
    from .methods import Setting

    if source not in SOURCES:
        raise typer.BadParameter(f"unknown source {source!r}: expected one of {SOURCES}")
    sizes, numbers = numbers_from(budgets, float, 0), numbers_from(seeds, int, -1)
    try:
        known = known_documents()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    wanted = cells(chosen_from(documents, ",", known), chosen_from(methods, ";", FACT_METHODS), sizes, numbers)
    rates = {"state": state_rate, "cache": cache_rate}
    setting = Setting(model, held_out, limit, steps, rows, length, batch_size, source, rates, numbers[0])
    left = run(out, work, wanted, setting, minutes)
    if left:
        print(f"{left} of {len(wanted)} rows are left: run the same command again")


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


def numbers_from(text: str, kind: type, above: float) -> list:
    """Numbers separated by commas, each larger than `above`."""
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"expected numbers separated by commas, got {text!r}") from None
    if any(not above < number < math.inf for number in numbers):
        raise typer.BadParameter(f"expected finite numbers larger than {above}, got {text!r}")
    return numbers


def chosen_from(names: str, separator: str, known: dict) -> list[str]:
    chosen = [name.strip() for name in names.split(separator)] if names else list(known)
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise typer.BadParameter(f"unknown {unknown[0]!r}: expected some of {list(known)}")
    return chosen
