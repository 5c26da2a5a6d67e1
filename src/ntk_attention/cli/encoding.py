"""Items as rows of tokens, with the labels that the loss counts."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from .chat import chat_tokens
from .data import IGNORED, Item, Row, prompt_tokens, start_of_text


def encode(item: Item, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Row:
    """`tokens_of` an item that the model has positions for.

    Raises:
        ValueError: if there are more than max_length tokens, or none that the loss could count.
    """
    row = tokens_of(item, tokenizer)
    size = len(row["input_ids"])
    if size > max_length:
        text = str(item.prompt or item.completion)
        raise ValueError(f"an item has {size} tokens, the model takes {max_length}: {text[:60]!r}...")
    return row


def tokens_of(item: Item, tokenizer: PreTrainedTokenizerBase) -> Row:
    """Tokens of prompt and completion, closed by the end token; the loss counts the completion.

    Raises:
        ValueError: if there are none that the loss could count.
    """
    if not isinstance(item.prompt, str):
        return chat_tokens(item, tokenizer)
    end = [tokenizer.eos_token_id]
    if item.prompt:
        prompt = prompt_tokens(item.prompt, tokenizer)
        completion = [*tokenizer(item.completion, add_special_tokens=False)["input_ids"], *end]
    else:
        prompt, completion = [], start_of_text(item.completion, tokenizer) + end * item.is_whole
    size = len(prompt) + len(completion)
    if size < 2:
        raise ValueError(f"an item has {size} tokens, two are needed for a loss: {item.completion[:60]!r}")
    return {"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion}


def encode_all(items: Iterable[Item], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
    """`encode` for every item; the error says where it stands, or its place among the others."""
    encoded = []
    for number, item in enumerate(items, start=1):
        try:
            encoded.append(encode(item, tokenizer, max_length))
        except ValueError as error:
            raise ValueError(f"{item.place or f'item {number}'}: {error}") from None
    return encoded
