"""One cell of the comparison, from top to bottom: adapt, train, score, describe."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save
from torch import Tensor, nn

from research.recording import Row

from . import assets, develop, positions
from .method import Context
from .methods import METHODS
from .rows import kept
from .steps import Loss, training_on
from .tasks import Base, Batch, Score, Task

HEAD_RATE = 5e-3  # of a new classifier, whatever the method's rate is; the method "head" tunes it
REMEMBERS = ("final", develop.STAGE)  # where forgetting is measured
TIMED_STEPS = 40
CHECK_EVERY = 50  # steps between looks at whether the loss is finite


@dataclass(frozen=True)
class Cell:
    """What is run once.

    Args:
        stage: of rows.STAGES; "select" scores on validation data only, "final" on test data as well, "time" is a few
            steps, alone. Beside them positions.STAGE and develop.STAGE, whose rows have files of their own.
    """

    task: str
    method: str
    learning_rate: float
    seed: int
    stage: str


def run_cell(cell: Cell, task: Task, base: Base, device: str) -> Row:
    """What a row holds but where it was made. A loss that is not finite becomes the row's error."""
    started = time.perf_counter()
    torch.manual_seed(cell.seed)
    torch.set_float32_matmul_precision("high")
    held_before = clean_memory(device)
    data = TrainingData(task, base, cell.seed)
    first = [data.batch(i) for i in range(min(task.calibration_batches, len(data)))]
    model = task.fresh(base, cell.seed)
    with precision(task, device):
        unrelated_before = unrelated_loss_of_base(task, base) if cell.stage in REMEMBERS else None
    model = METHODS[cell.method].build(model, Context(task, base, first)).to(device)
    row: Row = {**asdict(cell), **sizes(model, task)}
    if cell.stage == "final":
        row["adapter_bytes"] = adapter_bytes(model, base)

    steps = TIMED_STEPS if cell.stage == "time" else task.steps
    losses, times, row["training_seconds"] = [], [], 0.0
    if METHODS[cell.method].rates:
        losses, times, row["training_seconds"] = train(model, data, cell, steps, device)
    if device == "cuda":
        torch.cuda.empty_cache()  # recorded steps hold much memory, which other processes on the GPU can use
    if cell.stage == "time":
        row["step_milliseconds"] = round(1e3 * sorted(times[steps // 4 :])[len(times[steps // 4 :]) // 2], 3)
    row["peak_memory_bytes"] = torch.cuda.max_memory_allocated() - held_before if device == "cuda" else None
    if not all(torch.isfinite(torch.tensor(losses))):
        row["error"] = f"the loss is not finite at step {len(losses)} of {steps}"
    elif cell.stage != "time":
        with precision(task, device):
            row |= scores(cell, task, base, model, unrelated_before)
    row["seconds"] = round(time.perf_counter() - started, 1)
    return kept(row)


def unrelated_loss_of_base(task: Task, base: Base) -> float | None:
    """Computed once per process."""
    if "unrelated loss" not in base.kept:
        base.kept["unrelated loss"] = task.unrelated_loss(base, base.model)
    return base.kept["unrelated loss"]


def clean_memory(device: str) -> int:
    """Bytes that are held on the GPU; what the cell before has left would be counted, and be gone in the peak."""
    if device != "cuda":
        return 0
    torch.cuda.synchronize()
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


class TrainingData:
    """The batches of a cell in order, the same for every method."""

    def __init__(self, task: Task, base: Base, seed: int):
        self.task, self.base = task, base
        self.examples = cached_examples(task, base, "train", seed)
        order = training_order(len(self.examples), task.steps * task.batch_size, seed)
        self.chosen = [order[i : i + task.batch_size] for i in range(0, len(order), task.batch_size)]

    def __len__(self) -> int:
        return len(self.chosen)

    def batch(self, step: int) -> Batch:
        """Of a step; from the front again after the last one."""
        return self.task.batch(self.base, self.examples_of(step % len(self)))

    def examples_of(self, step: int) -> list[Any]:
        return [self.examples[i] for i in self.chosen[step]]

    def loss(self) -> Loss:
        return self.task.loss([self.examples_of(step) for step in range(len(self))])


def sizes(model: nn.Module, task: Task) -> Row:
    """What is trained, and on what."""
    adapter, _ = trainable(model)
    return {
        "steps": task.steps,
        "batch_size": task.batch_size,
        "data_digest": assets.digest(task.data),
        "trainable_parameters": sum(p.numel() for p in adapter),
    }


def train(
    model: nn.Module, data: TrainingData, cell: Cell, steps: int, device: str
) -> tuple[list[float], list[float], float]:
    """The loss and the seconds of every step, and the seconds of all; it ends early if a loss is not finite."""
    adapter, head = trainable(model)
    groups = [{"params": adapter, "lr": cell.learning_rate}, {"params": head, "lr": HEAD_RATE}]
    if not adapter:
        groups[1]["lr"] = cell.learning_rate
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()  # of training alone, without calibration and scoring
    wanted = [group for group in groups if group["params"]]
    training = training_on(device)(model, wanted, steps, lambda: precision(data.task, device), loss=data.loss())
    losses: list[Tensor] = []
    times: list[float] = []
    model.train()
    started = time.perf_counter()
    for step in range(steps):
        batch = data.batch(step)
        begun = clock(device, cell.stage == "time")
        losses.append(training.step(batch))
        times.append(clock(device, cell.stage == "time") - begun)
        if step % CHECK_EVERY == 0 and not torch.isfinite(losses[-1]):
            break
    found = torch.stack(losses).float().tolist()  # waits for the device
    return found, times, round(time.perf_counter() - started, 2)


def scores(cell: Cell, task: Task, base: Base, model: nn.Module, unrelated_before: float | None) -> Row:
    """On validation data; of a final run also on test data; and what was forgotten."""
    held_out = cached_examples(task, base, "validation", cell.seed)
    if cell.stage == positions.STAGE:
        return positions.measured(base.model, model, held_out, base.tokenizer.pad_token_id)
    valid = task.score(base, model, held_out, with_answers=False)
    row: Row = {"validation": figures(valid)}
    if cell.stage == "final":
        test = task.score(base, model, cached_examples(task, base, "test", cell.seed), with_answers=True)
        row |= {"test": figures(test), "test_correct": packed(test.correct)}
        if beside := {**test.parts, **task.scores_beside(base, model)}:
            row["beside"] = beside
    if unrelated_before is not None:
        unrelated_after = task.unrelated_loss(base, model)
        assert unrelated_after is not None
        row |= {"unrelated_loss_before": unrelated_before, "forgetting": unrelated_after - unrelated_before}
    return row


def precision(task: Task, device: str) -> AbstractContextManager[Any]:
    """bfloat16 for language models on a GPU; the small encoders run in float32 (TF32 on a GPU)."""
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda" and not task.has_head)


def clock(device: str, exact: bool) -> float:
    if exact and device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def training_order(size: int, wanted: int, seed: int) -> list[int]:
    """Places of the training examples: every epoch in another order, the same for every method."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < wanted:
        order += torch.randperm(size, generator=generator).tolist()
    return order[:wanted]


_examples: dict[tuple[str, str, int], Sequence[Any]] = {}


def cached_examples(task: Task, base: Base, split: str, seed: int) -> Sequence[Any]:
    """Tokenised once per process."""
    key = task.name, split, seed if split == "train" and getattr(task, "shots", None) else -1
    if key not in _examples:
        _examples[key] = task.examples(base, split, seed)
        if not _examples[key]:
            raise ValueError(f"{task.name} has no {split} examples")
    return _examples[key]


def trainable(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Of the adapter, and of a new classifier."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head = [p for name, p in named if ".head." in f".{name}"]
    return [p for name, p in named if ".head." not in f".{name}"], head


def adapter_bytes(model: nn.Module, base: Base) -> int:
    """Size of the safetensors file that holds what was trained; the whole model in the dtype it came in."""
    if isinstance(model, PeftModel):
        held: dict[str, Tensor] = get_peft_model_state_dict(model)
        tensors = {k: v.detach().cpu().contiguous() for k, v in held.items()}
    else:
        dtypes = {name: p.dtype for name, p in base.model.named_parameters()}
        tensors = {
            name: torch.empty_like(p, dtype=dtypes.get(name, p.dtype), device="cpu")
            for name, p in model.named_parameters()
            if p.requires_grad
        }
    return len(save(tensors))


def figures(score: Score) -> dict[str, float]:
    found = {"loss": score.loss, "share": score.share, "exact": score.exact}
    return {name: value for name, value in found.items() if value is not None}


def packed(correct: Sequence[bool] | None) -> str | None:
    """Which items are right, in hexadecimal, the first item first."""
    if correct is None:
        return None
    bits = "".join("1" if right else "0" for right in correct)
    return f"{len(bits)}:{int(bits, 2):0{-(-len(bits) // 4)}x}"


def unpacked(text: str) -> list[bool]:
    size, digits = text.split(":")
    return [bit == "1" for bit in f"{int(digits, 16):0{int(size)}b}"]
