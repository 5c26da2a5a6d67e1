"""Calibration text for a document: what a state of it is fitted and distilled on, made from nothing but the document.

What a reader of a document will be asked is not known. The model's own continuations of the document, sampled while it
sees all of it, bring queries like those that come. Pieces of the document, read once more, do so too, but a state that
is distilled on them learns to copy them and not what follows (docs/conversion.md). Studying one's own text is the idea
of Cartridges (Eyuboglu et al. 2025, arXiv 2506.06266).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..calibration.inputs import samples
from ..ops.exact import LayerPrefix
from ..progress import Reporter
from ..tuner.calls import exact_prefix
from ..tuner.observation import adapted_layers

# What a continuation starts with; {} is a piece of the document.
OPENERS = (
    "{}",
    "\n\nSummary of the text above: ",
    "\n\nQuestion: ",
    "\n\nQuestion: What does the text say about {}",
    "\n\nThe text above says that ",
    "\n\nAs it says above, {}",
)
PIECE = 8  # tokens of the document in an opener
SOURCES = ("samples", "chunks", "both")


def study(
    model: Any,
    tokenizer: Any,
    prefix: Mapping[str, LayerPrefix],
    document: Tensor,
    *,
    rows: int = 32,
    length: int = 512,
    batch_size: int = 16,
    seed: int = 0,
    source: str = "samples",
    reporter: Reporter | None = None,
) -> list[dict[str, Tensor]]:
    """Batches of calibration text.

    Args:
        model: with an NTK-Attention adapter, which rests meanwhile.
        tokenizer: of the model.
        prefix: of the document, by layer; see `by_layer`.
        document: its tokens [m]; where they are not known, [0], all is sampled.
        rows, length: of the text in tokens; a document shorter than `length` gives shorter rows. Rows as long as what
            will follow in use: behind the last position of the calibration a state is a guess.
        batch_size: rows of a batch.
        seed: of the places and the samples.
        source: "samples" of the model, "chunks" of the document, or alternately "both". A model that is to say the
            document again needs chunks.
        reporter: told about every row.

    Raises:
        ValueError: for an unknown source.
    """
    if source not in SOURCES:
        raise ValueError(f"unknown source of calibration text {source!r}: expected one of {SOURCES}")
    openers: tuple[str, ...] = OPENERS
    if document.numel() == 0:
        source, openers = "samples", tuple(text for text in OPENERS if "{}" not in text)
    if reporter is not None:
        reporter.stage("write calibration text", rows)
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    sizes = [min(batch_size, rows - start) for start in range(0, rows, batch_size)]
    batches: list[dict[str, Tensor]] = []
    for i, size in enumerate(sizes):
        if source == "samples" or (source == "both" and i % 2):
            opener = openers[len(batches) % len(openers)]
            ids = continuations(model, tokenizer, prefix, document, size, length, opener, generator)
        else:
            ids = pieces(document, size, length, generator)
        batches.append({"input_ids": ids.to(device)})
        if reporter is not None:
            reporter.advance(size)
    return batches


def pieces(document: Tensor, rows: int, length: int, generator: torch.Generator) -> Tensor:
    """[rows, length] from random places."""
    length = min(length, len(document))
    starts = torch.randint(len(document) - length + 1, (rows,), generator=generator)
    return torch.stack([document[start : start + length].cpu() for start in starts])


def continuations(
    model: Any,
    tokenizer: Any,
    prefix: Mapping[str, LayerPrefix],
    document: Tensor,
    rows: int,
    length: int,
    opener: str,
    generator: torch.Generator,
) -> Tensor:
    """Continuations [rows, length] of one opener, written by the model that sees the document."""
    layers = adapted_layers(model)

    def tokens(text: str) -> Tensor:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.long).expand(rows, -1)

    before, braces, after = opener.partition("{}")
    parts = [tokens(before), *([pieces(document, rows, PIECE, generator)] if braces else []), tokens(after)]
    seed = int(torch.randint(2**31, (), generator=generator))
    with exact_prefix(layers, prefix, resting=layers):
        return samples(model, torch.cat(parts, dim=1), length, seed).cpu()
