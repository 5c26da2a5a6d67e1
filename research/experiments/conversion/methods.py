"""The ways to go on without a document's KV cache, by name; each makes a `Kept`."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import get_peft_model
from torch import Tensor

from ntk_attention import NTKAttentionConfig
from ntk_attention.cli.compression import states_of
from ntk_attention.convert import adapter_from_prefix, anchor, by_layer, distill, fit, prefix_of_text
from ntk_attention.convert.distillation import match, teacher_logits
from ntk_attention.convert.own_text import study
from ntk_attention.ops.exact import LayerPrefix
from ntk_attention.tuner.calls import exact_prefix
from ntk_attention.tuner.observation import adapted_layers
from ntk_attention.tuner.routing import CHILD, detach

from .shortened import shorten


@dataclass(frozen=True)
class Setting:
    """What a row depends on beside its document and its method.

    Args:
        model: a name or a folder.
        held_out: tokens of the continuation.
        limit: of the tokens of a document, before the needles.
        steps: of distillation.
        rows, length, source: of the calibration text.
        batch_size: rows of a step.
        rates: learning rates of states and of caches.
        seed: of the needles, the calibration text and the methods.
    """

    model: str
    held_out: int
    limit: int
    steps: int
    rows: int
    length: int
    batch_size: int
    source: str
    rates: dict[str, float]
    seed: int


@dataclass
class Job:
    """A document and what every method may use of it."""

    base: Any
    tokenizer: Any
    document: Tensor
    setting: Setting
    work: Path  # where the calibration text is kept
    prefill_seconds: float = 0.0

    @cached_property
    def tokens(self) -> list[LayerPrefix]:
        synchronize()
        start = time.perf_counter()
        prefix = prefix_of_text(self.base, self.document)
        synchronize()
        self.prefill_seconds = time.perf_counter() - start
        return prefix

    @cached_property
    def studied(self) -> dict[str, Any]:
        """The calibration text and the seconds that it took; kept in the work folder."""
        options: dict[str, Any] = {
            "rows": self.setting.rows,
            "length": self.setting.length,
            "batch_size": self.setting.batch_size,
        }
        options |= {"seed": self.setting.seed, "source": self.setting.source}
        name = json.dumps([self.base.config.name_or_path.split("/")[-1], self.document.tolist(), options])
        path = self.work / f"calibration-{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"
        if not path.exists():
            tokens, start = self.tokens, time.perf_counter()
            with self.adapted() as model:
                batches = study(model, self.tokenizer, by_layer(model, tokens), self.document, **options)
            kept = {"seconds": round(time.perf_counter() - start, 1), "ids": [b["input_ids"].tolist() for b in batches]}
            self.work.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(kept))
            partial.rename(path)
        return json.loads(path.read_text())

    @cached_property
    def batches(self) -> list[dict[str, Tensor]]:
        return [{"input_ids": torch.tensor(ids, device=self.base.device)} for ids in self.studied["ids"]]

    @cached_property
    def targets(self) -> list[Tensor]:
        tokens, batches = self.tokens, self.batches
        with self.adapted() as model:
            return teacher_logits(model, by_layer(model, tokens), batches)

    @contextmanager
    def adapted(self, **options: Any) -> Iterator[Any]:
        model = self.adapt(**options)
        try:
            yield model
        finally:
            model.unload()

    def adapt(self, positions: Literal["free", "rotary"] = "rotary", **options: Any) -> Any:
        """Positions: what phi sees of a query, with or without its own."""
        torch.manual_seed(self.setting.seed)
        config = NTKAttentionConfig(task_type="CAUSAL_LM", **options).for_given_prefix()
        return get_peft_model(self.base, replace(config, positions=positions)).eval()

    def strip(self) -> None:
        """Take away the adapter that a method has left when it failed."""
        for module in list(self.base.modules()):
            if hasattr(module, CHILD):
                detach(module)

    @property
    def token_numbers(self) -> int:
        """Numbers that the keys and values of one token are."""
        return sum(x.keys[:, 0].numel() + x.values[:, 0].numel() for x in self.tokens)

    @cached_property
    def budget(self) -> int:
        """Tokens whose keys and values are as many numbers as the state with r = d."""
        with self.adapted() as model:
            return sum(x.numel() for x in states_of(model).values()) // self.token_numbers


@dataclass
class Kept:
    """A model that goes on with what a method keeps."""

    model: Any
    exact: Mapping[str, LayerPrefix] = field(default_factory=dict)
    rests: bool = True  # the adapter: the method has no state
    curve: list[float] = field(default_factory=list)

    @contextmanager
    def active(self) -> Iterator[Any]:
        layers = adapted_layers(self.model)
        with exact_prefix(layers, self.exact, resting=layers if self.rests else ()):
            yield self.model

    @property
    def numbers(self) -> int:
        held = 0 if self.rests else sum(x.numel() for x in states_of(self.model).values())
        if not self.rests:
            maps = [layer["default"].feature_map for layer in adapted_layers(self.model).values()]
            directions = [(phi.name, x) for phi in maps for x in (*phi.parameters(), *phi.buffers())]
            # Random ones come from a seed.
            held += sum(x.numel() for name, x in directions if name == "anchored" or x.requires_grad)
        return held + sum(x.numel() for tokens in self.exact.values() for x in tokens if x is not None)

    @property
    def bytes(self) -> int:
        """In 16 bits a number."""
        return 2 * self.numbers

    def groups(self, asked: Sequence[Any]) -> Iterator[tuple[list[int], Kept]]:
        """Which of the questions are answered with what."""
        yield list(range(len(asked))), self


def no_context(job: Job) -> Kept:
    return Kept(job.adapt())


def full_cache(job: Job) -> Kept:
    model = job.adapt()
    return Kept(model, by_layer(model, job.tokens))


def window(job: Job, share: float = 1.0) -> Kept:
    """The last tokens alone, read as a text of their own."""
    tokens = prefix_of_text(job.base, job.document[-int(share * job.budget) :])  # before there is an adapter
    model = job.adapt()
    return Kept(model, by_layer(model, tokens))


def shortened(job: Job, share: float = 1.0, steps: bool = False) -> Kept:
    model = job.adapt()
    short = shorten(model, by_layer(model, job.tokens), job.batches, int(share * job.budget))
    return train_cache(job, model, short) if steps else Kept(model, short)


def trained_cache(job: Job, share: float = 1.0) -> Kept:
    """Keys and values that start as those of the first tokens, as in Cartridges."""
    model = job.adapt()
    n = int(share * job.budget)
    first = {name: LayerPrefix(x.keys[:, :n], x.values[:, :n]) for name, x in by_layer(model, job.tokens).items()}
    return train_cache(job, model, first)


def train_cache(job: Job, model: Any, start: Mapping[str, LayerPrefix]) -> Kept:
    trained = {
        name: LayerPrefix(*(None if x is None else x.float().clone().requires_grad_() for x in tokens))
        for name, tokens in start.items()
    }
    # Adam's step is absolute: keys and values of about one size train at one rate.
    parameters = [x for tokens in trained.values() for x in tokens if x is not None]
    layers = adapted_layers(model)
    with exact_prefix(layers, trained, resting=layers):
        curve = match(model, job.batches, job.targets, parameters, job.setting.steps, job.setting.rates["cache"])
    done = {name: LayerPrefix(*(None if x is None else x.detach() for x in t)) for name, t in trained.items()}
    return Kept(model, done, curve=curve)


def direct(job: Job, **options: Any) -> Kept:
    config = NTKAttentionConfig(task_type="CAUSAL_LM", **options)
    return Kept(adapter_from_prefix(job.base, job.tokens, config).eval(), rests=False)  # type: ignore[arg-type]


def state(job: Job, steps: bool = False, learned: bool = False, **options: Any) -> Kept:
    """Fitted; with `steps` distilled; with `learned` the directions of the features train too."""
    model = job.adapt(**options)
    named = by_layer(model, job.tokens)
    if options.get("feature_map") == "anchored":
        anchor(model, named, job.batches)
    fit(model, named, job.batches)
    return distilled(job, model, named, {}, learned) if steps else Kept(model, rests=False)


def distilled(job: Job, model: Any, named: Mapping, kept: Mapping, learned: bool = False) -> Kept:
    if learned:
        for layer in adapted_layers(model).values():
            layer["default"].feature_map.projection.requires_grad_(True)
    options = {
        "steps": job.setting.steps,
        "learning_rate": job.setting.rates["state"],
        "kept": kept,
        "targets": job.targets,
    }
    return Kept(model, kept, rests=False, curve=distill(model, named, job.batches, **options))


def with_tokens(job: Job, first: int = 0, last: int = 0, **options: Any) -> Kept:
    """The state of the middle, and the first and last tokens as they are."""
    model = job.adapt(**options)
    named = by_layer(model, job.tokens)
    m = len(job.document)
    places = torch.cat([torch.arange(first), torch.arange(m - last, m)])
    middle = torch.arange(first, m - last)
    parts = ({n: LayerPrefix(x.keys[:, p], x.values[:, p]) for n, x in named.items()} for p in (middle, places))
    gone, kept = parts
    fit(model, gone, job.batches, kept=kept)
    return distilled(job, model, gone, kept)


def exact_layers(job: Job, count: int = 4, **options: Any) -> Kept:
    """The layers that are fitted worst keep their tokens."""
    model = job.adapt(**options)
    named = by_layer(model, job.tokens)
    errors = fit(model, named, job.batches).error
    worst = sorted(errors, key=lambda name: errors[name].mean().item())[-count:]
    kept = {name: named[name] for name in worst}
    for name in worst:  # no state there
        adapted_layers(model)[name]["default"].reset_parameters("published")
    return distilled(job, model, {n: x for n, x in named.items() if n not in worst}, kept)


R256 = {"feature_map": "positive_random", "feature_map_options": {"num_features": 256}}
ANCHORED = {"feature_map": "anchored", "feature_map_options": {"num_features": 63}}  # r = d with the constant
ANCHORED_255 = {"feature_map": "anchored", "feature_map_options": {"num_features": 255}}
TAYLOR = {"feature_map": "taylor", "state_heads": "kv", "constant_feature": False}
METHODS: dict[str, Callable[[Job], Kept]] = {
    "no context": no_context,
    "full cache": full_cache,
    "window": window,
    "shortened cache": shortened,
    "shortened cache, distilled": partial(shortened, steps=True),
    "trained cache": trained_cache,
    "state elu, direct": partial(direct, feature_map="elu"),
    "state elu, fitted": state,
    "state elu, distilled": partial(state, steps=True),
    "state elu free, fitted": partial(state, positions="free"),
    "state elu free, distilled": partial(state, steps=True, positions="free"),
    "state elu per KV head, distilled": partial(state, steps=True, state_heads="kv"),
    "state random 256, direct": partial(direct, **R256),
    "state random 256, fitted": partial(state, **R256),
    "state random 256, distilled": partial(state, steps=True, **R256),
    "state random 256, features learned": partial(state, steps=True, learned=True, **R256),
    "state anchored 63, fitted": partial(state, **ANCHORED),
    "state anchored 63, distilled": partial(state, steps=True, **ANCHORED),
    "state anchored 63, features learned": partial(state, steps=True, learned=True, **ANCHORED),
    "state anchored 255, distilled": partial(state, steps=True, **ANCHORED_255),
    "state taylor 2, direct": partial(direct, **TAYLOR),
    "state taylor 2, fitted": partial(state, **TAYLOR),
    "state elu, 4 layers exact": exact_layers,
    "state elu, first 4 tokens": partial(with_tokens, first=4),
    "state elu, first 4 and last 64 tokens": partial(with_tokens, first=4, last=64),
    "window x4": partial(window, share=4.0),
    "shortened cache x4": partial(shortened, share=4.0),
}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
