"""Training items: embedded word problems, jsonl files and plain text; how they become token batches and scores."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of tokens that the loss does not count
TEXT_CHUNK = 256  # tokens of one item of a plain text


Row = dict[str, list[int]]  # input_ids and labels of one item


@dataclass(frozen=True)
class Item:
    """One example: the model reads `prompt` and is trained to write `completion`. Plain text has no prompt."""

    prompt: str
    completion: str


# --- where items come from ---


def chain_sum(size: int, seed: int) -> list[Item]:
    """Short sums and differences, such as 12 + 7 - 5."""
    return [
        Item(entry["question"], entry["answer"])
        for entry in reasoning_gym("chain_sum", size, seed, max_terms=3, max_digits=2)
    ]


def gsm_symbolic(size: int, seed: int) -> list[Item]:
    """Word problems in the style of GSM8K, answered with the number alone."""
    return [Item(entry["question"], entry["answer"]) for entry in reasoning_gym("gsm_symbolic", size, seed)]


def gsm_symbolic_worked(size: int, seed: int) -> list[Item]:
    """The same problems, answered with a worked solution that ends in '#### number'."""
    return [
        Item(
            entry["question"],
            f"{entry['metadata']['answer_cot'].split('####')[0].strip()}\n#### {entry['answer']}",
        )
        for entry in reasoning_gym("gsm_symbolic", size, seed)
    ]


def reasoning_gym(name: str, size: int, seed: int, **options: Any) -> Iterator[dict[str, Any]]:
    try:
        from reasoning_gym import create_dataset
    except ImportError as error:
        raise ValueError("the embedded problems are not installed: pip install reasoning-gym==0.1.25") from error
    yield from create_dataset(name, size=size, seed=seed, **options)


EMBEDDED_TASKS: dict[str, Callable[[int, int], list[Item]]] = {
    "gsm-symbolic": gsm_symbolic,
    "gsm-symbolic-worked": gsm_symbolic_worked,
    "chain-sum": chain_sum,
}


def load_items(source: str, size: int, seed: int, tokenizer: PreTrainedTokenizerBase) -> list[Item]:
    """Items of an embedded task, of a .jsonl file with the fields prompt and completion, or of a .txt file.

    Args:
        source: a name in EMBEDDED_TASKS or a path.
        size: how many; a file gives at most that many.
        seed: of an embedded task.
        tokenizer: cuts plain text into chunks.

    Raises:
        ValueError: if the source is unknown, empty, not in the format of its name, or lacks a field; the message names
            the line.
    """
    if source in EMBEDDED_TASKS:
        return EMBEDDED_TASKS[source](size, seed)
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"no data at {source!r}: expected one of {sorted(EMBEDDED_TASKS)}, a .jsonl or a .txt file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not text.strip():
        raise ValueError(f"{source} is empty")
    if path.suffix == ".txt":
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        chunks = [tokens[i : i + TEXT_CHUNK] for i in range(0, len(tokens), TEXT_CHUNK)]
        return [Item("", tokenizer.decode(chunk)) for chunk in chunks[:size]]
    if path.suffix != ".jsonl":
        raise ValueError(f"{source}: expected a file that ends in .jsonl or .txt")
    lines = [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
    return [read_line(line, source, i) for i, line in lines[:size]]


def read_line(line: str, source: str, number: int) -> Item:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}, line {number}: not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(entry, dict):
        raise ValueError(f"{source}, line {number}: expected an object, got {type(entry).__name__}")
    for field in ("prompt", "completion"):
        if not isinstance(entry.get(field), str):
            raise ValueError(f"{source}, line {number}: the field {field!r} must be a string, got {entry.get(field)!r}")
    return Item(entry["prompt"], entry["completion"])


# --- how they become tokens ---


def render_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt as the model expects it: through its chat template, if it has one."""
    if not prompt or tokenizer.chat_template is None:
        return prompt
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)


def encode(item: Item, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Row:
    """Tokens of prompt and completion, closed by the end token; the loss counts the completion.

    Raises:
        ValueError: if there are more than max_length tokens.
    """
    prompt = tokenizer(render_prompt(item.prompt, tokenizer), add_special_tokens=False)["input_ids"]
    completion = tokenizer(item.completion, add_special_tokens=False)["input_ids"]
    if item.prompt:
        completion = [*completion, tokenizer.eos_token_id]
    if len(prompt) + len(completion) > max_length:
        raise ValueError(
            f"an item has {len(prompt) + len(completion)} tokens, the model takes {max_length}: {item.prompt[:60]!r}..."
        )
    return {"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion}


def encode_all(items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
    """`encode` for every item; the error names the item by its place."""
    encoded = []
    for number, item in enumerate(items, start=1):
        try:
            encoded.append(encode(item, tokenizer, max_length))
        except ValueError as error:
            raise ValueError(f"item {number}: {error}") from None
    return encoded


def collate(rows: Sequence[Row], pad_token_id: int, multiple: int = 1) -> dict[str, Tensor]:
    """Rows as one batch, padded on the right to a multiple of that many tokens."""
    length = -(-max(len(row["input_ids"]) for row in rows) // multiple) * multiple

    def pad(name: str, value: int) -> Tensor:
        return torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows])
    return {"input_ids": pad("input_ids", pad_token_id), "labels": pad("labels", IGNORED), "attention_mask": mask}


# --- how answers are scored ---

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def final_answer(text: str) -> str:
    """What counts of an answer: the number after '####', else the last number, else the whole text."""
    text = text.strip()
    numbers = NUMBER.findall(text.rsplit("####", 1)[-1])
    if not numbers:
        return text
    number = float(numbers[-1].replace(",", ""))
    return str(int(number)) if number.is_integer() else str(number)


def is_correct(generated: str, expected: str) -> bool:
    return final_answer(generated) == final_answer(expected)
