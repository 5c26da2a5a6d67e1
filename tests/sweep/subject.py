"""One base model with its inputs, and the adapted copies of it that the checks look at."""

from __future__ import annotations

import copy
import logging
import re
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from ntk_attention import NTKAttentionConfig

from .inputs import Inputs, other_words
from .outputs import Outputs, run

PASSED, REFUSED, WRONG, UNCLEAR = "passed", "refused", "wrong", "unclear exception"
NOT_APPLICABLE = "does not apply"
CHILD = "ntk_states"
# Class names of what mixes tokens without the softmax over keys that a prefix could join.
RECURRENT = re.compile(
    r"Mamba|S[Ss]m[A-Z]|SSM[A-Z]|DeltaNet|DeltaAttention|Rwkv|LSTM|Recurrent|Retention|Lightning|ShortConv|Hyena|RgLru"
    r"|LinearAttention|FourierTransform|Mixer$"
)


class NotApplicableError(Exception):
    """The base model itself has not what a check asks for."""


@dataclass(frozen=True)
class Outcome:
    """What a check found: one of the words above, and the figures or the sentence."""

    status: str
    detail: str = ""


@dataclass
class Subject:
    """A base model that nobody changes, its inputs, and how exactly its numbers agree."""

    base: PreTrainedModel
    inputs: Inputs
    tolerance: float = 2e-4

    def __post_init__(self) -> None:
        self.unused = copy.deepcopy(self.base)  # some models keep positions of one call for the next

    @cached_property
    def outputs(self) -> Outputs:
        return self.run(self.base)

    def run(self, model: nn.Module, inputs: Inputs | None = None) -> Outputs:
        with torch.no_grad():
            return run(model, (inputs or self.inputs).values)

    def of_base(self, compute: Callable[[], Any]) -> Any:
        """What the base model gives.

        Raises:
            NotApplicableError: if it fails.
        """
        try:
            return compute()
        except NotApplicableError:
            raise
        except Exception as error:
            first = str(error).strip().splitlines() or [""]
            raise NotApplicableError(f"the base model fails: {type(error).__name__}: {first[0][:120]}") from error

    def fresh(self) -> PreTrainedModel:
        return copy.deepcopy(self.unused)

    def adapted(self, **options: Any) -> PeftModel:
        torch.manual_seed(2)
        model = get_peft_model(self.fresh(), NTKAttentionConfig(**options)).eval()
        return model.double() if next(self.base.parameters()).dtype == torch.float64 else model

    @cached_property
    def visible(self) -> PeftModel:
        """With a random prefix that shows; checks leave it as it is."""
        return self.adapted(init_weights=False)

    @cached_property
    def trainee(self) -> PeftModel:
        """The same for checks in training mode, which may change statistics of normalisation."""
        return self.adapted(init_weights=False)

    @cached_property
    def trains(self) -> bool:
        """Whether the base model takes the inputs in training mode; some want labels then."""
        try:
            self.run(self.fresh().train())
        except Exception:
            return False
        return True

    def with_other_words(self, seed: int) -> Subject:
        return Subject(self.base, other_words(self.inputs, seed), self.tolerance)

    def double(self) -> Subject:
        return Subject(self.fresh().double(), self.inputs.double(), tolerance=1e-6)


def is_refusal(error: BaseException) -> bool:
    """A ValueError that our own code raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, ValueError) and bool(frames) and "ntk_attention" in frames[-1].filename


def where(error: BaseException) -> str:
    """The last places of the error, in our code and in all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "ntk_attention" in f.filename]
    last = [f"{f.filename.rpartition('/')[2]}:{f.name}" for f in (*own[-1:], *frames[-1:])]
    return " in ".join(dict.fromkeys(reversed(last)))


def tuner_layers(model: nn.Module) -> dict[str, Any]:
    """Our layers by the name that their attention module has in the base model."""
    start = "base_model.model."
    return {
        name.removeprefix(start).removesuffix(f".{CHILD}"): module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


def adapted_classes(model: nn.Module) -> dict[str, int]:
    layers = tuner_layers(model).values()
    return dict(sorted(Counter(type(layer.get_base_layer()).__name__ for layer in layers).items()))


def has_route(module: nn.Module) -> bool:
    code = getattr(getattr(type(module).forward, "__wrapped__", type(module).forward), "__code__", None)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(code, "co_names", ())


def left_out(model: PeftModel) -> dict[str, dict[str, Any]]:
    """Classes of modules that mix tokens and have no adapter: how many, the name of one, and why."""
    adapted = set(tuner_layers(model))
    mixers = {
        name: module
        for name, module in model.get_base_model().named_modules()
        if name and mixes_tokens(module) and not any(lies_in(name, a) or lies_in(a, name) for a in adapted)
    }
    found: dict[str, dict[str, Any]] = {}
    for name, module in mixers.items():
        if any(other != name and lies_in(other, name) for other in mixers):
            continue  # what is inside says it better
        kind = type(module).__name__
        is_recurrent = bool(RECURRENT.search(kind))
        why = "routes" if has_route(module) else "no softmax attention" if is_recurrent else "does not route"
        around = [type(mixers[other]).__name__ for other in mixers if other != name and lies_in(name, other)]
        found.setdefault(kind, {"count": 0, "first": name, "why": why, "inside": around})["count"] += 1
    return found


def mixes_tokens(module: nn.Module) -> bool:
    """By the name of its class, and since it holds weights or routes."""
    kind = type(module).__name__
    if kind.endswith(("Bias", "Output", "Norm", "Mask", "Embedding", "Embeddings")):
        return False
    has_weights = any(True for _ in module.parameters())
    return has_route(module) or (has_weights and ("attention" in kind.lower() or bool(RECURRENT.search(kind))))


def lies_in(name: str, other: str) -> bool:
    return f"{name}.".startswith(f"{other}.")


class Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def messages() -> Iterator[list[str]]:
    """Everything that is warned of or logged meanwhile; complete at the end."""
    collector = Collector()
    logger = logging.getLogger("ntk_attention")
    logger.addHandler(collector)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield collector.messages
        collector.messages += [str(warning.message) for warning in caught]
    finally:
        logger.removeHandler(collector)
