"""Answers that are shown while they are written: of one prompt, or in a conversation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from ..tuner.distributed import device_of, inputs_on
from ..tuner.observation import evaluating
from .data import Message, prompt_tokens
from .evaluation import stop_tokens

ANSWER = 256  # tokens of an answer, where nothing is said


class Written(TextStreamer):
    """Gives on the text of an answer word by word."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write, self.text = write, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self.write(text)


def room_for(tokens: Sequence[int], max_new_tokens: int | None, limit: int) -> int:
    """How many tokens an answer may have.

    Raises:
        ValueError: if they are more than the model has positions for.
    """
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be positive, got {max_new_tokens}")
    left = limit - len(tokens)
    if left < (max_new_tokens or 1):
        answer = "an answer" if max_new_tokens is None else f"an answer of max_new_tokens = {max_new_tokens}"
        raise ValueError(f"a prompt of {len(tokens)} tokens and {answer} are more than the model takes, {limit}")
    return max_new_tokens or min(ANSWER, left)


def check_sampling(temperature: float, top_p: float) -> None:
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be finite and not negative, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if top_p < 1 and temperature == 0:
        raise ValueError("top_p is for sampling: give a temperature above 0 with it")


@torch.no_grad()
def write_answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Message],
    max_new_tokens: int,
    write: Callable[[str], None],
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> str:
    """Answer a prompt, greedily at temperature 0, and give on every word as soon as it stands."""
    device = device_of(model)
    ids = torch.tensor([prompt_tokens(prompt, tokenizer)], device=device)
    streamer = Written(tokenizer, write)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    with evaluating(model), inputs_on(device, model):
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            eos_token_id=stop_tokens(model, tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            streamer=streamer,
            **({"do_sample": False} | sampling),
        )
    return streamer.text


def converse(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    read: Callable[[], str],
    write: Callable[[str], None],
    limit: int,
    max_new_tokens: int | None = None,
    system: str | None = None,
    **sampling: float,
) -> None:
    """Answer one line after the other, with all that was said before, until `read` raises EOFError."""
    said: list[Message] = [] if system is None else [Message("system", system)]
    while True:
        try:
            line = read().strip()
        except EOFError:
            return
        if not line:
            continue
        turn = [*said, Message("user", line)]
        room = room_for(prompt_tokens(turn, tokenizer), max_new_tokens, limit)
        answer = write_answer(model, tokenizer, turn, room, write, **sampling)
        write("\n")
        said = [*turn, Message("assistant", answer.strip())]
