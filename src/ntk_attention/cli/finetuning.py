"""The main job: fine-tune a causal language model with an NTK-Attention adapter."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
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
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from ..calibration.start import calibrate, check_size
from ..progress import Reporter, Silent
from ..tuner.config import NTKAttentionConfig
from ..tuner.distributed import gathered, whole
from ..tuner.observation import adapted_layers
from ..tuner.routing import CHILD
from .card import write_card
from .data import Row, collate
from .evaluation import figures, mean_loss
from .hub import check_push, push
from .models import DTYPES, load_model
from .options import save_options
from .run_folder import (
    CHECKPOINTS,
    CONFIG,
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
from .settings import SCHEDULERS, Settings
from .tasks import metric_of
from .trainer import AdapterTrainer, load_calibration, save_calibration, share_calibration
from .work import Work, check_packing, prepare

CALIBRATION = "calibration.safetensors"
CHECKPOINTS_OF_A_RUN = 20
EVALUATIONS_OF_A_RUN = 5


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
    check_services(settings)
    set_seed(settings.seed)
    # With FSDP, transformers and accelerate would leave the model empty on all processes but the first until the
    # trainer shards it: too late for calibration.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    tokenizer, work = prepare(settings, reporter)
    base, _ = load_model(settings.model, DTYPES[settings.dtype], in_4bit=settings.load_in_4bit, reporter=reporter)
    model = get_peft_model(base if settings.load_in_4bit else base.to(processes.device), config)
    check_size(adapted_layers(model))

    with locked(output) if processes.is_main_process else nullcontext():
        if processes.is_main_process:
            check_folder(output, asdict(settings), resume=resume, overwrite=overwrite)  # now that it is ours
            if overwrite:
                clear(output)
        processes.wait_for_everyone()
        record = calibrate_and_train(model, tokenizer, work, settings, output, reporter, started)
        if processes.is_main_process:
            shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
            if settings.push_to_hub is not None:
                reporter.stage(f"push to {settings.push_to_hub}")
                push(output, settings.push_to_hub)
    return record


def check_services(settings: Settings) -> None:
    """Raise ValueError unless what is to hear of the run is there."""
    names = [] if settings.report_to is None else settings.report_to.split(",")
    unknown = [name for name in names if name not in INTEGRATION_TO_CALLBACK]
    if unknown:
        known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
        raise ValueError(f"report_to must be one or several of {known}, got {settings.report_to!r}")
    missing = [name for name in names if name not in get_available_reporting_integrations()]
    if missing:
        raise ValueError(f"report_to needs {', '.join(missing)}, which is not installed: pip install {missing[0]}")
    if settings.push_to_hub is not None:
        check_push(settings.push_to_hub)


def calibrate_and_train(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    work: Work,
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
    check_same_data(record, work, output)
    measure = partial(measure_test, model, tokenizer, work, settings, reporter)
    write_record = partial(write_json, output / RECORD) if processes.is_main_process else lambda record: None
    write_record(record | work.found)
    if processes.is_main_process:
        save_options(output / CONFIG, settings.options(), f"ntk-attention finetune OUT --config {CONFIG}")
    record |= work.found
    if settings.packing:
        check_packing(model, work.rows["train"], tokenizer.pad_token_id)
    if "before" not in record:
        with model.disable_adapter():
            record["before"] = measure("held-out items before")
        write_record(record)

    calibration = output / CHECKPOINTS / CALIBRATION
    if calibration.is_file() and "start_loss" in record:
        load_calibration(model, calibration)
    else:
        start(model, work.rows["calibration"], tokenizer.pad_token_id, settings.batch_size, reporter)
        share_calibration(model, processes)
        if processes.is_main_process:
            save_calibration(model, calibration)
        record["start_loss"] = mean_loss(model, work.rows["validation"], tokenizer.pad_token_id)
        write_record(record)

    trainer = make_trainer(model, work.rows, tokenizer.pad_token_id, settings, output, reporter)
    trainer.train_from(checkpoint)
    save_whole(trainer, tokenizer, output)
    record["after"] = measure("held-out items after")
    record["seconds"] = time.time() - started
    record |= describe_run(model, trainer, output)
    write_record(record)
    if processes.is_main_process:
        write_card(output)
    processes.wait_for_everyone()
    return record


def check_same_data(record: dict[str, Any], work: Work, output: Path) -> None:
    """Raise ValueError if the run in the folder was started with other data."""
    if record.get("digest", work.found["digest"]) != work.found["digest"]:
        raise ValueError(f"{output} was started with other data than are there now: cannot resume; use --overwrite")


def start(model: Any, rows: Sequence[Row], pad_token_id: int, batch_size: int, reporter: Reporter) -> None:
    batches = [collate(rows[i : i + batch_size], pad_token_id) for i in range(0, len(rows), batch_size)]
    reporter.stage("write text to calibrate on")
    calibrate(model, batches, reporter=reporter)


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
        "best_step": trainer.state.best_global_step,
        "train_loss": [[h["step"], h["loss"]] for h in history if "loss" in h],
        "validation_loss": [[h["step"], h["eval_loss"]] for h in history if "eval_loss" in h],
        "processes": PartialState().num_processes,
        "hardware": hardware(),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)},
    }


def measure_test(
    model: Any, tokenizer: PreTrainedTokenizerBase, work: Work, settings: Settings, reporter: Reporter, stage: str
) -> dict[str, float]:
    """Figures of the held-out items."""
    rows, asked = work.rows["test"], work.asked
    reporter.stage(stage, len(rows) + len(asked))
    metric = metric_of(settings.eval_data or settings.data)
    return figures(model, tokenizer, rows, asked, metric, settings.max_new_tokens, reporter.advance)


def hardware() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


def make_trainer(
    model: Any, rows: dict[str, Any], pad_token_id: int, settings: Settings, output: Path, reporter: Reporter
) -> AdapterTrainer:
    trainer = AdapterTrainer(
        model=model,
        args=training_arguments(settings, len(rows["train"]), output),
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        data_collator=lambda part: collate(part, pad_token_id),
        callbacks=[ReportToUser(reporter)],
        pad_token_id=pad_token_id,
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    if settings.patience is not None:
        trainer.add_callback(EarlyStoppingCallback(settings.patience))
    return trainer


def training_arguments(settings: Settings, num_rows: int, output: Path) -> TrainingArguments:
    steps = math.ceil(num_rows / (settings.batch_size * settings.gradient_accumulation) * settings.epochs)
    # Both fall on a step that is logged, so that a resumed run logs the same figures.
    logged = max(1, steps // 100)
    evaluated, saved = (
        logged * max(1, steps // (parts * logged)) for parts in (EVALUATIONS_OF_A_RUN, CHECKPOINTS_OF_A_RUN)
    )
    report_to = [] if settings.report_to is None else settings.report_to.split(",")
    if "tensorboard" in report_to:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(output / "logs")  # the folder of checkpoints does not stay
    return TrainingArguments(
        output_dir=str(output / CHECKPOINTS),
        run_name=output.name,
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size // PartialState().num_processes,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=SCHEDULERS[settings.scheduler],
        warmup_steps=min(20, max(1, steps // 10)) if settings.warmup is None else settings.warmup,
        logging_steps=logged,
        eval_strategy="steps",
        eval_steps=saved if settings.keeps_best else evaluated,
        save_strategy="steps",
        save_steps=saved,
        metric_for_best_model="eval_loss" if settings.keeps_best else None,
        greater_is_better=False if settings.keeps_best else None,
        seed=settings.seed,
        report_to=report_to,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),
    )
