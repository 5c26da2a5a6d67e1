"""The command line: finetune, compress, evaluate, generate, info, theory."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors import SafetensorError

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
console = Console(highlight=False)

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_DATA = "chain-sum"

Adapter = Annotated[Path, typer.Argument(help="Folder of a saved adapter.")]
Model = Annotated[str | None, typer.Option(help="Base model; by default the one the adapter names.")]
Data = Annotated[str, typer.Option(help="chain-sum, gsm-symbolic, gsm-symbolic-worked, a .jsonl or a .txt file.")]
MaxNewTokens = Annotated[int, typer.Option(help="Length limit of generated answers.")]


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Bad input ends with one line and exit code 2."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("peft").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    try:
        yield
    except (ValueError, OSError, SafetensorError) as error:
        console.print(f"error: {' '.join(str(error).split())}", style="red", soft_wrap=True, markup=False)
        raise typer.Exit(2) from None


class Bars:
    """A progress bar for each stage of a run: a `training.Reporter`."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self.task: TaskID | None = None

    def stage(self, text: str, total: int | None = None) -> None:
        self.finish()
        self.task = self.progress.add_task(text, total=total or 1, figures="")

    def advance(self, n: int = 1, **figures: float) -> None:
        if self.task is not None:
            shown = "  ".join(f"{name} {value:.3f}" for name, value in figures.items())
            self.progress.update(self.task, advance=n, figures=shown)

    def finish(self) -> None:
        if self.task is not None:
            self.progress.update(self.task, completed=self.progress.tasks[self.task].total)


@contextlib.contextmanager
def bars() -> Iterator[Bars]:
    columns = (TextColumn("{task.description:26}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[figures]}"), console=console) as progress:
        reporter = Bars(progress)
        yield reporter
        reporter.finish()


@app.command()
def finetune(
    output: Annotated[Path, typer.Argument(help="Folder for the adapter, its record and the plot of the loss.")],
    model: Annotated[str, typer.Option(help="smollm2-135m (embedded), a folder or a name on the hub.")] = DEFAULT_MODEL,
    data: Data = DEFAULT_DATA,
    items: Annotated[int, typer.Option(help="Training items (files: at most that many lines).")] = 2000,
    held_out: Annotated[int, typer.Option(help="Items held out for the figures before and after.")] = 200,
    epochs: Annotated[float, typer.Option(help="Passes over the training items.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Items of a step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Peak of the linear schedule.")] = 3e-3,
    max_new_tokens: MaxNewTokens = 48,
    seed: int = 0,
    feature_map: Annotated[str, typer.Option(help="elu, taylor or positive_random.")] = "elu",
    rank: Annotated[int | None, typer.Option(help="Rank of Z; an eighth of head_dim by default.")] = None,
    state_heads: Annotated[str, typer.Option(help="One state per 'query' or per 'kv' head.")] = "query",
    positions: Annotated[str, typer.Option(help="Queries without rotary positions, 'free', or 'rotary'.")] = "free",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run in the folder.")] = False,
) -> None:
    """Fine-tune a model and save an ordinary PEFT adapter."""
    with one_line_errors():
        from .finetuning import Settings
        from .finetuning import finetune as run

        adapter = {"feature_map": feature_map, "rank": "auto" if rank is None else rank}
        adapter |= {"state_heads": state_heads, "positions": positions}
        settings = Settings(
            model, data, items, held_out, epochs, batch_size, learning_rate, max_new_tokens, seed, adapter
        )
        with bars() as reporter:
            record = run(settings, output, resume=resume, overwrite=overwrite, reporter=reporter)
        from .reports import plot_loss

        plot_loss(record, output / "loss.png")
        show_summary(record, output)


def show_summary(record: dict[str, Any], output: Path) -> None:
    from .data import METRICS

    table = Table("held-out items", "before", "after", title=f"{record['test_items']} items that training never saw")
    before, after = record["before"], record["after"]
    for name in METRICS:
        if name in before and name in after:
            table.add_row(name.replace("_", " "), f"{before[name]:.1%}", f"[bold]{after[name]:.1%}[/bold]")
    table.add_row("loss, nats per token", f"{before['loss']:.3f}", f"{after['loss']:.3f}")
    console.print(table)
    share = record["trainable_parameters"] / record["base_parameters"]
    console.print(
        f"trained {record['trainable_parameters']:,} parameters ({share:.2%} of the base) for {record['steps']} steps "
        f"in {record['seconds'] / 60:.1f} minutes on {record['hardware']}; "
        f"adapter file {record['adapter_bytes'] / 2**20:.1f} MiB"
    )
    console.print(f"saved to {output}: adapter, finetune.json, loss.png", markup=False)


def base_name(folder: Path, model: str | None) -> str:
    """The base model of the adapter in a folder; ValueError if the folder's config does not fit."""
    from ..tuner.config import NTKAttentionConfig
    from ..tuner.untrusted import CONFIG
    from .models import base_of

    if not (folder / CONFIG).exists():  # PEFT would look for it on the hub
        raise ValueError(f"{folder} has no {CONFIG}: expected the folder of a saved adapter")
    config = NTKAttentionConfig.from_pretrained(folder)
    return model or base_of(config.base_model_name_or_path)


def load_adapter(folder: Path, base: str) -> Any:
    """The base model with the adapter in `folder`; ValueError if they do not fit."""
    import torch
    from peft import PeftModel

    from .models import load_model

    adapted = PeftModel.from_pretrained(load_model(base)[0], folder)
    return adapted.to("cuda" if torch.cuda.is_available() else "cpu").eval()


@app.command()
def compress(
    output: Annotated[Path, typer.Argument(help="Folder for the adapter and its record.")],
    text: Annotated[Path | None, typer.Option(help="A text of any length.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="A KV cache that `ntk_attention.convert.save_cache` wrote.")
    ] = None,
    prefix_tuning: Annotated[Path | None, typer.Option(help="Folder of a prefix-tuning or cartridge adapter.")] = None,
    model: Annotated[str, typer.Option(help="smollm2-135m (embedded), a folder or a name on the hub.")] = DEFAULT_MODEL,
    calibration: Annotated[str | None, typer.Option(help="Text that follows, as --data of finetune.")] = None,
    rows: Annotated[int, typer.Option(help="Rows of calibration text.")] = 32,
    length: Annotated[int, typer.Option(help="Tokens of a row: as many as will follow the prefix in use.")] = 512,
    steps: Annotated[int, typer.Option(help="Steps of distillation; 0 leaves it out.")] = 200,
    batch_size: Annotated[int, typer.Option(help="Rows of a step.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Of the distillation.")] = 2e-3,
    seed: int = 0,
    feature_map: Annotated[str, typer.Option(help="anchored, elu, taylor or positive_random.")] = "anchored",
    features: Annotated[int | None, typer.Option(help="Number of features of anchored or positive_random.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of Z; full by default.")] = None,
    state_heads: Annotated[str, typer.Option(help="One state per 'query' or per 'kv' head.")] = "query",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run in the folder.")] = False,
) -> None:
    """Turn a long text, a KV cache or a prefix-tuning adapter into an adapter of fixed size, and say what was lost."""
    with one_line_errors():
        from .compression import Settings
        from .compression import compress as run

        given = {"text": text, "cache": cache, "prefix_tuning": prefix_tuning}
        chosen = [(name, path) for name, path in given.items() if path is not None]
        if len(chosen) != 1:
            raise ValueError(f"expected one of --text, --cache and --prefix-tuning, got {len(chosen)}")
        adapter: dict[str, Any] = {"feature_map": feature_map, "rank": rank, "state_heads": state_heads}
        if features is not None:
            adapter["feature_map_options"] = {"num_features": features}
        source, path = chosen[0][0], str(chosen[0][1])
        settings = Settings(
            model, source, path, calibration, rows, length, steps, batch_size, learning_rate, seed, adapter
        )
        with bars() as reporter:
            record = run(settings, output, resume=resume, overwrite=overwrite, reporter=reporter)
        show_losses(record, output)


def show_losses(record: dict[str, Any], output: Path) -> None:
    title = f"{record['held_out_tokens']:,} held-out tokens that follow {record['prefix_tokens']:,}"
    table = Table("model", "KL, nats per token", "same next token", "perplexity", title=title)
    names = {"with_prefix": "with the prefix", "without": "without it", "fitted": "state, fitted"}
    for key, name in {**names, "distilled": "state, distilled"}.items():
        if key in record:
            row = record[key]
            table.add_row(name, f"{row['kl']:.3f}", f"{row['agreement']:.1%}", f"{row['perplexity']:.2f}")
    console.print(table)
    console.print(
        f"KV cache {record['cache_bytes'] / 2**20:.1f} MiB, adapter {record['adapter_bytes'] / 2**20:.1f} MiB "
        f"whatever the length; {record['seconds'] / 60:.1f} minutes on {record['hardware']}"
    )
    console.print(f"saved to {output}: adapter, compress.json", markup=False)


@app.command()
def evaluate(
    adapter: Adapter,
    model: Model = None,
    data: Data = DEFAULT_DATA,
    items: Annotated[int, typer.Option(help="How many items.")] = 200,
    max_new_tokens: MaxNewTokens = 48,
    seed: Annotated[int, typer.Option(help="Of an embedded task; others than those of training.")] = 2_000_003,
) -> None:
    """Loss and right answers of a model with an adapter and without it."""
    with one_line_errors():
        from .data import check_source, encode_all, load_items, metric_of
        from .evaluation import check_room, figures
        from .models import load_tokenizer, longest_input

        base = base_name(adapter, model)
        check_source(data, items)
        tokenizer, limit = load_tokenizer(base), longest_input(base)
        examples = load_items(data, items, seed, tokenizer)
        rows = encode_all(examples, tokenizer, limit)
        prompts = [item.prompt for item in examples if item.prompt]
        check_room(prompts, tokenizer, max_new_tokens, limit)
        metric = metric_of(data)
        with bars() as reporter:
            reporter.stage("load")
            adapted = load_adapter(adapter, base)
            found: dict[str, dict[str, float]] = {}
            for name, context in (("base", adapted.disable_adapter), ("adapter", contextlib.nullcontext)):
                with context():
                    reporter.stage(name, len(prompts))
                    found[name] = figures(adapted, tokenizer, examples, rows, metric, max_new_tokens, reporter.advance)
        shown = ["loss, nats per token", *([metric.replace("_", " ")] if prompts else [])]
        table = Table("model", *shown, title=f"{len(examples)} items of {data}")
        for name, values in found.items():
            table.add_row(name, f"{values['loss']:.3f}", *([f"{values[metric]:.1%}"] if prompts else []))
        console.print(table)


@app.command()
def generate(
    adapter: Adapter,
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    model: Model = None,
    max_new_tokens: MaxNewTokens = 48,
) -> None:
    """Answer a prompt, with the adapter and without it."""
    with one_line_errors():
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        from .evaluation import answers, check_room
        from .models import load_tokenizer, longest_input

        base = base_name(adapter, model)
        tokenizer = load_tokenizer(base)
        check_room([prompt], tokenizer, max_new_tokens, longest_input(base))
        adapted = load_adapter(adapter, base)
        with adapted.disable_adapter():
            text = answers(adapted, tokenizer, [prompt], max_new_tokens)[0]
        console.print(f"base model:   {text.strip()}", style="dim", markup=False)
        console.print(f"with adapter: {answers(adapted, tokenizer, [prompt], max_new_tokens)[0].strip()}", markup=False)


@app.command()
def info(
    adapter: Adapter,
    model: Model = None,
    text: Annotated[str | None, typer.Option(help="Measure the prefix's share of attention on this text.")] = None,
    picture: Annotated[Path, typer.Option(help="Where --text draws that share, layers by heads.")] = Path("shares.png"),
) -> None:
    """What an adapter consists of; with --text, how much attention its prefix takes."""
    with one_line_errors():
        if text is not None and not text.strip():
            raise ValueError("--text is empty")
        base = base_name(adapter, model)
        tokens = None if text is None else tokens_of(text, base)
        from .reports import describe_adapter, plot_shares

        adapted = load_adapter(adapter, base)
        table = Table(title=str(adapter), show_header=False)
        for row in describe_adapter(adapted, adapter):
            table.add_row(*row)
        console.print(table)
        if tokens is not None:
            import torch

            from ..tuner.observation import prefix_shares

            ids = torch.tensor([tokens])
            shares = prefix_shares(adapted, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
            plot_shares(shares, picture)
            console.print(
                f"the prefix takes {shares.mean():.1%} of the attention, from {shares.min():.1%} to "
                f"{shares.max():.1%} by head; drawn in {picture}"
            )


def tokens_of(text: str, base: str) -> list[int]:
    """Of a text for a model; ValueError if there are none, or more than it takes."""
    from .data import start_of_text
    from .models import load_tokenizer, longest_input

    tokens, limit = start_of_text(text, load_tokenizer(base)), longest_input(base)
    if not 0 < len(tokens) <= limit:
        raise ValueError(f"--text has {len(tokens)} tokens, the model takes 1 to {limit}")
    return tokens


@app.command()
def theory(
    experiment: Annotated[str, typer.Argument(help="kernel, training, scaling, capacity, bridge or all.")] = "all",
    out: Annotated[Path, typer.Option(help="Folder for the measurements (JSON lines) and figures.")] = Path("theory"),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    largest: Annotated[int, typer.Option(help="The largest prefix has m = 2 to this power.")] = 16,
    inputs: Annotated[str, typer.Option(help="'random', or 'image': pieces of a photograph.")] = "random",
    seed: int = 0,
) -> None:
    """Section 3 of the paper, measured: does the kernel stay, does training converge, what does the loss scale with?
    And how many facts a state holds."""
    with one_line_errors():
        import torch

        from ..theory.experiments import EXPERIMENTS, check_device, run
        from ..theory.setting import Setting
        from .models import EMBEDDED, load_model

        names = list(EXPERIMENTS) if experiment == "all" else [experiment]
        if names[0] not in EXPERIMENTS:
            raise ValueError(f"unknown experiment {experiment!r}: expected one of {[*EXPERIMENTS, 'all']}")
        setting = Setting(largest=largest, inputs=inputs, device=check_device(device), seed=seed)
        for name in names:
            with bars() as reporter:
                seen = run(name, setting, out, reporter, lambda: load_model(EMBEDDED, dtype=torch.float32))
            console.print(f"[bold]{name}[/bold], in {out}: {name}.jsonl, {name}.png")
            for sentence in seen:
                console.print(f"- {sentence}", markup=False)
