"""Benchmarks that people know, on real models: what is trained on them, and what is asked beside it.

Multiple choice is scored by the likelihood of the answer's letter, behind a prompt that shows all choices: one forward
pass for a question, where the texts of the choices would take one each, and their lengths would count. GSM8K and MATH
are scored by what is written at temperature 0. The base model itself is the row "zero-shot": how it does without
training, and what MMLU and MATH-500 are before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import nn

from ntk_attention.cli.data import IGNORED, Item, Row, collate
from ntk_attention.tuner.distributed import device_of
from ntk_attention.tuner.observation import evaluating

from .judges import same_mathematics
from .language import LanguageTask, as_item, by_length, encoded, logits_at
from .public_data import LETTERS
from .tasks import Base, Score

GROUP = "public benchmarks"
SMALL, LARGE = "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"
CHOICE_TOKENS = 16384  # of a batch, in which each question has the logits of one token
WRITTEN_AT_ONCE = 700  # answers: two batches of GSM8K's test


@dataclass(frozen=True, kw_only=True)
class Question(Item):
    """Its completion is a letter, the first of which are the choices."""

    choices: int
    part: str


@dataclass(frozen=True)
class ChoiceTask(LanguageTask):
    """Items {prompt, completion, choices, part}: questions that a letter answers, of a data set with parts or of one.

    The loss is that of the right letter. The metric is the mean over the parts, which weigh alike however many
    questions they have.
    """

    max_new_tokens: int | None = 1
    judged: str = "accuracy"
    validation_items: int | None = None
    test_items: int | None = None

    def examples(self, base: Base, split: str, seed: int) -> list[tuple[Row, Item]]:
        questions = []
        for row in self.items(split)[: self.train_items if split == "train" else None]:
            item = as_item(row, base.tokenizer)
            questions.append(Question(item.prompt, item.completion, choices=row["choices"], part=row["part"]))
        return encoded(questions, base.tokenizer, self.max_length if split == "train" else None)

    @torch.no_grad()
    def score(self, base: Base, model: nn.Module, examples: Sequence[tuple[Row, Item]], with_answers: bool) -> Score:
        letters, device = letter_tokens(base.tokenizer).to(device_of(model)), device_of(model)
        rows: list[Row] = [row for row, _ in examples]
        questions: list[Any] = [question for _, question in examples]
        losses, correct = 0.0, [False] * len(rows)
        with evaluating(model):
            for chosen in by_length(rows, CHOICE_TOKENS):
                batch = collate([rows[i] for i in chosen], base.tokenizer.pad_token_id)
                length = batch["input_ids"].shape[1]
                before = (batch.pop("labels") != IGNORED).byte().argmax(dim=1) - 1  # the token that the letter follows
                places = (torch.arange(len(chosen)) * length + before).to(device)
                with logits_at(model, places):
                    logits = model(**{name: x.to(device) for name, x in batch.items()}).logits[0].float()
                right = torch.tensor([LETTERS.index(questions[i].completion) for i in chosen], device=device)
                losses += nn.functional.cross_entropy(logits, letters[right], reduction="sum").item()
                counts = torch.tensor([questions[i].choices for i in chosen], device=device)
                missing = torch.arange(len(LETTERS), device=device) >= counts[:, None]
                found = logits[:, letters].masked_fill(missing, -torch.inf).argmax(dim=1)
                for i, is_right in zip(chosen, (found == right).tolist(), strict=True):
                    correct[i] = is_right
        by_part: dict[str, list[bool]] = {}
        for question, is_right in zip(questions, correct, strict=True):
            by_part.setdefault(question.part, []).append(is_right)
        parts = {part: fmean(own) for part, own in by_part.items()}
        loss, share = losses / len(rows), fmean(parts.values())
        if not with_answers:
            return Score(loss, exact=share)
        return Score(loss, share, parts=parts) if len(parts) > 1 else Score(loss, share, correct)


def letter_tokens(tokenizer: Any) -> torch.Tensor:
    """Raises ValueError unless each letter is one token."""
    tokens = [tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in LETTERS]
    if any(len(own) != 1 for own in tokens):
        raise ValueError(f"the letters {LETTERS} are not one token each: {tokens}")
    return torch.tensor(tokens)[:, 0]


def benchmarks(model: str, suffix: str) -> list[LanguageTask]:
    """Tasks of a model, with the tests of other data that final runs see too: each has a name for every model."""
    mmlu = ChoiceTask(f"mmlu{suffix}", GROUP, model, "mmlu", 0, 0)
    math = LanguageTask(
        f"math-500{suffix}", GROUP, model, "math-500", 0, 0, max_new_tokens=512, judge=same_mathematics,
        judged="final answer", test_items=None, generation_batch=WRITTEN_AT_ONCE,
    )  # fmt: skip
    return [
        ChoiceTask(
            f"boolq{suffix}", GROUP, model, "boolq", 300, 16, max_length=320, pad_to=64, train_items=4800,
            beside=(mmlu,),
        ),
        ChoiceTask(f"commonsense{suffix}", GROUP, model, "commonsense", 400, 16, max_length=320, pad_to=64,
                   beside=(mmlu,)),
        LanguageTask(
            f"gsm8k{suffix or '-0.5b'}", GROUP, model, "gsm8k", 450, 16, max_new_tokens=400, max_length=384, pad_to=64,
            test_items=None, generation_batch=WRITTEN_AT_ONCE, beside=(math, mmlu),
        ),
    ]  # fmt: skip


BENCHMARKS = (*benchmarks(SMALL, ""), *benchmarks(LARGE, "-1.5b"))
