"""The main job: fine-tune a causal language model with an NTK-Attention adapter."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from accelerate import PartialState
from peft import get_peft_model
from torch import Tensor
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from ..calibration.start import calibrate, check_size
from ..progress import Reporter, Silent
from ..tuner.config import NTKAttentionConfig
from ..tuner.distributed import gathered, whole
from ..tuner.observation import adapted_layers
from ..tuner.routing import CHILD
from .data import EMBEDDED_TASKS, Item, Row, check_source, collate, encode_all, load_items, metric_of
from .evaluation import MAX_NEW_TOKENS, check_room, figures, mean_loss
from .models import load_model, load_tokenizer, longest_input
from .run_folder import (
    CHECKPOINTS,
    RECORD,
    STAGING,
    check_folder,
    clear,
    last_good_checkpoint,
    locked,
    move,
    read_record,
    write_json,
)
from .trainer import AdapterTrainer, load_calibration, save_calibration, share_calibration

CALIBRATION = "calibration.safetensors"
CALIBRATION_ITEMS = 64
VALIDATION_ITEMS = 64
CHECKPOINTS_OF_A_RUN = 20
EVALUATIONS_OF_A_RUN = 5


@dataclass(frozen=True)
class Settings:
    """Everything that a run depends on."""

    model: str
    data: str
    items: int = 2000
    held_out: int = 200
    epochs: float = 1.0
    batch_size: int = 16
    learning_rate: float = 3e-3
    max_new_tokens: int = MAX_NEW_TOKENS
    seed: int = 0
    adapter: dict[str, Any] = field(default_factory=dict)  # options of NTKAttentionConfig

    def __post_init__(self) -> None:
        check_numbers(self, whole=("items", "held_out", "batch_size", "max_new_tokens"))
        check_numbers(self, positive=("epochs", "learning_rate"))
        check_seed(self.seed)


def check_numbers(settings: Any, whole: Sequence[str] = (), positive: Sequence[str] = ()) -> None:
    """Raise ValueError unless these settings are positive and finite, and the first ones whole numbers."""
    for name in (*whole, *positive):
        value = getattr(settings, name)
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
        if name in whole and not isinstance(value, int):
            raise ValueError(f"{name} must be a whole number, got {value}")


def check_seed(seed: int) -> None:
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be a whole number from 0 to 2^32 - 1, got {seed}")


@dataclass(frozen=True)
class Split:
    train: list[Item]
    validation: list[Item]
    test: list[Item]


def split_items(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> Split:
    """Training, validation and held-out items; none of the last two has the prompt of a training item, or its text.

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
        held = {item.prompt or item.completion for item in others}
        train = [item for item in train if (item.prompt or item.completion) not in held]
    if len(others) < 2 or not train:
        raise ValueError(
            f"{settings.data} gives {len(train)} training and {len(others)} held-out items: too few for training, "
            "validation and test"
        )
    num_validation = min(num_validation, len(others) // 2)
    return Split(train, others[:num_validation], others[num_validation:])


def encoded(split: Split, settings: Settings, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Row]]:
    """Tokens of every part.

    Raises:
        ValueError: if an item, or a prompt with its answer, is longer than what the model takes.
    """
    limit = longest_input(settings.model)
    rows = {name: encode_all(getattr(split, name), tokenizer, limit) for name in ("train", "validation", "test")}
    prompts = [item.prompt for item in split.test if item.prompt]
    check_room(prompts, tokenizer, settings.max_new_tokens, limit)
    return rows


class ReportToUser(TrainerCallback):
    def __init__(self, reporter: Reporter):
        self.reporter = reporter
        self.figures: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.reporter.stage("fine-tune", state.max_steps)
        self.reporter.advance(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.reporter.advance(1, **self.figures)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        names = {"loss": "loss", "eval_loss": "validation"}
        self.figures.update({names[k]: v for k, v in (logs or {}).items() if k in names})


def finetune(
    settings: Settings,
    output: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Calibrate and train an adapter, save it to `output`, and return the record that is written beside it.

    A run that was stopped at any moment, by kill -9 as well, goes on with `resume` from its last whole checkpoint and
    ends as it would have (on a CPU, bit by bit).

    Raises:
        ValueError: for unusable settings, data or folders, before any long work starts; if another run writes into
            the folder; if a checkpoint cannot be written; and if a loss or a gradient is not finite: the message names
            the step, the module and the last good checkpoint.
    """
    started = time.time()
    processes = PartialState(cpu=not torch.cuda.is_available())
    reporter = reporter if reporter is not None and processes.is_main_process else Silent()
    config = NTKAttentionConfig(task_type="CAUSAL_LM", **settings.adapter)
    if settings.batch_size % processes.num_processes:
        raise ValueError(
            f"batch_size is that of all processes together: expected a multiple of {processes.num_processes}, got "
            f"{settings.batch_size}"
        )
    if processes.is_main_process:
        check_folder(output, asdict(settings), resume=resume, overwrite=overwrite)
    check_source(settings.data, settings.items)
    set_seed(settings.seed)
    # With FSDP, transformers and accelerate would leave the model empty on all processes but the first until the
    # trainer shards it: too late for calibration.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    reporter.stage(f"load {settings.model}")
    tokenizer = load_tokenizer(settings.model)
    split = split_items(settings, tokenizer)
    rows = encoded(split, settings, tokenizer)
    base, _ = load_model(settings.model)
    model = get_peft_model(base.to(processes.device), config)
    check_size(adapted_layers(model))

    with locked(output) if processes.is_main_process else nullcontext():
        if processes.is_main_process:
            check_folder(output, asdict(settings), resume=resume, overwrite=overwrite)  # now that it is ours
            if overwrite:
                clear(output)
        processes.wait_for_everyone()
        record = calibrate_and_train(model, tokenizer, split, rows, settings, output, reporter, started)
        if processes.is_main_process:
            shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
    return record


def calibrate_and_train(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    rows: dict[str, list[Row]],
    settings: Settings,
    output: Path,
    reporter: Reporter,
    started: float,
) -> dict[str, Any]:
    """What is left of a run. Every process computes every figure; the first one writes."""
    processes = PartialState()
    record = read_record(output) or {"settings": asdict(settings)}
    checkpoint = last_good_checkpoint(output / CHECKPOINTS)
    processes.wait_for_everyone()  # what is there was read by all before one writes
    measure = partial(measure_test, model, tokenizer, split.test, rows["test"], settings, reporter)
    write_record = partial(write_json, output / RECORD) if processes.is_main_process else lambda record: None
    if "before" not in record:
        with model.disable_adapter():
            record["before"] = measure("held-out items before")
        write_record(record)

    reporter.stage("calibrate")
    calibration = output / CHECKPOINTS / CALIBRATION
    if calibration.is_file() and "start_loss" in record:
        load_calibration(model, calibration)
    else:
        start(model, rows["train"], tokenizer.pad_token_id, settings.batch_size)
        share_calibration(model, processes)
        if processes.is_main_process:
            save_calibration(model, calibration)
        record["start_loss"] = mean_loss(model, rows["validation"], tokenizer.pad_token_id)
        write_record(record)

    trainer = make_trainer(model, rows, tokenizer.pad_token_id, settings, output, reporter)
    trainer.train_from(checkpoint)
    save_whole(trainer, tokenizer, output)
    record["after"] = measure("held-out items after")
    record |= {"train_items": len(split.train), "test_items": len(split.test), "seconds": time.time() - started}
    record |= describe_run(model, trainer, output)
    write_record(record)
    processes.wait_for_everyone()
    return record


def start(model: Any, rows: list[Row], pad_token_id: int, batch_size: int) -> None:
    rows = rows[:CALIBRATION_ITEMS]
    calibrate(model, [collate(rows[i : i + batch_size], pad_token_id) for i in range(0, len(rows), batch_size)])


def save_whole(trainer: AdapterTrainer, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """Every file of the adapter and of the tokenizer, one after another, each whole or not at all."""
    tensors = adapter_tensors(trainer.model)
    if trainer.accelerator.is_main_process:
        staging = output / CHECKPOINTS / STAGING
        shutil.rmtree(staging, ignore_errors=True)
        trainer.model.save_pretrained(staging, state_dict=tensors)
        tokenizer.save_pretrained(staging)
        for path in staging.iterdir():
            move(path, output / path.name)
    trainer.accelerator.wait_for_everyone()


def adapter_tensors(model: Any) -> dict[str, Tensor]:
    """The adapter's part of the model's state dict, put together."""
    with gathered([p for layer in adapted_layers(model).values() for p in layer.parameters()]):
        tensors = {name: x for name, x in model.state_dict().items() if CHILD in name.split(".")}
        return {name: whole(x).clone() for name, x in tensors.items()}


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
        "processes": PartialState().num_processes,
        "hardware": hardware(),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)},
    }


def measure_test(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    items: list[Item],
    rows: list[Row],
    settings: Settings,
    reporter: Reporter,
    stage: str,
) -> dict[str, float]:
    """Figures of the held-out items."""
    reporter.stage(stage, sum(bool(item.prompt) for item in items) or None)
    metric = metric_of(settings.data)
    return figures(model, tokenizer, items, rows, metric, settings.max_new_tokens, reporter.advance)


def hardware() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


def make_trainer(
    model: Any, rows: dict[str, list[Row]], pad_token_id: int, settings: Settings, output: Path, reporter: Reporter
) -> Trainer:
    steps = math.ceil(len(rows["train"]) / settings.batch_size * settings.epochs)
    # Both fall on a step that is logged, so that a resumed run logs the same figures.
    logged = max(1, steps // 100)
    evaluated, saved = (
        logged * max(1, steps // (parts * logged)) for parts in (EVALUATIONS_OF_A_RUN, CHECKPOINTS_OF_A_RUN)
    )
    arguments = TrainingArguments(
        output_dir=str(output / CHECKPOINTS),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size // PartialState().num_processes,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=min(20, max(1, steps // 10)),
        logging_steps=logged,
        eval_strategy="steps",
        eval_steps=evaluated,
        save_strategy="steps",
        save_steps=saved,
        seed=settings.seed,
        report_to=[],
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = AdapterTrainer(
        model=model,
        args=arguments,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        data_collator=lambda part: collate(part, pad_token_id),
        callbacks=[ReportToUser(reporter)],
        pad_token_id=pad_token_id,
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    return trainer
