"""Conversations as tokens: which of them are the assistant's, which are what the loss counts.

Where the chat template marks them with `{% generation %}`, it says so itself. Elsewhere an answer is what its turn adds
to the rendered conversation after the prompt for it, as long as the template writes earlier turns as it wrote them
before. One that does not, since it leaves thoughts out later, is replaced by the form that TRL keeps for training.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from .data import IGNORED, Item, Message, Row, render

MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


def chat_tokens(item: Item, tokenizer: PreTrainedTokenizerBase) -> Row:
    """Tokens of a whole conversation up to the end of its last answer; the loss counts the answers.

    Raises:
        ValueError: if the template cannot say which tokens are the assistant's.
    """
    assert not isinstance(item.prompt, str)
    messages = (*item.prompt, Message("assistant", item.completion))
    template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    if MARKED.search(template):
        ids, runs = by_marks(messages, tokenizer, template)
    elif (spans := answer_spans(messages, tokenizer)) is not None:
        ids, runs = by_spans(messages, tokenizer, spans)
    else:
        ids, runs = by_marks(messages, tokenizer, training_template(tokenizer))
    answers = sum(message.role == "assistant" for message in messages)
    if len(runs) != answers:
        raise ValueError(f"the chat template makes {len(runs)} answers of {answers} turns of the assistant")
    ends = {tokenizer.eos_token_id, *tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    runs = [ended(ids, run, ends, tokenizer) for run in runs]
    ids = ids[: runs[-1][1]]
    if ids[-1] not in ends:
        ids = [*ids, tokenizer.eos_token_id]
        runs[-1] = (runs[-1][0], len(ids))
    labels = [IGNORED] * len(ids)
    for start, end in runs if item.all_answers else runs[-1:]:
        labels[start:end] = ids[start:end]
    return {"input_ids": ids, "labels": labels}


def ended(ids: list[int], run: tuple[int, int], ends: set[int], tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """From where to where an answer goes, up to the token that ends its turn: marks may leave it out, or go beyond."""
    start, end = run
    last = next((i for i in reversed(range(start, end)) if ids[i] in ends), None)
    if last is not None and not tokenizer.decode(ids[last + 1 : end]).strip():
        return start, last + 1
    return start, end + (end < len(ids) and ids[end] in ends)


def training_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """TRL's form of the model's template, which marks answers and leaves earlier turns as they were.

    Raises:
        ValueError: if TRL has none.
    """
    from trl.chat_template_utils import get_training_chat_template

    try:
        return get_training_chat_template(tokenizer) or tokenizer.get_chat_template()
    except ValueError:
        raise ValueError(
            "the chat template writes earlier turns of a conversation otherwise than it wrote them at first, so it "
            "does not say which tokens are the assistant's: expected one with {% generation %}, one that TRL knows, or "
            "conversations of one answer"
        ) from None


def by_marks(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, template: str
) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of the conversation, and from where to where the template marks them."""
    found = render(
        messages,
        tokenizer,
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    mask = [0, *found["assistant_masks"], 0]
    starts = [i for i in range(len(mask) - 1) if mask[i] < mask[i + 1]]
    ends = [i for i in range(len(mask) - 1) if mask[i] > mask[i + 1]]
    return list(found["input_ids"]), list(zip(starts, ends, strict=True))


def by_spans(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, spans: Sequence[tuple[int, int]]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of the conversation, and from where to where they lie in these characters of it."""
    if not tokenizer.is_fast:
        raise ValueError("the tokenizer does not say where its tokens stand: expected a fast one for conversations")
    text = render(messages, tokenizer, tokenize=False)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    runs = []
    for start, end in spans:
        inside = [
            i for i, (first, last) in enumerate(found["offset_mapping"]) if first >= start and first < last <= end
        ]
        if inside:
            runs.append((inside[0], inside[-1] + 1))
    return found["input_ids"], runs


def answer_spans(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]] | None:
    """From which to which character of the rendered conversation each answer goes, without the space after it.

    None if a turn is not written as it was before others followed.
    """
    text = render(messages, tokenizer, tokenize=False)
    spans = []
    for i, message in enumerate(messages):
        if message.role == "assistant":
            before = render(messages[:i], tokenizer, tokenize=False, add_generation_prompt=True)
            after = render(messages[: i + 1], tokenizer, tokenize=False)
            if not after.startswith(before) or not text.startswith(after):
                return None
            spans.append((len(before), len(before) + len(after[len(before) :].rstrip())))
    return spans
