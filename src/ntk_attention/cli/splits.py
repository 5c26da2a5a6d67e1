"""Training, validation and test items, and their tokens."""

from __future__ import annotations

import zlib
from array import array
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from ..progress import Reporter, Silent
from .data import IGNORED, TEXT_CHUNK, Item, Row, cut, prompt_tokens
from .encoding import tokens_of
from .evaluation import check_room
from .settings import Settings
from .sources import Data, load_data
from .tasks import EMBEDDED_TASKS

VALIDATION_ITEMS = 64
HELD_OUT_ITEMS = 200
ROWS_TOGETHER = 1000  # that become a part of the table of tokens
TOKENS = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})


@dataclass(frozen=True)
class Split:
    """The parts of the data.

    Args:
        repeated: items that were left out of training, since the other parts hold their prompt, or their text.
        dropped: items that were left out because they are too long.
        shortened: items that were cut for it.
        train_tokens: how many tokens are trained on.
        digest: of all tokens, to tell other data by.
    """

    train: list[Item]
    validation: list[Item]
    test: list[Item]
    repeated: int = 0
    dropped: int = 0
    shortened: int = 0
    train_tokens: int = 0
    digest: int = 0


def read_data(settings: Settings, has_template: bool, reporter: Reporter) -> tuple[Data, Data | None]:
    """The data of a run, and those that it is evaluated on where they are others."""
    data = load_data(
        settings.data,
        settings.items,
        settings.seed,
        has_template=has_template,
        streaming=settings.streaming,
        reporter=reporter,
    )
    if settings.eval_data is None:
        return data, None
    size = None if settings.held_out is None else settings.held_out + VALIDATION_ITEMS
    others = load_data(settings.eval_data, size, settings.seed + 10**6, has_template=has_template, reporter=reporter)
    return data, others


def in_pieces(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    max_length: int | None = None,
    size: int | None = None,
) -> list[Item]:
    """The first items: documents, and texts without a prompt that are longer than what is allowed, in pieces.

    Args:
        limit: tokens that the model takes.
        max_length: tokens of a piece; by default TEXT_CHUNK of a document, and the limit of another text.
        size: how many items.
    """
    length = min(limit, max_length or (TEXT_CHUNK if data.is_document else limit))
    items: list[Item] = []
    for item in data.items:
        items += [item] if item.prompt else cut(item, tokenizer, length)
        if size is not None and len(items) >= size:
            break
    return items[:size]


def split_items(settings: Settings, train: list[Item], others: list[Item] | None = None) -> Split:
    """Training, validation and held-out items; none of the last two has the prompt of a training item, or its text.

    Raises:
        ValueError: if there are too few items.
    """
    held_out = settings.held_out or HELD_OUT_ITEMS
    num_validation = min(VALIDATION_ITEMS, held_out)
    wanted = held_out + num_validation
    if others is not None:
        held = shuffled(others, settings.seed)
        held = held if settings.held_out is None else held[:wanted]
        train = shuffled(train, settings.seed)
    elif settings.data in EMBEDDED_TASKS:
        seen = {key_of(item) for item in train}
        more = EMBEDDED_TASKS[settings.data](4 * wanted, settings.seed + 10**6)
        held = list({key_of(item): item for item in more if key_of(item) not in seen}.values())[:wanted]
    else:
        train = shuffled(train, settings.seed)
        wanted = min(wanted, len(train) // 3)
        held, train = train[:wanted], train[wanted:]
    keys = {key_of(item) for item in held}
    fresh = [item for item in train if key_of(item) not in keys]
    if len(held) < 2 or not fresh:
        raise ValueError(
            f"{settings.data} gives {len(fresh)} training and {len(held)} held-out items: too few for training, "
            "validation and test"
        )
    num_validation = min(num_validation, len(held) // 2)
    return Split(fresh, held[:num_validation], held[num_validation:], repeated=len(train) - len(fresh))


def key_of(item: Item) -> Hashable:
    return item.prompt or item.completion


def shuffled(items: list[Item], seed: int) -> list[Item]:
    generator = torch.Generator().manual_seed(seed)
    return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]


# --- tokens ---


def encode_split(
    split: Split, settings: Settings, tokenizer: PreTrainedTokenizerBase, limit: int, reporter: Reporter | None = None
) -> tuple[Split, dict[str, Any]]:
    """The split without what is too long, and the tokens of its parts.

    Raises:
        ValueError: if an item has none, or more than are allowed and `too_long` is to refuse; it names the place.
    """
    reporter = reporter or Silent()
    reporter.stage("tokenise", len(split.train) + len(split.validation) + len(split.test))
    encoder = Encoder(tokenizer, settings, limit)
    encoded = {name: encoder.encode(name, getattr(split, name), reporter) for name in ("train", "validation", "test")}
    if encoder.longer and settings.too_long == "refuse":
        item, size = encoder.longer[0]
        allowed = f"--max-length is {encoder.limit}" if settings.max_length else f"the model takes {encoder.limit}"
        raise ValueError(
            f"{item.place or settings.data}: an item has {size} tokens, {allowed} ({len(encoder.longer):,} of "
            f"{encoder.seen:,} items are longer): --too-long drop leaves such items out, --too-long cut keeps their "
            "beginnings"
        )
    if not all(items for items, _ in encoded.values()):
        raise ValueError(f"{settings.data} has no items left for training, validation and test: all are too long")
    parts: dict[str, Any] = {name: items for name, (items, _) in encoded.items()}
    parts |= {"dropped": encoder.dropped, "shortened": encoder.shortened, "digest": encoder.digest}
    split = replace(split, **parts, train_tokens=encoder.num_tokens["train"])
    rows = {name: rows for name, (_, rows) in encoded.items()}
    return split, {"train": rows["train"], **{name: rows[name].to_list() for name in ("validation", "test")}}


class Encoder:
    """Makes tokens of items, and counts those that are too long."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: Settings, limit: int):
        self.tokenizer, self.too_long = tokenizer, settings.too_long
        self.limit = min(limit, settings.max_length or limit)
        self.longer: list[tuple[Item, int]] = []
        self.seen = self.dropped = self.shortened = self.digest = 0
        self.num_tokens: Counter[str] = Counter()

    def encode(self, name: str, items: Sequence[Item], reporter: Reporter) -> tuple[list[Item], Dataset]:
        kept, parts, rows = list[Item](), list[Dataset](), list[Row]()
        for item in items:
            row = self.row_of(item)
            if row is not None:
                kept.append(item)
                rows.append(row)
                self.num_tokens[name] += len(row["input_ids"])
                self.digest = zlib.crc32(array("i", row["input_ids"]), self.digest)
            if len(rows) == ROWS_TOGETHER:
                parts.append(table(rows))
                rows = []
            reporter.advance()
        return kept, concatenate_datasets([*parts, table(rows)])

    def row_of(self, item: Item) -> Row | None:
        """The tokens of an item; None if it is too long to be used."""
        try:
            row = tokens_of(item, self.tokenizer)
        except ValueError as error:
            raise ValueError(f"{item.place}: {error}" if item.place else str(error)) from None
        size = len(row["input_ids"])
        self.seen += 1
        if size <= self.limit:
            return row
        self.longer.append((item, size))
        row = {name: values[: self.limit] for name, values in row.items()}
        if self.too_long == "drop" or all(label == IGNORED for label in row["labels"][1:]):
            self.dropped += 1
            return None
        self.shortened += 1
        return row


def table(rows: Sequence[Row]) -> Dataset:
    """Rows as a table of Arrow, which takes a tenth of the memory of lists."""
    return Dataset.from_dict({name: [row[name] for row in rows] for name in TOKENS}, features=TOKENS)


def pack(rows: Dataset, length: int) -> Dataset:
    """Rows of `length` tokens at most that hold several items each, whose positions begin anew."""
    from trl.data_utils import pack_dataset

    packed = pack_dataset(rows, length)
    features = Features({**TOKENS, "position_ids": List(Value("int32"))})
    return packed.map(placed, batched=True, remove_columns=["seq_lengths"], features=features)


def placed(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
    """Packed rows with the position of each token in its item, whose first one follows another item."""
    positions = [[i for n in lengths for i in range(n)] for lengths in rows["seq_lengths"]]
    labels = [
        [label if place else IGNORED for label, place in zip(row, places, strict=True)]
        for row, places in zip(rows["labels"], positions, strict=True)
    ]
    return {"input_ids": rows["input_ids"], "labels": labels, "position_ids": positions}


def asked_items(
    items: Sequence[Item],
    tokenizer: PreTrainedTokenizerBase,
    metric: str,
    max_new_tokens: int,
    limit: int,
    too_long: str = "refuse",
) -> list[Item]:
    """The items whose prompt the model is to answer: none where the text counts and most are longer than an answer.

    Raises:
        ValueError: if a prompt leaves no room for an answer and `too_long` is to refuse.
    """
    asked = [item for item in items if item.prompt]
    if too_long == "refuse":
        check_room([item.prompt for item in asked], tokenizer, max_new_tokens, limit)
    else:
        asked = [item for item in asked if len(prompt_tokens(item.prompt, tokenizer)) + max_new_tokens <= limit]
    if metric == "exact_match":
        sizes = [len(tokenizer(item.completion, add_special_tokens=False)["input_ids"]) for item in asked]
        if 2 * sum(size > max_new_tokens for size in sizes) > len(sizes):
            return []
    return asked
