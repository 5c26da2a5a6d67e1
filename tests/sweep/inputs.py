"""Inputs for a model that is known only by its forward signature and config: text, and a signal for every tower.

Shapes differ among model types, so that several are offered for each signal and the first that the model accepts is
taken. Where it says how many places in the text its signal fills, the text gets as many.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .build import summary
from .outputs import run
from .settings import Settings
from .shrink import FIRST_SPECIAL
from .signals import SIGNALS, Signal, offers, with_width

BATCH = 2
LENGTH, SOURCE = 11, 13  # of the text that is written, and of the one that is read in an encoder-decoder
CODES = 16  # of a codec's codebook that are drawn
MOST_PLACES = 600  # of a signal in the text
FIRST_WORD = 8  # ids below may be special
MISMATCH = re.compile(r"tokens:?\D*(\d+).*?features:?\D*(\d+)", re.DOTALL)
PROJECTION = re.compile(r"shapes cannot be multiplied \(\d+x\d+ and (\d+)x\d+\)|normalized_shape=\[(\d+)\]")
# Ids that a config gives to the places of a signal in the text, and to what stands before them.
PLACES = {
    "image": ("image_token_id", "image_token_index", "media_placeholder_token_id", "img_context_token_id"),
    "video": ("video_token_id", "video_token_index"),
    "audio": ("audio_token_id", "audio_token_index", "audio_soft_token_id"),
}
BEFORE = {
    "image": ("vision_start_token_id", "image_start_token_id", "boi_token_id"),
    "video": ("vision_start_token_id", "video_start_token_id"),
    "audio": ("audio_start_token_id", "boa_token_id", "audio_bos_token_id"),
}
TYPES = {"image": 1, "video": 2, "audio": 3}  # in mm_token_type_ids


@dataclass(frozen=True)
class Inputs:
    """Keyword arguments of the model's forward.

    Args:
        values: the arguments.
        text: name of the token ids whose outputs are looked at, the decoder's where there are two.
        missing: signals that the model has arguments for and that were not given, with the reason.
    """

    values: dict[str, Any]
    text: str | None
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Of the text; 0 without one."""
        return 0 if self.text is None else self.values[self.text].shape[1]

    @property
    def rows(self) -> int:
        """Of the text."""
        return BATCH if self.text is None else self.values[self.text].shape[0]

    @property
    def text_mask(self) -> str:
        return "decoder_attention_mask" if self.text == "decoder_input_ids" else "attention_mask"

    def double(self) -> Inputs:
        return replace(self, values={k: v.double() if is_float(v) else v for k, v in self.values.items()})

    def with_values(self, **values: Any) -> Inputs:
        return replace(self, values={**self.values, **values})


class NoInputsError(ValueError):
    """No inputs were found that the model itself accepts."""


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def parameters_of(model: PreTrainedModel) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(type(model).forward).parameters)


def find_inputs(model: PreTrainedModel) -> Inputs:
    """The fullest inputs that the model accepts.

    Raises:
        NoInputsError: if it accepts none of those that are offered.
    """
    search = Search(model)
    search.add_text()
    for signal in SIGNALS:
        if signal.name in search.names:
            search.add(signal)
    if search.found is None:
        raise NoInputsError("; ".join(search.problems[-3:]) or "no argument of its forward is known")
    missing = {name: why for name, why in search.missing.items() if name not in search.found.values}
    return replace(search.found, missing=missing)


class Search:
    """Extends the inputs of one model by one signal after another, as long as the model accepts them."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.settings = Settings(model.config)
        self.parameters = parameters_of(model)
        self.names = set(self.parameters)
        self.draft = Inputs({}, None)  # what is to be extended, whether or not the model accepts it as it is
        self.found: Inputs | None = None
        self.missing: dict[str, str] = {}
        self.problems: list[str] = []
        self.words = torch.Generator().manual_seed(1)

    def tokens(self, length: int) -> Tensor:
        size = min(self.settings.get("vocab_size", default=FIRST_SPECIAL), FIRST_SPECIAL)
        return torch.randint(min(FIRST_WORD, size - 1), size, (BATCH, length), generator=self.words)

    def add_text(self) -> None:
        values: dict[str, Any] = {}
        is_pair = "decoder_input_ids" in self.names and any(c.is_encoder_decoder for c in self.settings.configs)
        if "input_ids" in self.names:
            values["input_ids"] = self.tokens(SOURCE if is_pair else LENGTH)
            if "attention_mask" in self.names:
                values["attention_mask"] = torch.ones_like(values["input_ids"])
        if is_pair:
            values["decoder_input_ids"] = self.tokens(LENGTH)
            if "decoder_attention_mask" in self.names:
                values["decoder_attention_mask"] = torch.ones_like(values["decoder_input_ids"])
        if not values:
            return
        text = next((name for name in ("decoder_input_ids", "input_ids") if name in values), None)
        self.draft = Inputs(values, text)
        for extended in self.required(self.draft):
            problem = self.try_inputs(extended)
            if not problem:
                return
        self.problems.append(f"text: {problem}")

    def required(self, inputs: Inputs) -> Iterator[Inputs]:
        """The inputs as they are, and with small arguments that some models want beside text."""
        yield inputs
        if inputs.text is None:
            return
        shape = inputs.values.get("input_ids", inputs.values[inputs.text]).shape
        beside = {
            "bbox": torch.tensor([1, 2, 6, 7]).expand(*shape, 4).contiguous(),
            "token_type_ids": torch.zeros(shape, dtype=torch.long),
            "mm_token_type_ids": torch.zeros(shape, dtype=torch.long),
            "global_attention_mask": torch.zeros(shape, dtype=torch.long),
        }
        given = {name: value for name, value in beside.items() if name in self.names}
        if given:
            yield inputs.with_values(**given)
        if "bbox" in given:
            yield inputs.with_values(**{**given, "bbox": given["bbox"] / 10})
        books = self.settings.get("num_codebooks", "num_channels", default=0)
        if isinstance(books, int) and 1 < books < 64:  # ids of a codec: one text for each codebook
            ids, name = inputs.values[inputs.text], inputs.text
            yield inputs.with_values(**{name: ids[..., None].repeat(1, 1, books) % CODES})
            yield inputs.with_values(**{name: ids[..., None].repeat(1, 1, books + 1) % CODES})
            yield inputs.with_values(**{name: ids.repeat_interleave(books, dim=0) % CODES})

    def add(self, signal: Signal) -> None:
        """Extend the draft by a signal; note why where the model accepts none that is offered."""
        if signal.kind in ("hidden states", "codes") and self.found is not None:
            return  # what another part of the model makes of the inputs
        first, problem, widths = None, "", set[int]()
        waiting = list(offers(signal, self.settings, self.names, BATCH))
        while waiting:
            offer = waiting.pop(0)
            found = self.place(signal, {**self.draft.values, **offer})
            if not found:
                self.missing.pop(signal.name, None)
                return
            first, problem = first or offer, problem or found
            match = PROJECTION.search(found)
            if match and (width := int(match[1] or match[2])) not in widths:
                widths.add(width)
                waiting += [{**offer, **other} for other in with_width(signal, width, BATCH)]
        self.missing[signal.name] = problem or "no shape is known"
        self.problems.append(f"{signal.name}: {problem}")
        if self.parameters[signal.name].default is inspect.Parameter.empty and first is not None:
            self.draft = self.draft.with_values(**first)  # it may want another signal beside this one

    def place(self, signal: Signal, values: dict[str, Any]) -> str:
        """Try the signal, with as many places in the text as the model says; returns what went wrong."""
        place = self.settings.token(*PLACES.get(signal.kind, ()))
        if place is None or "input_ids" not in values:
            return self.try_inputs(replace(self.draft, values=values))
        tried, waiting, problem = set(), [1], ""
        while waiting:
            places = waiting.pop()
            tried.add(places)
            problem = self.try_inputs(replace(self.draft, values=self.with_places(values, signal.kind, place, places)))
            if not problem:
                return ""
            waiting += [count for count in self.counts_in(problem) if count not in tried]
        return problem

    def counts_in(self, problem: str) -> list[int]:
        """Places for each item, the likelier last: what a model counts is features, or numbers in them."""
        match = MISMATCH.search(problem)
        if match is None:
            return []
        _, features = (int(x) for x in match.groups())
        width = self.settings.text("hidden_size", default=1)
        counts = [n // BATCH for n in (features, features / width) if n % BATCH == 0]
        return [int(n) for n in counts if 0 < n <= MOST_PLACES]

    def with_places(self, values: dict[str, Any], kind: str, place: int, places: int) -> dict[str, Any]:
        """The places stand after the first words, whatever stood there of another signal before them."""
        ids = values["input_ids"]
        start = self.settings.token(*BEFORE.get(kind, ()))
        added = [start] * (start is not None) + [place] * places
        ids = torch.cat([ids[:, :3], torch.tensor(added).expand(BATCH, -1), ids[:, 3:]], dim=1)
        values = {**values, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "attention_mask" not in self.names:
            del values["attention_mask"]
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in self.names and (name == "mm_token_type_ids" or "bbox" not in self.names):
                kinds = torch.zeros_like(ids)
                for other, number in TYPES.items():
                    token = self.settings.token(*PLACES[other])
                    if token is not None:
                        kinds[ids == token] = number if name == "mm_token_type_ids" else 1
                values[name] = kinds
        return values

    def try_inputs(self, inputs: Inputs) -> str:
        """Keep them if the model accepts them; returns what it said otherwise."""
        try:
            with torch.no_grad():
                outputs = run(self.model, inputs.values)
        except Exception as error:
            return summary(error)
        if not any(is_float(x) for x in outputs.values()):
            return "no output is a tensor of floating-point numbers"
        self.found = self.draft = inputs
        return ""


def last_token_changed(inputs: Inputs) -> Inputs:
    """The same text with another last token."""
    assert inputs.text is not None
    ids = inputs.values[inputs.text].clone()
    ids[:, -1] = torch.where(ids[:, -1] == FIRST_WORD, FIRST_WORD + 1, FIRST_WORD)
    return inputs.with_values(**{inputs.text: ids})


def other_words(inputs: Inputs, seed: int) -> Inputs:
    """The same places of signals, between other words."""
    assert inputs.text is not None
    ids = inputs.values[inputs.text]
    is_word = (ids >= FIRST_WORD) & (ids < FIRST_SPECIAL)
    if ids.max() < CODES:
        return inputs
    drawn = torch.randint(FIRST_WORD, FIRST_SPECIAL, ids.shape, generator=torch.Generator().manual_seed(seed))
    return inputs.with_values(**{inputs.text: torch.where(is_word, drawn.clamp_max(int(ids.max())), ids)})


def padded(inputs: Inputs, name: str, mask_name: str, amount: int, *, left: bool) -> Inputs:
    """With padding on one side of a text, and of all that has one entry for each of its tokens."""
    length = inputs.values[name].shape[1]
    prefix = "decoder_" if name.startswith("decoder_") else ""
    values: dict[str, Any] = {}
    for other, value in inputs.values.items():
        is_aligned = other.startswith("decoder_") == bool(prefix) and other.endswith(("ids", "mask", "bbox"))
        if is_aligned and isinstance(value, Tensor) and value.dim() > 1 and tuple(value.shape[:2]) == (BATCH, length):
            filler = torch.full_like(value[:, :1], FIRST_WORD if other == name else 0)
            filler = filler.repeat_interleave(amount, dim=1)
            values[other] = torch.cat([filler, value] if left else [value, filler], dim=1)
    mask = torch.ones(BATCH, length + amount, dtype=torch.long)
    mask[:, slice(0, amount) if left else slice(length, None)] = 0
    return inputs.with_values(**{**values, mask_name: mask})


def shapes(values: Mapping[str, Any]) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in values.items() if isinstance(value, Tensor)}
