"""The job: a text, a KV cache or a prefix-tuning adapter becomes an ordinary NTK-Attention adapter, with a report."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import set_seed

from ..convert.anchors import anchor
from ..convert.distillation import distill, teacher_logits
from ..convert.fitting import fit
from ..convert.own_text import study
from ..convert.prefixes import (
    by_layer,
    check_prefix,
    load_cache,
    prefix_of_adapter,
    prefix_of_cache,
    prefix_of_text,
)
from ..ops.exact import LayerPrefix
from ..progress import Reporter, Silent
from ..tuner.config import NTKAttentionConfig
from ..tuner.observation import adapted_layers
from .card import write_card
from .data import start_of_text
from .encoding import encode_all
from .evaluation import fidelity, logits_of
from .finetuning import hardware
from .models import EMBEDDED, load_model, load_tokenizer, longest_input
from .run_folder import check_folder, read_record, write_json
from .settings import check_numbers, check_seed
from .sources import Data, load_data, read_text
from .splits import in_pieces

RECORD = "compress.json"  # settings and results; its presence says that a folder is ours
WORK = "work"  # what an interrupted run goes on with
WRITTEN = (RECORD, "adapter_config.json", "adapter_model.safetensors", "README.md")
SOURCES = ("text", "cache", "prefix_tuning")
HELD_OUT_ROWS = 8


@dataclass(frozen=True)
class Settings:
    """Everything that a run depends on."""

    model: str
    source: str  # one of SOURCES
    path: str
    calibration: str | None = None  # items as in data.py; by default text that the model studies the prefix with
    rows: int = 32
    length: int = 512
    steps: int = 200  # of distillation
    batch_size: int = 8
    learning_rate: float = 2e-3
    seed: int = 0
    adapter: dict[str, Any] = field(default_factory=dict)  # options of NTKAttentionConfig

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"unknown source {self.source!r}: expected one of {SOURCES}")
        check_numbers(self, whole=("rows", "length", "batch_size"), positive=("learning_rate",))
        check_seed(self.seed)
        if self.rows < 2 * self.batch_size:
            raise ValueError(f"rows must be two batches at least, got {self.rows} rows of batches of {self.batch_size}")
        if not isinstance(self.steps, int) or self.steps < 0:
            raise ValueError(f"steps must be a whole number and not negative, got {self.steps}")


def compress(
    settings: Settings,
    output: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Read the prefix, fit and distill states, save the adapter to `output`, and return the record beside it.

    The calibration text, the fitted adapter and the distilled one are kept as they are made: a run that was interrupted
    goes on after the last of them.

    Raises:
        ValueError: for unusable settings, sources or folders, before anything is written.
    """
    reporter, started = reporter or Silent(), time.time()
    config = NTKAttentionConfig(task_type="CAUSAL_LM", **settings.adapter).for_given_prefix()
    check_folder(output, asdict(settings), resume=resume, overwrite=overwrite, name=RECORD)
    check_source(settings)
    following = read_calibration(settings, reporter)
    set_seed(settings.seed)
    reporter.stage(f"load {settings.model}")
    tokenizer = load_tokenizer(settings.model)
    given = given_batches(settings, following, tokenizer, longest_input(settings.model))
    document, cache = read_source(settings, tokenizer)
    base, _ = load_model(settings.model, reporter=reporter)
    base.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    prefix, seconds = read_prefix(settings, base, document, cache, reporter)
    check_prefix(base, prefix)

    if overwrite and output.exists():
        for name in WRITTEN:
            (output / name).unlink(missing_ok=True)
        shutil.rmtree(output / WORK, ignore_errors=True)
    work = output / WORK
    work.mkdir(parents=True, exist_ok=True)
    record = read_record(output, RECORD) or {"settings": asdict(settings)}
    write_json(output / RECORD, record)
    tokens = sum(layer.keys.shape[1] for layer in prefix) / len(prefix)
    record |= {"prefix_tokens": round(tokens), "cache_bytes": bytes_of(prefix), "prefill_seconds": round(seconds, 2)}

    model: Any = get_peft_model(base, config)
    named = by_layer(model, prefix)
    batches, held_out = calibration_text(settings, model, tokenizer, named, document, given, work, reporter)
    fit_and_distill(settings, model, named, batches, held_out, output, record, reporter)
    reporter.stage("save")
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    record |= {
        "state_numbers": sum(x.numel() for x in states_of(model).values()),
        "adapter_bytes": (output / "adapter_model.safetensors").stat().st_size,
        "held_out_tokens": sum(batch["input_ids"].numel() for batch in held_out),
        "seconds": round(time.time() - started, 1),
        "hardware": hardware(),
    }
    write_json(output / RECORD, record | {"after": True})
    write_card(output)
    shutil.rmtree(work)
    return record


def fit_and_distill(
    settings: Settings,
    model: Any,
    named: Mapping[str, LayerPrefix],
    batches: list[dict[str, Tensor]],
    held_out: list[dict[str, Tensor]],
    output: Path,
    record: dict[str, Any],
    reporter: Reporter,
) -> None:
    """Make the states, or go on with those that an interrupted run has fitted, and note how good they are."""
    work = output / WORK
    expected = teacher_logits(model, named, held_out)
    with model.disable_adapter():
        record["without"] = fidelity(held_out, expected, logits_of(model, held_out))
    record["with_prefix"] = fidelity(held_out, expected, expected)

    if (work / "fitted").is_dir():
        load_states(model, work / "fitted")
    else:
        if model.active_peft_config.feature_map == "anchored":
            anchor(model, named, batches)
        report = fit(model, named, batches, reporter=reporter)
        record["layer_error"] = {name: [round(x, 4) for x in e.tolist()] for name, e in report.error.items()}
        record["fitted"] = fidelity(held_out, expected, logits_of(model, held_out))
        write_json(output / RECORD, record)
        keep(model, work / "fitted")
    if settings.steps:
        curve = distill(
            model, named, batches, steps=settings.steps, learning_rate=settings.learning_rate, reporter=reporter
        )
        record["distilled"] = fidelity(held_out, expected, logits_of(model, held_out))
        record["kl_curve"] = [round(x, 4) for x in curve[:: max(1, len(curve) // 50)]]


def check_source(settings: Settings) -> None:
    """Raise ValueError unless the source is there and what it should be."""
    path = Path(settings.path)
    if settings.source == "prefix_tuning":
        if not (path / "adapter_config.json").is_file():
            raise ValueError(f"{path} has no adapter_config.json: expected the folder of a prefix-tuning adapter")
        try:
            kind = PeftConfig.from_pretrained(path).peft_type.value
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}/adapter_config.json cannot be read: {type(error).__name__}, {error}") from None
        if kind not in ("PREFIX_TUNING", "CARTRIDGE"):
            raise ValueError(f"{path}: expected a prefix-tuning or cartridge adapter, got {kind}")
    elif not path.is_file():
        raise ValueError(f"no file {path}: expected {'a text' if settings.source == 'text' else 'a KV cache'}")
    elif settings.source == "text":
        read_text(path)


def read_calibration(settings: Settings, reporter: Reporter) -> Data | None:
    """The items that the user gave to calibrate on."""
    if settings.calibration is None:
        return None
    # The embedded model has a template, and is not made before the data are known to be good.
    has_template = settings.model == EMBEDDED or load_tokenizer(settings.model).chat_template is not None
    wanted = settings.rows + HELD_OUT_ROWS
    return load_data(settings.calibration, wanted, settings.seed, has_template=has_template, reporter=reporter)


def read_source(settings: Settings, tokenizer: Any) -> tuple[Tensor, Any]:
    """What needs no model: the tokens of the prefix, none where they are not known, and the KV cache if it is one."""
    if settings.source == "cache":
        cache, document = load_cache(settings.path)
        return document, cache
    tokens = start_of_text(read_text(Path(settings.path)), tokenizer) if settings.source == "text" else []
    return torch.tensor(tokens, dtype=torch.long), None


def read_prefix(
    settings: Settings, base: Any, document: Tensor, cache: Any, reporter: Reporter
) -> tuple[list[LayerPrefix], float]:
    """The prefix, and the seconds that it took."""
    started = time.time()
    if settings.source == "text":
        reporter.stage("read the text", len(document))
        return prefix_of_text(base, document, progress=reporter.advance), time.time() - started
    if settings.source == "cache":
        return [on(base, layer) for layer in prefix_of_cache(base, cache)], time.time() - started
    try:
        tuned = PeftModel.from_pretrained(base, settings.path)
    except (RuntimeError, TypeError, KeyError) as error:
        raise ValueError(f"{settings.path} does not fit {settings.model}: {str(error).splitlines()[0]}") from None
    return prefix_of_adapter(tuned), time.time() - started


def on(model: Any, layer: LayerPrefix) -> LayerPrefix:
    weight = next(model.parameters())
    return LayerPrefix(layer.keys.to(weight), layer.values.to(weight))


def given_batches(settings: Settings, data: Data | None, tokenizer: Any, limit: int) -> list[dict[str, Tensor]]:
    """The calibration items that the user gave, in batches: `rows` to fit on and some held out."""
    if data is None:
        return []
    items = in_pieces(data, tokenizer, limit, size=settings.rows + HELD_OUT_ROWS)
    rows = encode_all(items, tokenizer, limit)
    if len(rows) < 3 * settings.batch_size:
        raise ValueError(f"{settings.calibration} gives {len(rows)} items, {3 * settings.batch_size} are needed")
    batches = []
    for i in range(0, len(rows), settings.batch_size):
        part = [torch.tensor(row["input_ids"]) for row in rows[i : i + settings.batch_size]]
        padded = torch.nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=tokenizer.pad_token_id)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(x) for x in part], batch_first=True)
        batches.append({"input_ids": padded, "attention_mask": mask})
    return batches


def calibration_text(
    settings: Settings,
    model: Any,
    tokenizer: Any,
    prefix: Mapping[str, LayerPrefix],
    document: Tensor,
    given: list[dict[str, Tensor]],
    work: Path,
    reporter: Reporter,
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Batches to fit on, and batches of the same kind, held out, for the report."""
    device = next(model.parameters()).device
    if given:
        batches = [{k: v.to(device) for k, v in batch.items()} for batch in given]
        last = max(1, HELD_OUT_ROWS // settings.batch_size)
        return batches[:-last], batches[-last:]
    path = work / "study.safetensors"
    sizes: dict[str, Any] = {"batch_size": settings.batch_size, "length": settings.length}
    if not path.is_file():
        write = partial(study, model, tokenizer, prefix, document, reporter=reporter, **sizes)
        made = [*write(rows=settings.rows, seed=settings.seed), *write(rows=HELD_OUT_ROWS, seed=settings.seed + 1)]
        ids = {str(i): batch["input_ids"].cpu().contiguous() for i, batch in enumerate(made)}
        save_file(ids, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)
    ids = load_file(path, device=str(device))
    batches = [{"input_ids": ids[str(i)]} for i in range(len(ids))]
    own = -(-settings.rows // settings.batch_size)
    return batches[:own], batches[own:]


def bytes_of(prefix: Sequence[LayerPrefix]) -> int:
    return sum(x.numel() * x.element_size() for layer in prefix for x in (layer.keys, layer.values))


def states_of(model: Any) -> dict[str, Tensor]:
    """The tensors of the states of an adapter, without maps, by name."""
    found: dict[str, Tensor] = {}
    for name, layer in adapted_layers(model).items():
        tensors = layer["default"].named_parameters()
        found |= {f"{name}.{key}": x for key, x in tensors if not key.startswith("feature_map")}
    return found


def keep(model: Any, folder: Path) -> None:
    """Save the adapter into a folder, whole or not at all."""
    unfinished = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    unfinished.rename(folder)


def load_states(model: Any, folder: Path) -> None:
    """Load an adapter that `keep` saved into the model's own."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
