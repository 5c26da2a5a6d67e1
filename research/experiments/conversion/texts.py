"""Texts that every machine has: they come with Python or with a package we need. Their digest is in each row."""

from __future__ import annotations

import email
import importlib.metadata
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

TEXTS: dict[str, Callable[[], str]] = {
    "email": lambda: (Path(email.__file__).parent / "architecture.rst").read_text(encoding="utf-8"),
    "pdb": lambda: topics["debugger"],
    "transformers": lambda: str(importlib.metadata.metadata("transformers").get_payload()),
    "formatstrings": lambda: topics["formatstrings"],
    "specialnames": lambda: topics["specialnames"],  # longer than the context of SmolLM2
}
PLACES = ("red harbour", "old mill", "north tower", "glass bridge", "stone garden", "blue lantern", "quiet library",
          "iron gate")  # fmt: skip


def text_of(name: str) -> str:
    """One of TEXTS, or a file."""
    return TEXTS[name]() if name in TEXTS else Path(name).read_text(encoding="utf-8")


@dataclass(frozen=True)
class Document:
    tokens: Tensor  # [m]
    continuation: Tensor  # [held_out], what follows
    codes: dict[str, str]  # the needles, by place


def load_document(name: str, tokenizer: Any, held_out: int, limit: int, seed: int) -> Document:
    """A text with one fact per place put between its paragraphs; its last tokens are held out.

    Args:
        name: in TEXTS, or a file.
        tokenizer: of the model.
        held_out: tokens of the continuation.
        limit: of the tokens before it.
        seed: of the codes.
    """
    generator = random.Random(seed)
    codes = {place: str(generator.randint(1000, 9999)) for place in PLACES}
    ids = tokenizer(text_of(name), add_special_tokens=False)["input_ids"][: limit + held_out]
    text = tokenizer.decode(ids[:-held_out])
    paragraphs = text.split("\n\n")
    for i, (place, code) in enumerate(codes.items()):
        at = round((i + 0.5) / len(codes) * len(paragraphs)) + i
        paragraphs.insert(at, f"The code of the {place} is {code}.")
    tokens = tokenizer("\n\n".join(paragraphs), add_special_tokens=False)["input_ids"]
    return Document(torch.tensor(tokens), torch.tensor(ids[-held_out:]), codes)


@dataclass(frozen=True)
class Question:
    prompt: str
    answers: tuple[str, ...]  # the first is right


def questions(document: Document) -> dict[str, list[Question]]:
    """Facts of the document, asked one by one ("needle") and two at a time ("compare")."""
    codes, places = document.codes, list(document.codes)
    needle = [
        Question(
            f"\n\nQuestion: What is the code of the {place}?\nAnswer: The code of the {place} is",
            (f" {code}", *(f" {other}" for other in codes.values() if other != code)),
        )
        for place, code in codes.items()
    ]
    compare = []
    for first, second in zip(places, places[1:] + places[:1], strict=True):
        larger, smaller = sorted((first, second), key=lambda place: int(codes[place]), reverse=True)
        prompt = (
            f"\n\nQuestion: Which code is larger, that of the {first} or that of the {second}?\nAnswer: That of the"
        )
        compare.append(Question(prompt, (f" {larger}", f" {smaller}")))
    return {"needle": needle, "compare": compare}


@torch.no_grad()
def score(model: Any, tokenizer: Any, asked: list[Question]) -> dict[str, float]:
    """Share of the questions whose right answer is written greedily, and whose right answer is the likeliest of all.

    Likelihoods are per token, so that long answers are not at a disadvantage.
    """
    device = next(model.parameters()).device
    rows = [(q, a) for q in range(len(asked)) for a in range(len(asked[q].answers))]
    prompts, answers = [], []
    for q, a in rows:
        prompts.append(tokenizer(asked[q].prompt, add_special_tokens=False)["input_ids"])
        answers.append(tokenizer(asked[q].answers[a], add_special_tokens=False)["input_ids"])
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    counts = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (p, a) in enumerate(zip(prompts, answers, strict=True)):
        ids[i, : len(p) + len(a)] = torch.tensor(p + a)
        counts[i, len(p) : len(p) + len(a)] = True
    logs = torch.cat([torch.log_softmax(model(input_ids=part).logits[:, :-1].float(), dim=-1).cpu()
                      for part in ids.to(device).split(16)])  # fmt: skip
    ids, counts = ids[:, 1:], counts[:, 1:]
    likelihood = (logs.gather(2, ids[..., None])[..., 0] * counts).sum(1) / counts.sum(1)
    greedy = ((logs.argmax(-1) == ids) | ~counts).all(1)
    best, exact = 0, 0
    for q in range(len(asked)):
        own = [i for i, (asked_by, _) in enumerate(rows) if asked_by == q]
        best += int(likelihood[own].argmax() == 0)
        exact += int(greedy[own[0]])
    return {"exact": exact / len(asked), "choice": best / len(asked)}
