"""What belongs to one call of a model, not to the model: kept apart for every thread, so that calls do not meet.

A module that held it would hand it to whatever other call runs at the same time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..ops.exact import LayerPrefix
from ..ops.reference import Block
from ..ops.rotation import Rotation
from ..ops.state import RowStates

if TYPE_CHECKING:
    from .feed_forward import FeedForwardRows
    from .layer import NTKAttentionLayer

# Sees every call of an attention: the query, the block of the real tokens, the block of the prefix (None while the
# adapters rest), the factor that makes phi's input of the query, and the positions that a free adapter does without.
Watcher = Callable[[Tensor, Block, Block | None, float, Rotation | None], None]


@dataclass
class MixedRows:
    """A batch whose rows have adapters of their own: by layer, the prefixes of its rows.

    Args:
        rows: of attention; a layer that is missing has none of the adapters.
        feed_forward_rows: of feed-forward blocks, likewise, by the name of the part.
        copies: how many neighbouring rows `generate` may make of each, for beams or several answers.
        free: layers in which phi sees the queries of all rows without their positions; it sees them with in the others.
    """

    rows: dict[NTKAttentionLayer, RowStates] = field(default_factory=dict)
    feed_forward_rows: dict[NTKAttentionLayer, dict[str, FeedForwardRows]] = field(default_factory=dict)
    copies: frozenset[int] = frozenset({1})
    free: set[NTKAttentionLayer] = field(default_factory=set)

    def of_batch(self, rows: RowStates, batch_size: int, kind: str) -> RowStates:
        """The prefixes of a batch of this size in a module of this kind."""
        index = self.index_of_batch(rows.index, batch_size, kind)
        return rows if index is rows.index else replace(rows, index=index)

    def index_of_batch(self, index: Tensor, batch_size: int, kind: str) -> Tensor:
        """The places [batch_size] of the rows that a module of this kind gets, of those [B] of the names.

        Raises:
            ValueError: if there are more or fewer rows than names.
        """
        if len(index) == batch_size:
            return index
        copies, rest = divmod(batch_size, max(1, len(index)))
        if rest or copies not in self.copies:
            raise ValueError(
                f"adapter_names has {len(index)} names for a batch of {batch_size} in {kind}: expected as many. Towers "
                'may get an entry for each picture (exclude_modules=["vision_tower"] or its like leaves one out), and '
                "some models drop rows that are finished (give them one row at a time)"
            )
        return index.repeat_interleave(copies)


class Calls(threading.local):
    """The state of the calls of this thread."""

    def __init__(self) -> None:
        self.mixed: MixedRows | None = None
        self.watchers: Mapping[NTKAttentionLayer, Watcher] = {}
        self.exact: Mapping[NTKAttentionLayer, LayerPrefix] = {}  # tokens of a prefix that are all there
        self.resting: frozenset[NTKAttentionLayer] = frozenset()  # layers whose adapters do nothing
        self.inputs: dict[NTKAttentionLayer, Tensor] = {}  # of feed-forward blocks that run, until their end
        self.rotations: list[Any] = []  # what was made of tables of positions, as long as these live; see `Rotary`


CALLS = Calls()


@contextmanager
def during_calls(**state: Any) -> Iterator[None]:
    """Give fields of `CALLS` other values in this thread."""
    before = {name: getattr(CALLS, name) for name in state}
    try:
        for name, value in state.items():
            setattr(CALLS, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(CALLS, name, value)


def without_adapters(layers: Iterable[NTKAttentionLayer]) -> AbstractContextManager[None]:
    """Let the adapters of layers rest, without the changes to requires_grad that PEFT's `disable_adapter` makes."""
    return during_calls(resting=CALLS.resting | set(layers))


@contextmanager
def exact_prefix(
    layers: Mapping[str, NTKAttentionLayer], prefix: Mapping[str, LayerPrefix], *, resting: Iterable[str] = ()
) -> Iterator[None]:
    """Let layers attend to real prefix tokens, beside the states of their adapters.

    Queries see the whole prefix, whatever their position: positions of the text count from 0, those of the prefix lie
    before it.

    Args:
        layers: of an adapted model, by name.
        prefix: for some or all of them.
        resting: names of layers whose adapters rest meanwhile.

    Raises:
        ValueError: if the model is tensor-parallel.
    """
    if any(layer.mesh is not None for layer in layers.values()):
        raise ValueError("prefixes are converted on a model with all heads in one process: load it with tp_size=1")
    exact = {**CALLS.exact, **{layers[name]: tokens for name, tokens in prefix.items()}}
    with during_calls(exact=exact), without_adapters(layers[name] for name in resting):
        yield
