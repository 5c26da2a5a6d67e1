"""The main job: fine-tune a causal language model with an NTK-Attention adapter."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import peft
import torch
import transformers
from peft import get_peft_model
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from .calibration import calibrate, check_size
from .config import NTKAttentionConfig
from .data import EMBEDDED_TASKS, Item, Row, collate, encode_all, load_items
from .evaluation import MAX_NEW_TOKENS, exact_match, mean_loss
from .models import load_model
from .observation import adapted_layers

RECORD = "finetune.json"  # settings and results; its presence says that a folder is ours
CHECKPOINTS = "checkpoints"
WRITTEN = (RECORD, "adapter_config.json", "adapter_model.safetensors", "README.md", "loss.png", "shares.png")
CALIBRATION_ITEMS = 64
VALIDATION_ITEMS = 64
FREE_BYTES = 200 * 2**20  # an adapter, its optimizer state and one more checkpoint


@dataclass(frozen=True)
class Settings:
    """Everything that a run depends on."""

    model: str
    data: str
    items: int = 2000
    held_out: int = 200
    epochs: float = 1.0
    batch_size: int = 16
    learning_rate: float = 5e-3
    max_new_tokens: int = MAX_NEW_TOKENS
    seed: int = 0
    adapter: dict[str, Any] = field(default_factory=dict)  # options of NTKAttentionConfig

    def __post_init__(self) -> None:
        for name in ("items", "held_out", "epochs", "batch_size", "learning_rate", "max_new_tokens"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")


@dataclass(frozen=True)
class Split:
    train: list[Item]
    validation: list[Item]
    test: list[Item]


def split_items(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> Split:
    """Training, validation and held-out items; none of the last two has the prompt of a training item.

    Raises:
        ValueError: if there are too few items.
    """
    num_validation = min(VALIDATION_ITEMS, settings.held_out)
    wanted = settings.held_out + num_validation
    if settings.data in EMBEDDED_TASKS:
        train = load_items(settings.data, settings.items, settings.seed, tokenizer)
        seen = {item.prompt for item in train}
        others = load_items(settings.data, 4 * wanted, settings.seed + 10**6, tokenizer)
        others = list({item.prompt: item for item in others if item.prompt not in seen}.values())[:wanted]
    else:
        items = load_items(settings.data, settings.items, settings.seed, tokenizer)
        wanted = min(wanted, len(items) // 3)
        generator = torch.Generator().manual_seed(settings.seed)
        items = [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]
        others, train = items[:wanted], items[wanted:]
        held = {item.prompt for item in others if item.prompt}
        train = [item for item in train if item.prompt not in held]
    if len(others) < 2 or not train:
        raise ValueError(
            f"{settings.data} gives {len(train)} training and {len(others)} held-out items: too few for training, "
            "validation and test"
        )
    num_validation = min(num_validation, len(others) // 2)
    return Split(train, others[:num_validation], others[num_validation:])


def check_folder(output: Path, settings: Any, *, resume: bool, overwrite: bool, name: str = RECORD) -> None:
    """Make sure that the run may write into the folder, before any long work.

    Raises:
        ValueError: if the folder holds something else, or a run that neither `resume` nor `overwrite` was asked for,
            or one with other settings; or if its disk is nearly full.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file: expected a folder to write the adapter to")
    ours = (output / name).is_file() and (overwrite or read_record(output, name) is not None)
    if output.exists() and any(output.iterdir()) and not ours:
        raise ValueError(f"{output} is not empty and not a run of this program: choose another folder")
    if ours and not overwrite:
        record = read_record(output, name) or {}
        if not resume:
            raise ValueError(f"{output} already holds a run: add --resume to go on, or --overwrite to start anew")
        changed = [key for key, value in asdict(settings).items() if record["settings"].get(key) != value]
        if changed:
            raise ValueError(f"{output} was started with other settings ({', '.join(changed)}): cannot resume")
        if "after" in record:
            raise ValueError(f"the run in {output} is finished: nothing to resume")
    existing = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < FREE_BYTES:
        raise ValueError(f"{output} has {free / 2**20:.0f} MiB of free disk space, {FREE_BYTES / 2**20:.0f} are needed")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"{existing} cannot be written to")


def read_record(output: Path, name: str = RECORD) -> dict[str, Any] | None:
    path = output / name
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error.msg}, line {error.lineno}): use --overwrite") from None
    if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
        raise ValueError(f"{path} is not the record of a run: expected an object with settings")
    return record


class Reporter(Protocol):
    """What a run tells while it works."""

    def stage(self, text: str, total: int | None = None) -> None: ...

    def advance(self, n: int = 1, **figures: float) -> None: ...


class Silent:
    def stage(self, text: str, total: int | None = None) -> None:
        pass

    def advance(self, n: int = 1, **figures: float) -> None:
        pass


class ReportToUser(TrainerCallback):
    def __init__(self, reporter: Reporter):
        self.reporter = reporter
        self.figures: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.reporter.stage("fine-tune", state.max_steps)
        self.reporter.advance(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.reporter.advance(1, **self.figures)

    def on_log(self, args, state, control, logs=None, **kwargs):
        names = {"loss": "loss", "eval_loss": "validation"}
        self.figures.update({names[k]: v for k, v in (logs or {}).items() if k in names})
        if not all(math.isfinite(v) for v in self.figures.values()):
            raise ValueError(
                f"the loss is not finite at step {state.global_step}: lower the learning rate "
                f"({args.learning_rate}); the last good checkpoint is in {args.output_dir}"
            )


def finetune(
    settings: Settings,
    output: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Calibrate and train an adapter, save it to `output`, and return the record that is written beside it.

    Raises:
        ValueError: for unusable settings, data or folders, before any long work starts.
    """
    reporter = reporter or Silent()
    started = time.time()
    config = NTKAttentionConfig(task_type="CAUSAL_LM", **settings.adapter)
    check_folder(output, settings, resume=resume, overwrite=overwrite)
    set_seed(settings.seed)
    reporter.stage(f"load {settings.model}")
    base, tokenizer = load_model(settings.model)
    split = split_items(settings, tokenizer)
    limit = getattr(base.config, "max_position_embeddings", None) or 2**20
    rows = {name: encode_all(getattr(split, name), tokenizer, limit) for name in ("train", "validation", "test")}
    base.to("cuda" if torch.cuda.is_available() else "cpu")
    model = get_peft_model(base, config)
    check_size(adapted_layers(model))

    if overwrite and output.exists():
        for name in WRITTEN:
            (output / name).unlink(missing_ok=True)
        shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    record = read_record(output) or {"settings": asdict(settings)}
    measure = partial(measure_test, model, tokenizer, split.test, rows["test"], settings.max_new_tokens, reporter)
    if "before" not in record:
        with model.disable_adapter():
            record["before"] = measure("held-out items before")
        write_json(output / RECORD, record)

    reporter.stage("calibrate")
    calibration_rows = rows["train"][:CALIBRATION_ITEMS]
    parts = range(0, len(calibration_rows), settings.batch_size)
    calibrate(model, [collate(calibration_rows[i : i + settings.batch_size], tokenizer.pad_token_id) for i in parts])
    record["start_loss"] = mean_loss(model, rows["validation"], tokenizer.pad_token_id)

    trainer = make_trainer(model, rows, tokenizer.pad_token_id, settings, output, reporter)
    checkpoints = output / CHECKPOINTS
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    record["after"] = measure("held-out items after")
    record |= {"train_items": len(split.train), "test_items": len(split.test), "seconds": time.time() - started}
    record |= describe_run(model, trainer, output)
    write_json(output / RECORD, record)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return record


def describe_run(model: Any, trainer: Trainer, output: Path) -> dict[str, Any]:
    """The part of the record that says what was trained, how it went and on what."""
    trainable, total = model.get_nb_trainable_parameters()
    history = trainer.state.log_history
    return {
        "trainable_parameters": trainable,
        "base_parameters": total - trainable,
        "adapter_bytes": (output / "adapter_model.safetensors").stat().st_size,
        "steps": trainer.state.global_step,
        "train_loss": [[h["step"], h["loss"]] for h in history if "loss" in h],
        "validation_loss": [[h["step"], h["eval_loss"]] for h in history if "eval_loss" in h],
        "hardware": hardware(),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)},
    }


def measure_test(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    items: list[Item],
    rows: list[Row],
    max_new_tokens: int,
    reporter: Reporter,
    stage: str,
) -> dict[str, float]:
    """Loss and, where items have prompts, exact match on the held-out items."""
    has_prompts = bool(items[0].prompt)
    reporter.stage(stage, len(items) if has_prompts else None)
    figures = {"loss": mean_loss(model, rows, tokenizer.pad_token_id)}
    if has_prompts:
        figures["exact_match"] = exact_match(model, tokenizer, items, max_new_tokens, progress=reporter.advance)
    return figures


def hardware() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


def make_trainer(
    model: Any, rows: dict[str, list], pad_token_id: int, settings: Settings, output: Path, reporter: Reporter
) -> Trainer:
    steps = math.ceil(len(rows["train"]) / settings.batch_size * settings.epochs)
    every = max(1, steps // 5)
    arguments = TrainingArguments(
        output_dir=str(output / CHECKPOINTS),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=min(20, max(1, steps // 10)),
        logging_steps=max(1, steps // 100),
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=1,
        seed=settings.seed,
        report_to=[],
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        data_collator=lambda part: collate(part, pad_token_id),
        callbacks=[ReportToUser(reporter)],
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    return trainer


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)
