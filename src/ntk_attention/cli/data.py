"""Training items: what one is, how it becomes tokens and batches, and how an answer is scored."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of tokens that the loss does not count
TEXT_CHUNK = 256  # tokens of one item of a plain text
MOST_BYTES = 4  # of a character, each of which may be a token

Row = dict[str, list[int]]  # input_ids and labels of one item


class Message(NamedTuple):
    """What one side of a conversation says."""

    role: str
    content: str


@dataclass(frozen=True)
class Item:
    """One example: the model reads `prompt` and is trained to write `completion`.

    Args:
        prompt: a text, or the conversation before the completion. A plain text has none.
        completion: what the loss counts, and of a conversation its last answer.
        all_answers: of a conversation, whether the loss counts the answers in the prompt as well.
        is_whole: of a plain text, whether an end token closes it; without, it may go on.
        place: where it stands, for errors.
    """

    prompt: str | tuple[Message, ...]
    completion: str
    all_answers: bool = True
    is_whole: bool = False
    place: str = field(default="", compare=False)


def cut(item: Item, tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[Item]:
    """A plain text in pieces of `length` tokens, with those that the tokenizer puts before a text."""
    tokens = tokenizer(item.completion, add_special_tokens=False)["input_ids"]
    room = length - len(special_tokens(tokenizer)[0]) - item.is_whole
    if room < MOST_BYTES:
        raise ValueError(f"pieces of {length} tokens are too short for a text: expected {length + MOST_BYTES} at least")
    start = 0
    while start < len(tokens):
        ends = [start + room - i for i in range(MOST_BYTES)] if start + room < len(tokens) else [len(tokens)]
        pieces = [tokenizer.decode(tokens[start:end], clean_up_tokenization_spaces=False) for end in ends]
        # a character of several tokens, cut in two, would be lost in both pieces
        i = next((i for i, piece in enumerate(pieces) if not piece.endswith("\ufffd")), 0)
        start = ends[i]
        yield Item("", pieces[i], is_whole=item.is_whole and start == len(tokens), place=item.place)


def with_system(system: str | None, prompt: str) -> str | tuple[Message, ...]:
    """A prompt with a system prompt before it, if there is one."""
    return prompt if not system else (Message("system", system), Message("user", prompt))


# --- how they become tokens ---


def render(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
    """A conversation through the chat template of the model; options as of `apply_chat_template`.

    Raises:
        ValueError: if there is no template, or if it refuses the conversation.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "the model has no chat template, which conversations and system prompts need: expected a model with one, "
            "or data with prompt and completion"
        )
    try:
        return tokenizer.apply_chat_template([message._asdict() for message in messages], **options)
    except TemplateError as error:
        said = messages[-1].content if messages else ""
        raise ValueError(f"the chat template of the model refuses the prompt {said[:60]!r}: {error}") from None


def render_prompt(prompt: str | Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt as the model expects it: through its chat template, if it has one."""
    if isinstance(prompt, str):
        if not prompt or tokenizer.chat_template is None:
            return prompt
        prompt = (Message("user", prompt),)
    return render(prompt, tokenizer, tokenize=False, add_generation_prompt=True)


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


def prompt_tokens(prompt: str | Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the model reads before it answers, in training as in use.

    A chat template writes its special tokens itself; without one they are those that the tokenizer begins a text with.

    Raises:
        ValueError: if there are none.
    """
    if isinstance(prompt, str) and tokenizer.chat_template is None:
        tokens = start_of_text(prompt, tokenizer)
    else:
        tokens = tokenizer(render_prompt(prompt, tokenizer), add_special_tokens=False)["input_ids"]
    if not tokens:
        raise ValueError(f"the prompt {str(prompt)[:60]!r} has no tokens")
    return tokens


def collate(rows: Sequence[Row], pad_token_id: int, multiple: int = 1) -> dict[str, Any]:
    """Rows as one batch, padded on the right to a multiple of that many tokens.

    Packed rows come with positions, and without a mask and a cache: transformers then keeps their items apart, and
    padding, whose position is 0, from all of them.
    """
    length = -(-max(len(row["input_ids"]) for row in rows) // multiple) * multiple

    def pad(name: str, value: int) -> Tensor:
        return torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])

    batch = {"input_ids": pad("input_ids", pad_token_id), "labels": pad("labels", IGNORED)}
    if "position_ids" in rows[0]:
        return {**batch, "position_ids": pad("position_ids", 0), "use_cache": False}
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows])
    return {**batch, "attention_mask": mask}


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
