"""The ways to go on without a document's KV cache in a given number of bytes, by name; each makes a `Kept`."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import CartridgeConfig, get_peft_model, initialize_kv_prefix_from_past_key_values
from transformers import DynamicCache

from ntk_attention.convert import by_layer, prefix_of_adapter, prefix_of_text
from ntk_attention.convert.distillation import match

from .fact_texts import Question
from .methods import Job, Kept, full_cache, no_context, state, train_cache, window, with_tokens
from .shortened import shorten

FIRST, LAST = 4, 64  # tokens that a hybrid keeps as they are
BYTES = 2  # of a number


@dataclass
class BudgetJob(Job):
    """A document, what every method may use of it, and the bytes that it may keep."""

    held: int = 0

    @property
    def budget(self) -> int:  # type: ignore[override]
        """Tokens whose keys and values have so many bytes; all of the document's where there is room for them."""
        return self.num_tokens(self.token_numbers)

    def num_tokens(self, numbers: int) -> int:
        """Tokens of so many numbers each that there is room for.

        Raises:
            ValueError: if not even one token fits.
        """
        tokens = self.held // (BYTES * numbers)
        if tokens < 1:
            raise ValueError(f"{self.held:,} bytes hold no token of {BYTES * numbers:,}")
        return min(tokens, len(self.document))

    @property
    def num_heads(self) -> int:
        """KV heads, of all layers."""
        return sum(len(layer.keys) for layer in self.tokens)

    def num_features(self, directions: bool, spare: int = 0) -> int:
        """Features beside the constant one that states per KV head may have if `spare` numbers go to something else,
        with the directions that a layer's heads share where these are not drawn from a seed.

        Raises:
            ValueError: if there is no room for one.
        """
        d, d_v = self.tokens[0].keys.shape[-1], self.tokens[0].values.shape[-1]
        of_states = self.num_heads * (d_v + 1)
        of_directions = len(self.tokens) * d if directions else 0
        free = self.held // BYTES - spare - of_states - self.num_heads  # less the constant feature and the scales
        r = free // (of_states + of_directions)
        if r < 1:
            raise ValueError(f"{self.held:,} bytes hold no state of one feature beside {spare:,} other numbers")
        return r

    def of_map(self, name: str, spare: int = 0) -> dict[str, Any]:
        options = {"num_features": self.num_features(name == "anchored", spare)}
        return {"feature_map": name, "feature_map_options": options, "state_heads": "kv"}


def shortened(job: BudgetJob, steps: bool = False) -> Kept:
    """Every token has a weight in every head, too."""
    model = job.adapt()
    tokens = job.num_tokens(job.token_numbers + job.num_heads)
    short = shorten(model, by_layer(model, job.tokens), job.batches, tokens)
    return train_cache(job, model, short) if steps else Kept(model, short)


def budgeted_state(job: BudgetJob, name: str, steps: bool) -> Kept:
    return state(job, steps=steps, **job.of_map(name))


def hybrid(job: BudgetJob, name: str) -> Kept:
    """The first and last tokens as they are, and the state of the others in the rest of the bytes."""
    return with_tokens(job, FIRST, LAST, **job.of_map(name, (FIRST + LAST) * job.token_numbers))


def cartridge(job: BudgetJob) -> Kept:
    """Keys and values that start as those of the first tokens and train, the first token's apart: PEFT's own layer."""
    cache = DynamicCache()
    tokens = job.document[: job.budget].to(job.base.device)
    with torch.no_grad():
        for chunk in tokens.split(512):
            job.base(input_ids=chunk[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
    model = get_peft_model(job.base, CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(tokens)))
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    initialize_kv_prefix_from_past_key_values(model, past_key_values=pairs)
    parameters = [p for p in model.parameters() if p.requires_grad]
    curve: list[float] = []
    if parameters:  # a single token is not trained
        curve = match(model, job.batches, job.targets, parameters, job.setting.steps, job.setting.rates["cache"])
    prefix = prefix_of_adapter(model)
    adapted = job.adapt()
    return Kept(adapted, by_layer(adapted, prefix), curve=curve)


# --- retrieval ---


@dataclass
class Retrieved(Kept):
    """For every question the window of the document that BM25 likes best, read as a text of its own; the last one where
    nothing is asked. The whole text has to be kept, too."""

    job: Any = None
    starts: Sequence[int] = ()
    index: Any = None
    text_bytes: int = 0

    def groups(self, asked: Sequence[Question]) -> Iterator[tuple[list[int], Kept]]:
        by_start: dict[int, list[int]] = defaultdict(list)
        for i, question in enumerate(asked):
            by_start[self.starts[self.index.best(question.prompt)]].append(i)
        for start, own in by_start.items():
            tokens = self.job.document[start : start + self.job.budget]
            with Kept(self.model).active():  # read by the frozen model alone
                prefix = prefix_of_text(self.job.base, tokens)
            yield own, Kept(self.model, by_layer(self.model, prefix))

    @property
    def bytes(self) -> int:
        return super().bytes + self.text_bytes


def retrieval(job: BudgetJob) -> Kept:
    m, n = len(job.document), job.budget
    starts = sorted({*range(0, m - n, max(1, n // 2)), m - n})
    windows = [job.tokenizer.decode(job.document[start : start + n]) for start in starts]
    kept = window(job)
    text = len(job.tokenizer.decode(job.document).encode())
    return Retrieved(kept.model, kept.exact, job=job, starts=starts, index=BM25(windows), text_bytes=text)


class BM25:
    """Okapi BM25 (k1 = 1.5, b = 0.75) over words in lower case."""

    def __init__(self, texts: Sequence[str]):
        self.counts = [Counter(words(text)) for text in texts]
        self.lengths = [sum(count.values()) for count in self.counts]
        self.mean = max(sum(self.lengths) / len(texts), 1)
        self.seen = Counter(word for count in self.counts for word in count)

    def score(self, query: str, i: int) -> float:
        total, count = 0.0, self.counts[i]
        for word in set(words(query)):
            rarity = math.log(1 + (len(self.counts) - self.seen[word] + 0.5) / (self.seen[word] + 0.5))
            damped = count[word] + 1.5 * (0.25 + 0.75 * self.lengths[i] / self.mean)
            total += rarity * count[word] * 2.5 / damped
        return total

    def best(self, query: str) -> int:
        return max(range(len(self.counts)), key=lambda i: self.score(query, i))


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


WITHOUT_BUDGET: dict[str, Callable[[Job], Kept]] = {"no context": no_context, "full cache": full_cache}
WITH_BUDGET: dict[str, Callable[[BudgetJob], Kept]] = {
    "window": window,
    "retrieval": retrieval,
    "shortened cache": shortened,
    "shortened cache, distilled": partial(shortened, steps=True),
    "cartridge": cartridge,
    "state random, fitted": partial(budgeted_state, name="positive_random", steps=False),
    "state random, distilled": partial(budgeted_state, name="positive_random", steps=True),
    "state anchored, fitted": partial(budgeted_state, name="anchored", steps=False),
    "state anchored, distilled": partial(budgeted_state, name="anchored", steps=True),
    "state random and tokens, distilled": partial(hybrid, name="positive_random"),
    "state anchored and tokens, distilled": partial(hybrid, name="anchored"),
}
FACT_METHODS: Mapping[str, Callable[..., Kept]] = {**WITHOUT_BUDGET, **WITH_BUDGET}
