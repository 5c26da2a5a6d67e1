"""The command line: finetune, compress, evaluate, generate, info, card, theory."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from safetensors import SafetensorError

from ..progress import Reporter
from .bars import bars, console

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_DATA = "chain-sum"

Adapter = Annotated[Path, typer.Argument(help="Folder of a saved adapter.")]
Model = Annotated[str | None, typer.Option(help="Base model; by default the one the adapter names.")]
BaseModel = Annotated[str, typer.Option("--model", help="smollm2-135m (embedded), a folder or a name on the hub.")]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="A .jsonl, .json, .csv, .tsv, .parquet or .txt file, a folder of them, name[:config][:split] on the hub, "
        "or chain-sum, gsm-symbolic, gsm-symbolic-worked.",
    ),
]
MaxNewTokens = Annotated[int, typer.Option(help="Length limit of generated answers.")]


@contextlib.contextmanager
def one_line_errors(resume: str | None = None) -> Iterator[None]:
    """Bad input ends with one line and exit code 2; Ctrl-C with the command that goes on, if there is one."""
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
    except KeyboardInterrupt:
        how = "" if resume is None else f": `{resume}` goes on from the last checkpoint"
        console.print(f"stopped{how}", soft_wrap=True, markup=False)
        raise typer.Exit(130) from None


@app.callback()
def start(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=lambda asked: show_version(asked), is_eager=True, help="Show versions and exit."
        ),
    ] = False,
) -> None:
    """Long prefixes for transformers as small adapters: fine-tune, compress, evaluate, generate."""


def show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        import peft
        import torch
        import transformers

        versions = ", ".join(f"{module.__name__} {module.__version__}" for module in (torch, transformers, peft))
        console.print(f"ntk-attention {version('ntk-attention')} ({versions})")
        raise typer.Exit


@app.command()
def finetune(
    context: typer.Context,
    output: Annotated[Path, typer.Argument(help="Folder for the adapter, its record and the plot of the loss.")],
    model: BaseModel = DEFAULT_MODEL,
    data: Data = DEFAULT_DATA,
    eval_data: Annotated[
        str | None, typer.Option(help="As --data: validation and test items. By default some of --data.")
    ] = None,
    items: Annotated[int | None, typer.Option(help="Read so many rows; all by default, 2000 of a task.")] = None,
    held_out: Annotated[int | None, typer.Option(help="Test items: 200 of --data, all of --eval-data.")] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="Read no more of the hub than --items.")] = False,
    max_length: Annotated[int | None, typer.Option(help="Tokens of an item; as the model takes by default.")] = None,
    too_long: Annotated[str, typer.Option(help="What to do with longer items: refuse, drop or cut.")] = "refuse",
    packing: Annotated[bool, typer.Option("--packing", help="Several items in a row of --max-length.")] = False,
    epochs: Annotated[float, typer.Option(help="Passes over the training items.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Rows that are computed at once.")] = 16,
    gradient_accumulation: Annotated[int, typer.Option(help="Batches of a step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Peak of the schedule.")] = 3e-3,
    scheduler: Annotated[str, typer.Option(help="linear or cosine to zero, or constant.")] = "linear",
    warmup: Annotated[
        float | None, typer.Option(help="Steps, or below 1 a share of all; a tenth, at most 20, by default.")
    ] = None,
    save_best: Annotated[bool, typer.Option("--save-best", help="Keep what had the lowest validation loss.")] = False,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many evaluations without a lower one; keeps the best.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the base model: auto, float32, bfloat16 or float16.")] = "auto",
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="Base model in 4 bits (nf4), with bitsandbytes.")
    ] = False,
    max_new_tokens: MaxNewTokens = 48,
    seed: int = 0,
    feature_map: Annotated[str, typer.Option(help="elu, taylor or positive_random.")] = "elu",
    rank: Annotated[int | None, typer.Option(help="Rank of Z; by default about a quarter of head_dim.")] = None,
    state_heads: Annotated[str, typer.Option(help="One state per 'query' or per 'kv' head.")] = "query",
    positions: Annotated[str, typer.Option(help="Queries without rotary positions, 'free', or 'rotary'.")] = "free",
    report_to: Annotated[str | None, typer.Option(help="tensorboard, wandb, ...: as of transformers.")] = None,
    push_to_hub: Annotated[str | None, typer.Option(help="Repository for the adapter; a new one is private.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML or JSON with these options, such as the finetune.yaml of a run.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run, with the options that it had.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run in the folder.")] = False,
) -> None:
    """Fine-tune a model and save an ordinary PEFT adapter."""
    with one_line_errors(f"ntk-attention finetune {output} --resume"):
        from .finetuning import finetune as run
        from .options import with_file
        from .run_folder import CONFIG
        from .settings import from_options

        saved = output / CONFIG
        options = with_file(context, saved if resume and config is None and saved.is_file() else config)
        with bars() as reporter:
            record = run(from_options(options), output, resume=resume, overwrite=overwrite, reporter=reporter)
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
    console.print(f"saved to {output}: adapter, finetune.yaml, finetune.json, loss.png", markup=False, soft_wrap=True)


def base_name(folder: Path, model: str | None) -> str:
    """The base model of the adapter in a folder; ValueError if the folder's config does not fit."""
    from ..tuner.config import NTKAttentionConfig
    from ..tuner.untrusted import CONFIG
    from .models import base_of

    if not (folder / CONFIG).exists():  # PEFT would look for it on the hub
        raise ValueError(f"{folder} has no {CONFIG}: expected the folder of a saved adapter")
    config = NTKAttentionConfig.from_pretrained(folder)
    return model or base_of(config.base_model_name_or_path)


def load_adapter(folder: Path, base: str, reporter: Reporter) -> Any:
    """The base model, in the dtype of the run, with the adapter in `folder`; ValueError if they do not fit."""
    import torch
    from peft import PeftModel

    from .models import DTYPES, load_model
    from .run_folder import read_record

    run = (read_record(folder) or {"settings": {}})["settings"]
    in_4bit = bool(run.get("load_in_4bit"))
    model, _ = load_model(base, DTYPES.get(run.get("dtype")), in_4bit=in_4bit, reporter=reporter)
    adapted = PeftModel.from_pretrained(model, folder)
    return (adapted if in_4bit else adapted.to("cuda" if torch.cuda.is_available() else "cpu")).eval()


@app.command()
def compress(
    output: Annotated[Path, typer.Argument(help="Folder for the adapter and its record.")],
    text: Annotated[Path | None, typer.Option(help="A text of any length.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="A KV cache that `ntk_attention.convert.save_cache` wrote.")
    ] = None,
    prefix_tuning: Annotated[Path | None, typer.Option(help="Folder of a prefix-tuning or cartridge adapter.")] = None,
    model: BaseModel = DEFAULT_MODEL,
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
    with one_line_errors(f"ntk-attention compress {output} --resume, with the same options,"):
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
    items: Annotated[int | None, typer.Option(help="How many; all by default, 200 of a task.")] = None,
    max_new_tokens: MaxNewTokens = 48,
    seed: Annotated[int, typer.Option(help="Of an embedded task; others than those of training.")] = 2_000_003,
) -> None:
    """Loss and right answers of a model with an adapter and without it."""
    with one_line_errors():
        from .evaluation import figures
        from .models import load_tokenizer
        from .tasks import metric_of
        from .work import to_evaluate

        base = base_name(adapter, model)
        with bars() as reporter:
            tokenizer = load_tokenizer(base)
            rows, asked = to_evaluate(data, items, seed, base, tokenizer, max_new_tokens, reporter)
            adapted = load_adapter(adapter, base, reporter)
            metric = metric_of(data)
            found: dict[str, dict[str, float]] = {}
            for name, context in (("base", adapted.disable_adapter), ("adapter", contextlib.nullcontext)):
                with context():
                    reporter.stage(name, len(rows) + len(asked))
                    found[name] = figures(adapted, tokenizer, rows, asked, metric, max_new_tokens, reporter.advance)
        shown = ["loss, nats per token", *([metric.replace("_", " ")] if asked else [])]
        table = Table("model", *shown, title=f"{len(rows):,} items of {data}")
        for name, values in found.items():
            table.add_row(name, f"{values['loss']:.3f}", *([f"{values[metric]:.1%}"] if asked else []))
        console.print(table)


@app.command()
def generate(
    adapter: Adapter,
    prompt: Annotated[str | None, typer.Argument(help="What to ask; without it, a conversation begins.")] = None,
    model: Model = None,
    system: Annotated[str | None, typer.Option(help="A system prompt, for the model's chat template.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Length limit of an answer; 256 by default.")] = None,
    temperature: Annotated[float, typer.Option(help="Of sampling; 0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens that hold this share.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
) -> None:
    """Answer a prompt, with the adapter and without it; or hold a conversation, which Ctrl-D ends."""
    with one_line_errors():
        if prompt is not None and not prompt.strip():
            raise ValueError("the prompt is empty")
        from transformers import set_seed

        from .data import prompt_tokens, with_system
        from .generation import check_sampling, converse, room_for, write_answer
        from .models import load_tokenizer, longest_input
        from .settings import check_seed

        check_sampling(temperature, top_p)
        check_seed(seed)
        base = base_name(adapter, model)
        tokenizer, limit = load_tokenizer(base), longest_input(base)
        if prompt is None and tokenizer.chat_template is None:
            raise ValueError(f"{base} has no chat template, so it holds no conversation: give a prompt")
        asked = with_system(system, prompt or "x")
        room = room_for(prompt_tokens(asked, tokenizer), max_new_tokens, limit)
        with bars() as reporter:
            adapted = load_adapter(adapter, base, reporter)
        sampling = {"temperature": temperature, "top_p": top_p}
        set_seed(seed)
        if prompt is None:
            write("A conversation, which Ctrl-D ends.\n", "dim")
            read = functools.partial(console.input, "[bold]> [/bold]")
            converse(adapted, tokenizer, read, write, limit, max_new_tokens, system, **sampling)
            write("\n")
            return
        write("base model:   ", "dim")
        with adapted.disable_adapter():
            write_answer(adapted, tokenizer, asked, room, functools.partial(write, style="dim"), **sampling)
        write("\nwith adapter: ")
        set_seed(seed)
        write_answer(adapted, tokenizer, asked, room, write, **sampling)
        write("\n")


def write(text: str, style: str | None = None) -> None:
    """Text as it comes."""
    console.print(text, end="", style=style, markup=False, soft_wrap=True, highlight=False)


@app.command()
def info(
    adapter: Adapter,
    model: Model = None,
    text: Annotated[str | None, typer.Option(help="Measure the prefix's share of attention on this text.")] = None,
    picture: Annotated[Path, typer.Option(help="Where --text draws that share, layers by heads.")] = Path("shares.png"),
    html: Annotated[
        Path | None, typer.Option(help="Write a page: what was adapted, losses, share by layer, head and token.")
    ] = None,
) -> None:
    """What an adapter consists of; with --text, how much attention its prefix takes."""
    with one_line_errors():
        if text is not None and not text.strip():
            raise ValueError("--text is empty")
        from .page import TEXT, Seen, page, read_run, write_page
        from .reports import describe_adapter, plot_shares

        record = None if html is None else read_run(adapter)
        base = base_name(adapter, model)
        measured = TEXT if text is None and html is not None else text
        tokens = None if measured is None else tokens_of(measured, base)
        with bars() as reporter:
            adapted = load_adapter(adapter, base, reporter)
        facts = describe_adapter(adapted, adapter)
        table = Table(title=str(adapter), show_header=False)
        for row in facts:
            table.add_row(*row)
        console.print(table)
        if tokens is None:
            return
        import torch

        from ..tuner.observation import token_shares

        shares = token_shares(adapted, torch.tensor([tokens]))
        heads = shares.mean(dim=-1)
        if text is not None:
            plot_shares(heads, picture)
            console.print(
                f"the prefix takes {heads.mean():.1%} of the attention, from {heads.min():.1%} to {heads.max():.1%} by "
                f"head; drawn in {picture}"
            )
        if html is not None:
            from .models import load_tokenizer, short_name

            tokenizer = load_tokenizer(base)
            seen = Seen(shares, [tokenizer.decode([token]) for token in tokens])
            title = f"{adapter.resolve().name}, an adapter of {short_name(base)}"
            write_page(html, page(title, facts, record, seen))
            console.print(f"written to {html}", markup=False, soft_wrap=True)


def tokens_of(text: str, base: str) -> list[int]:
    """Of a text for a model; ValueError if there are none, or more than it takes."""
    from .data import start_of_text
    from .models import load_tokenizer, longest_input

    tokens, limit = start_of_text(text, load_tokenizer(base)), longest_input(base)
    if not 0 < len(tokens) <= limit:
        raise ValueError(f"--text has {len(tokens)} tokens, the model takes 1 to {limit}")
    return tokens


@app.command()
def card(
    adapter: Adapter,
    base_model: Annotated[str | None, typer.Option(help="Its name on the hub, if the adapter names a folder.")] = None,
    license: Annotated[str | None, typer.Option(help="Of the adapter; that of the base model by default.")] = None,
) -> None:
    """Write the model card of an adapter, README.md, anew."""
    with one_line_errors():
        from .card import write_card

        base_name(adapter, base_model)
        console.print(f"written to {write_card(adapter, base_model, license)}", markup=False, soft_wrap=True)


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
