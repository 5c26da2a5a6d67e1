"""What adapters make of their parameters, kept for one call of a model: `generate` makes it once, not for every token.

Not for longer. A parameter tells by its version that it was changed, but not if that was done through `.data`, as
PEFT's hotswapping, trainers that keep a second model up to date and DeepSpeed do it between calls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .decoding import DecodingStep
    from .layer import NTKAttentionLayer

T = TypeVar("T")


class Kept(threading.local):
    """What this thread keeps; None outside of a call.

    Args:
        made: by what it is, what was made and of which tensors in which versions.
        steps: by layer, how it computes one new token after another, see decoding.py.
    """

    made: dict[Hashable, tuple[list[Tensor], list[int], Any]] | None = None
    steps: dict[NTKAttentionLayer, DecodingStep] | None = None


KEPT = Kept()


@contextmanager
def keeping() -> Iterator[None]:
    """Keep what is made in this thread from here on, until the outermost of these ends."""
    if KEPT.made is not None or torch.compiler.is_compiling():
        yield
        return
    KEPT.made, KEPT.steps = {}, {}
    try:
        yield
    finally:
        KEPT.made = KEPT.steps = None


def kept(what: Hashable, tensors: Sequence[Tensor | None], make: Callable[[], T]) -> T:
    """What `make` makes of tensors, which is kept unless it may need gradients or belongs to a graph.

    A graph would have it as a constant, and not see a parameter change.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or (made := KEPT.made) is None:
        return make()
    given = [x for x in tensors if x is not None]
    if given[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return make()
    found = made.get(what)
    if found is not None and all(map(is_, found[0], given)) and found[1] == [x._version for x in given]:
        return found[2]
    result = make()
    if not any(map(torch.is_inference, given)):  # which have no versions
        made[what] = given, [x._version for x in given], result
    return result
