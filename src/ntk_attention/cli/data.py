"""Training items: embedded word problems, jsonl files and plain text; how they become token batches and scores."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of tokens that the loss does not count
TEXT_CHUNK = 256  # tokens of one item of a plain text
MOST_BYTES = 4  # of a character, each of which may be a token

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
    if size < 1:
        raise ValueError(f"expected a positive number of items, got {size}")
    if source in EMBEDDED_TASKS:
        return EMBEDDED_TASKS[source](size, seed)
    text = read_source(source)
    return read_lines(text, source, size) if source.endswith(".jsonl") else cut(text, tokenizer, size)


def check_source(source: str, size: int) -> None:
    """Raise what `load_items` raises of a file, without a tokenizer."""
    if source not in EMBEDDED_TASKS:
        text = read_source(source)
        if source.endswith(".jsonl"):
            read_lines(text, source, size)


def read_source(source: str) -> str:
    path = Path(source)
    if not path.is_file():
        what = f"{source} is a folder" if path.is_dir() else f"no data at {source!r}"
        raise ValueError(f"{what}: expected one of {sorted(EMBEDDED_TASKS)}, a .jsonl or a .txt file")
    if path.suffix not in (".jsonl", ".txt"):
        raise ValueError(f"{source}: expected a file that ends in .jsonl or .txt")
    return read_text(path)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, which is not empty, without the mark of byte order that some editors begin with."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not text.strip():
        raise ValueError(f"{path} is empty: expected a text")
    return text


def read_lines(text: str, source: str, size: int) -> list[Item]:
    lines = [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
    return [read_line(line, f"{source}, line {i}") for i, line in lines[:size]]


def read_line(line: str, place: str) -> Item:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets in brackets
        raise ValueError(f"{place}: JSON that cannot be read ({error})") from None
    if not isinstance(entry, dict):
        raise ValueError(f"{place}: expected an object, got {type(entry).__name__}")
    for field in ("prompt", "completion"):
        value = entry.get(field)
        if not isinstance(value, str):
            raise ValueError(f"{place}: the field {field!r} must be a string, got {str(value)[:60]}")
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise ValueError(f"{place}: the field {field!r} holds half of a surrogate pair, which is no character")
    if not entry["prompt"] and not entry["completion"]:
        raise ValueError(f"{place}: prompt and completion are both empty")
    return Item(entry["prompt"], entry["completion"])


def cut(text: str, tokenizer: PreTrainedTokenizerBase, size: int) -> list[Item]:
    """At most `size` pieces of a text, of TEXT_CHUNK tokens with those that the tokenizer puts before it."""
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    length = TEXT_CHUNK - len(special_tokens(tokenizer)[0])
    items: list[Item] = []
    start = 0
    while start < len(tokens) and len(items) < size:
        ends = [start + length - i for i in range(MOST_BYTES)] if start + length < len(tokens) else [len(tokens)]
        pieces = [tokenizer.decode(tokens[start:end], clean_up_tokenization_spaces=False) for end in ends]
        # a character of several tokens, cut in two, would be lost in both pieces
        i = next((i for i, piece in enumerate(pieces) if not piece.endswith("\ufffd")), 0)
        items.append(Item("", pieces[i]))
        start = ends[i]
    return items


# --- how they become tokens ---


def render_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt as the model expects it: through its chat template, if it has one."""
    if not prompt or tokenizer.chat_template is None:
        return prompt
    message = [{"role": "user", "content": prompt}]
    try:
        return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(f"the chat template of the model refuses the prompt {prompt[:60]!r}: {error}") from None


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer itself puts before a text and behind it."""
    text = "a"
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer(text)["input_ids"]
    for i in range(len(whole) - len(plain) + 1):
        if plain and whole[i : i + len(plain)] == plain:
            return whole[:i], whole[i + len(plain) :]
    raise ValueError(f"the tokenizer makes {whole} of {text!r} and {plain} without special tokens: expected it inside")


def start_of_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a text that something follows: the tokenizer's special tokens before it, once, and none behind it."""
    before, _ = special_tokens(tokenizer)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens if tokens[: len(before)] == before else before + tokens


def prompt_tokens(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the model reads before it answers, in training as in use.

    A chat template writes its special tokens itself; without one they are those that the tokenizer begins a text with.

    Raises:
        ValueError: if there are none.
    """
    if tokenizer.chat_template is None:
        tokens = start_of_text(prompt, tokenizer)
    else:
        tokens = tokenizer(render_prompt(prompt, tokenizer), add_special_tokens=False)["input_ids"]
    if not tokens:
        raise ValueError(f"the prompt {prompt[:60]!r} has no tokens")
    return tokens


def encode(item: Item, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Row:
    """Tokens of prompt and completion, closed by the end token; the loss counts the completion.

    A plain text has no end token, since it may go on.

    Raises:
        ValueError: if there are more than max_length tokens, or none that the loss could count.
    """
    if item.prompt:
        prompt = prompt_tokens(item.prompt, tokenizer)
        completion = [*tokenizer(item.completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    else:
        prompt, completion = [], start_of_text(item.completion, tokenizer)
    size = len(prompt) + len(completion)
    if size > max_length:
        text = item.prompt or item.completion
        raise ValueError(f"an item has {size} tokens, the model takes {max_length}: {text[:60]!r}...")
    if size < 2:
        raise ValueError(f"an item has {size} tokens, two are needed for a loss: {item.completion[:60]!r}")
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


def is_exact_match(generated: str, expected: str) -> bool:
    """Whether both are the same text, up to spaces and line ends around it."""
    return generated.strip() == expected.strip()


def final_number(text: str) -> Decimal | None:
    """The last number after '####', or of the whole text where there is no such mark; None without a number."""
    numbers = NUMBER.findall(text.rsplit("####", 1)[-1])
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def same_final_number(generated: str, expected: str) -> bool:
    """Whether both end in the same number, whatever else they say."""
    number = final_number(generated)
    return number is not None and number == final_number(expected)


METRICS: dict[str, Callable[[str, str], bool]] = {"exact_match": is_exact_match, "final_number": same_final_number}


def metric_of(source: str) -> str:
    """What counts for a source, by its name in METRICS: the embedded tasks ask for a number, a file for its text."""
    return "final_number" if source in EMBEDDED_TASKS else "exact_match"
