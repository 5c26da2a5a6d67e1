"""What a run trains on and is measured on: data, read and split and as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers import PreTrainedTokenizerBase

from ..progress import Reporter
from ..tuner.distributed import device_of
from ..tuner.observation import evaluating
from .data import Item, Row, collate
from .encoding import encode_all
from .models import EMBEDDED, load_tokenizer, longest_input
from .settings import Settings
from .sources import load_data
from .splits import asked_items, encode_split, in_pieces, pack, read_data, split_items
from .tasks import EMBEDDED_TASKS, metric_of

CALIBRATION_ITEMS = 64
EVALUATED_ITEMS = 200  # of an embedded task, where nothing is said


@dataclass(frozen=True)
class Work:
    """What a run trains and is measured on.

    Args:
        rows: tokens of `train`, in which items may be packed, `calibration`, `validation` and `test`.
        asked: the test items whose prompts are answered.
        found: what the record says of the data.
    """

    rows: dict[str, Any]
    asked: list[Item]
    found: dict[str, Any]


def prepare(settings: Settings, reporter: Reporter) -> tuple[PreTrainedTokenizerBase, Work]:
    """Read, split and tokenise the data, and say how many there are.

    Raises:
        ValueError: if they cannot be used; the message names the place.
    """
    # The embedded model has a template; making the model can wait until the data are known to be good.
    tokenizer = None if settings.model == EMBEDDED else load_tokenizer(settings.model)
    data, others = read_data(settings, tokenizer is None or tokenizer.chat_template is not None, reporter)
    if tokenizer is None:
        reporter.stage(f"load {settings.model}")
        tokenizer = load_tokenizer(settings.model)
    limit = longest_input(settings.model)
    items = in_pieces(data, tokenizer, limit, settings.max_length, settings.items)
    held = None if others is None else in_pieces(others, tokenizer, limit, settings.max_length)
    split, rows = encode_split(split_items(settings, items, held), settings, tokenizer, limit, reporter)
    metric = metric_of(settings.eval_data or settings.data)
    asked = asked_items(split.test, tokenizer, metric, settings.max_new_tokens, limit, settings.too_long)
    found: dict[str, Any] = {f"{name}_items": len(getattr(split, name)) for name in ("train", "validation", "test")}
    found |= {"read_as": data.read_as, "asked_items": len(asked)}
    found |= {name: getattr(split, name) for name in ("repeated", "dropped", "shortened")}
    found |= {name: getattr(split, name) for name in ("train_tokens", "digest")}
    rows["calibration"] = rows["train"].select(range(min(CALIBRATION_ITEMS, len(rows["train"])))).to_list()
    if settings.max_length is not None and settings.packing:
        rows["train"] = pack(rows["train"], settings.max_length)
    found["train_rows"] = len(rows["train"])
    reporter.say(describe_data(found, settings))
    return tokenizer, Work(rows, asked, found)


def describe_data(found: dict[str, Any], settings: Settings) -> str:
    """One line: what is trained on and measured with, and what was left out."""
    counts = ", ".join(f"{found[f'{name}_items']:,} {name}" for name in ("train", "validation", "test"))
    said = [f"data: {counts}; {found['train_tokens']:,} tokens to train on; read as {found['read_as']}"]
    if found["repeated"]:
        said.append(f"{found['repeated']:,} left out of training, which are held out as well")
    if found["dropped"] or found["shortened"]:
        said.append(f"too long: {found['dropped']:,} dropped, {found['shortened']:,} cut")
    if settings.packing:
        said.append(f"packed into {found['train_rows']:,} rows of {settings.max_length:,} tokens")
    return "; ".join(said)


@torch.no_grad()
def check_packing(model: Any, rows: Sequence[Row], pad_token_id: int) -> None:
    """Raise ValueError if the model lets an item of a packed row see the one before it."""
    row = next((row for row in rows if row["position_ids"].count(0) > 1), None)
    if row is None:
        return
    second = row["position_ids"].index(0, 1)
    first = [int(token == 0) for token in row["input_ids"][:second]]  # another text of this length
    other = {**row, "input_ids": first + row["input_ids"][second:]}
    with evaluating(model):
        outputs = []
        for inputs in (row, other):
            batch = send_to_device(collate([inputs], pad_token_id), device_of(model))
            outputs.append(model(**batch).logits)
    if not torch.equal(outputs[0][:, second:], outputs[1][:, second:]):
        raise ValueError(
            f"{type(model.get_base_model()).__name__} lets items of a packed row see each other: leave packing out"
        )


def to_evaluate(
    source: str,
    size: int | None,
    seed: int,
    base: str,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    reporter: Reporter,
) -> tuple[list[Row], list[Item]]:
    """The tokens of a source for a base model, and those of its items whose prompts are answered."""
    limit = longest_input(base)
    size = EVALUATED_ITEMS if size is None and source in EMBEDDED_TASKS else size
    data = load_data(source, size, seed, has_template=tokenizer.chat_template is not None, reporter=reporter)
    items = in_pieces(data, tokenizer, limit, size=size)
    rows = encode_all(items, tokenizer, limit)
    return rows, asked_items(items, tokenizer, metric_of(source), max_new_tokens, limit)
