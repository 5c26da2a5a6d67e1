"""Tasks of causal language models: write the completion of a prompt, or model a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ntk_attention.cli.data import IGNORED, Item, Row, collate, same_final_number
from ntk_attention.cli.encoding import encode
from ntk_attention.cli.evaluation import answers
from ntk_attention.cli.models import convert_gguf, load_model
from ntk_attention.tuner.distributed import device_of
from ntk_attention.tuner.observation import base_model_of, evaluating

from . import assets
from .steps import Loss
from .tasks import Base, Batch, Score, Task

TEXT_LENGTH = 256  # tokens; longer texts are cut
PAD_TO = 32  # few different shapes: kernels are tuned and planned for each
UNRELATED_PASSAGES = 64
MULTIPLE = 16  # of tokens that have logits: one shape, which other tokens fill up
FUSED_NORMS = ("LlamaRMSNorm", "Qwen2RMSNorm")
EVALUATION_TOKENS = 4096  # of a batch: as many as a training step has


@dataclass(frozen=True)
class LanguageTask(Task):
    """Items {prompt, completion}, scored by what is generated; or {text}, scored by the loss."""

    max_new_tokens: int | None = None  # None: the items are texts
    max_length: int = 384  # tokens of a training item; longer ones are left out
    judge: Callable[[str, str], bool] = same_final_number  # of a generated and an expected answer
    judged: str = "final number"  # name of what the judge looks at
    pad_to: int = PAD_TO  # tokens; with max_length here all training batches have one shape
    train_items: int | None = None  # of the training data, the first ones; None: all
    validation_items: int | None = 300
    test_items: int | None = 1000
    generation_batch: int = 256  # items that are answered at once
    beside: tuple[LanguageTask, ...] = ()  # what final runs also see the test of

    @property
    def metric(self) -> str:  # type: ignore[override]
        return "loss" if self.max_new_tokens is None else self.judged

    @property
    def higher_is_better(self) -> bool:  # type: ignore[override]
        return self.max_new_tokens is not None

    def check(self) -> None:
        self.check_training()
        assets.split_file("python-docs", "validation")

    def check_training(self) -> None:
        """Without what forgetting is measured on."""
        if "/" not in self.model:
            assets.model_folder(self.model)
        assets.split_file(self.data, "train")
        for task in self.beside:
            assets.split_file(task.data, "test")

    def source(self) -> str:
        """What `load_model` takes; a GGUF file becomes a folder first."""
        if "/" in self.model:
            return self.model
        folder = assets.model_folder(self.model)
        quantised = next(folder.glob("*.gguf"), None)
        return str(folder if quantised is None else convert_gguf(quantised, folder / "dequantised"))

    def warm_up(self) -> None:
        self.source()

    def load(self, device: str) -> Base:
        model, tokenizer = load_model(self.source(), torch.bfloat16 if device == "cuda" else torch.float32)
        if device == "cuda":
            fuse_norms(model)
        return Base(model.to(device).requires_grad_(False), tokenizer)

    def items(self, split: str) -> list[dict[str, Any]]:
        return assets.read_rows(self.data, split)

    def examples(self, base: Base, split: str, seed: int) -> list[tuple[Row, Item]]:
        most = {"train": self.train_items, "validation": self.validation_items, "test": self.test_items}[split]
        items = [as_item(row, base.tokenizer) for row in self.items(split)[:most]]
        return encoded(items, base.tokenizer, self.max_length if split != "test" else None)

    def batch(self, base: Base, examples: Sequence[tuple[Row, Item]]) -> Batch:
        return collate([row for row, _ in examples], base.tokenizer.pad_token_id, self.pad_to)

    def loss(self, batches: Sequence[Sequence[tuple[Row, Item]]]) -> Loss:
        """Of completions with logits of their tokens alone, which are few, in one shape for all batches."""
        if self.max_new_tokens is None:
            return super().loss(batches)
        most = max(sum(label != IGNORED for row, _ in batch for label in row["labels"]) for batch in batches)
        return partial(completion_loss, most=-(-most // MULTIPLE) * MULTIPLE)

    def score(self, base: Base, model: nn.Module, examples: Sequence[tuple[Row, Item]], with_answers: bool) -> Score:
        model_: Any = model
        loss, exact = loss_and_exact(model, [row for row, _ in examples], base.tokenizer.pad_token_id)
        if self.max_new_tokens is None:
            return Score(loss)
        if not with_answers:
            return Score(loss, exact=exact)
        # by length, which wastes little on padding; the order is the same for every method
        items = sorted((item for _, item in examples), key=lambda item: len(item.prompt))
        prompts = [item.prompt for item in items]
        texts = answers(model_, base.tokenizer, prompts, self.max_new_tokens, batch_size=self.generation_batch)
        correct = [self.judge(text, item.completion) for text, item in zip(texts, items, strict=True)]
        return Score(loss, sum(correct) / len(correct), correct, exact)

    def scores_beside(self, base: Base, model: nn.Module) -> dict[str, float]:
        found = {}
        for task in self.beside:
            key = f"test of {task.name}"
            if key not in base.kept:
                base.kept[key] = task.examples(base, "test", 0)
            score = task.score(base, model, base.kept[key], with_answers=True)
            found[task.name] = score.loss if score.share is None else score.share
        return found

    def unrelated(self, base: Base) -> list[Row]:
        if "passages" not in base.kept:
            rows = assets.read_rows("python-docs", "validation")[:UNRELATED_PASSAGES]
            found = encoded([as_item(row, base.tokenizer) for row in rows], base.tokenizer)
            base.kept["passages"] = [row for row, _ in found]
        return base.kept["passages"]

    def unrelated_loss(self, base: Base, model: nn.Module) -> float:
        return loss_and_exact(model, self.unrelated(base), base.tokenizer.pad_token_id)[0]

    def unrelated_batches(self, base: Base) -> list[Batch]:
        rows = self.unrelated(base)
        starts = range(0, min(len(rows), self.calibration_batches * self.batch_size), self.batch_size)
        return [collate(rows[i : i + self.batch_size], base.tokenizer.pad_token_id, PAD_TO) for i in starts]


def fuse_norms(model: nn.Module) -> None:
    """Compute the norms of Llama and its like by torch's own kernel, not six launches."""

    def normalised(norm: Any, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.rms_norm(x, norm.weight.shape, norm.weight.to(x.dtype), norm.variance_epsilon)

    for module in model.modules():
        if type(module).__name__ in FUSED_NORMS:
            module.forward = MethodType(normalised, module)


def completion_loss(model: nn.Module, batch: Mapping[str, Tensor], most: int) -> Tensor:
    """The loss that the model itself computes, with logits of `most` tokens: all that count, and some that do not.

    The vocabulary makes logits of all tokens the largest tensors of a step by far.
    """
    labels = next_tokens(batch["labels"])
    places = (labels != IGNORED).byte().argsort(descending=True, stable=True)[:most]
    with logits_at(model, places):
        logits = model(**{name: x for name, x in batch.items() if name != "labels"}).logits[0]
    return nn.functional.cross_entropy(logits.float(), labels[places], ignore_index=IGNORED)


def next_tokens(labels: Tensor) -> Tensor:
    """What the model should write after each token of a batch, as one row of B L labels."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()


@contextmanager
def logits_at(model: nn.Module, places: Tensor) -> Iterator[None]:
    """The model's logits are [1, N, vocabulary], of N places in the row of all B L tokens."""
    head = base_model_of(model).get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, 1).index_select(0, places)[None],))
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def loss_and_exact(model: Any, rows: Sequence[Row], pad_token_id: int) -> tuple[float, float]:
    """Cross-entropy in nats over all tokens that count, and the share of the rows whose completion is written greedily.

    A model writes a completion, and its end, by greedy decoding if and only if each of its tokens is the likeliest one
    after those before it: one forward pass says so.
    """
    total, count, wrong, device = 0.0, 0, 0, device_of(model)
    with evaluating(model):
        for chosen in by_length(rows, EVALUATION_TOKENS):
            batch = collate([rows[i] for i in chosen], pad_token_id)
            labels = next_tokens(batch.pop("labels"))
            places = (labels != IGNORED).nonzero().flatten()
            expected, places = labels[places].to(device), places.to(device)
            with logits_at(model, places):
                logits = model(**{name: x.to(device) for name, x in batch.items()}).logits[0]
            total += nn.functional.cross_entropy(logits.float(), expected, reduction="sum").item()
            row_of = places // batch["input_ids"].shape[1]
            wrong += len(row_of[logits.argmax(dim=-1) != expected].unique())
            count += len(expected)
    return total / count, (len(rows) - wrong) / len(rows)


def by_length(rows: Sequence[Row], tokens: int) -> Iterator[list[int]]:
    """Places of the rows of each batch, the shortest first: at most so many tokens, padding included, or one row."""
    chosen: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"])):
        if chosen and (len(chosen) + 1) * len(rows[i]["input_ids"]) > tokens:
            yield chosen
            chosen = []
        chosen.append(i)
    if chosen:
        yield chosen


def as_item(row: dict[str, Any], tokenizer: Any) -> Item:
    """A model without a chat template gets its start token and a line end after the prompt."""
    start = tokenizer.bos_token or "" if tokenizer.chat_template is None else ""
    if "text" in row:
        return Item("", start + row["text"])
    return Item(row["prompt"] if tokenizer.chat_template else f"{start}{row['prompt']}\n", row["completion"])


def encoded(items: Sequence[Item], tokenizer: Any, max_length: int | None = None) -> list[tuple[Row, Item]]:
    found = []
    for item in items:
        row = encode(item, tokenizer, 10**6)
        if not item.prompt:
            row = {name: values[:TEXT_LENGTH] for name, values in row.items()}
        if max_length is None or len(row["input_ids"]) <= max_length:
            found.append((row, item))
    return found
