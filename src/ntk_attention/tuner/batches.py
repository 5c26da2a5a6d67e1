"""The batches that a model is called with: checked before it runs, and named where it cannot run.

What a model says of wrong inputs is seldom of help: it comes from an operation deep in it, on tensors that the caller
has never seen. On a GPU a number that an embedding lacks even leaves a process that can do nothing more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn

IDS = ("input_ids", "decoder_input_ids")
EMBEDDINGS = ("inputs_embeds", "decoder_inputs_embeds")
MASKS = ("attention_mask", "decoder_attention_mask")
SIGNALS = ("pixel_values", "input_features", "input_values")  # pictures and sound
INPUTS = (*IDS, *EMBEDDINGS, *MASKS, *SIGNALS, "labels", "position_ids", "token_type_ids")
CACHES = ("past_key_values", "cache")
EXPECTED = "expected a dict of tensors with the arguments of the model's forward, such as input_ids [B, L]"


def checked_batches(
    batches: Iterable[Mapping[str, Any]], *, least: int = 1, source: str = "batches", model: nn.Module | None = None
) -> list[Mapping[str, Any]]:
    """The batches as a list.

    Only what no model takes is refused here: what a model takes besides is its own affair.

    Args:
        batches: keyword arguments of a model's forward.
        least: how many there must be.
        source: the argument that they were given as.
        model: whose config says how many rows of codes make one item.

    Raises:
        ValueError: if one is not what a model's forward can be called with, or there are too few.
    """
    if isinstance(batches, str | Mapping | Tensor) or not isinstance(batches, Iterable):
        raise ValueError(
            f"{source} is {a_or_an(type(batches).__name__)}: expected a list, each of which is "
            f"{EXPECTED.removeprefix('expected ')}"
        )
    found = list(batches)
    for number, batch in enumerate(found):
        problem = problem_of(batch, codebooks_of(model))
        if problem:
            raise ValueError(f"{named(number, source)} {problem}")
    if len(found) < least:
        raise ValueError(f"{source} holds no batches: a few batches of training data are expected")
    return found


def named(number: int, source: str) -> str:
    return f"batch {number}" if source == "batches" else f"batch {number} of {source}"


def a_or_an(noun: str) -> str:
    is_vowel = noun[:1].lower() in "aeiou" or noun.startswith("nd")  # ndarray
    return f"{'an' if is_vowel else 'a'} {noun}"


def codebooks_of(model: nn.Module | None) -> int:
    """How many rows of codes make one item, with one row of the mask; 1 for all but writers of music."""
    config = getattr(model, "config", None)
    return next((n for c in (config, getattr(config, "decoder", None)) if (n := getattr(c, "num_codebooks", None))), 1)


def problem_of(batch: Any, codebooks: int = 1) -> str | None:
    """What no model can be called with, as the rest of a sentence about the batch; None for a batch that may do."""
    if not isinstance(batch, Mapping) or not all(isinstance(name, str) for name in batch):
        return f"is {a_or_an(type(batch).__name__)}: {EXPECTED}"
    for name in INPUTS:
        x = batch.get(name)
        if isinstance(x, Sequence | Number) or (hasattr(x, "__array__") and not isinstance(x, Tensor)):
            return f"holds {a_or_an(type(x).__name__)} under {name!r}: {EXPECTED}"
    tensors = {name: x for name, x in batch.items() if isinstance(x, Tensor)}
    if not tensors:
        return f"holds no tensor, but {sorted(batch)}: {EXPECTED}"
    for name in INPUTS:
        if name in tensors and (expected := expectation(name, tensors)):
            return f"holds {described(name, tensors[name])}: expected {expected}"
    if any(batch.get(name) is not None for name in CACHES):
        return None  # masks are as long as the cache and the text
    for mask, texts in zip(MASKS, zip(IDS, EMBEDDINGS, strict=True), strict=True):
        text = next((name for name in texts if name in tensors), None)
        if mask in tensors and text is not None and not mask_fits(tensors[mask], tensors[text], codebooks):
            return (
                f"holds {described(mask, tensors[mask])} beside {described(text, tensors[text])}: expected a mask "
                f"{list(tensors[text].shape[:2])}, or one of four dimensions [B, 1, L, S]"
            )
    return None


def expectation(name: str, tensors: Mapping[str, Tensor]) -> str | None:
    """What is expected of the tensor of this name, if it is not so."""
    x = tensors[name]
    if x.is_meta:
        return "a tensor with data, not one on the meta device"
    if x.layout is not torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        return f"a plain tensor, not a {kind} one: padded, with an attention_mask"
    if name in IDS and x.dtype not in (torch.int64, torch.int32):
        return "token ids of int64 or int32"
    if name in IDS and x.ndim < 2 and not (x.ndim == 1 and any(other.startswith("cu_seq") for other in tensors)):
        return "token ids [B, L]" + (", such as input_ids[None] for one text" if x.ndim else "")
    if name in EMBEDDINGS and x.ndim < 3:
        return "embeddings [B, L, D]"
    is_main = name in (*IDS, *EMBEDDINGS) or (name in SIGNALS and not any(text in tensors for text in IDS))
    if is_main and x.numel() == 0:
        return "one item and one token at least"
    if name in (*EMBEDDINGS, *SIGNALS) and x.is_floating_point() and not bool(torch.isfinite(x).all()):
        return "finite numbers, got NaN or inf"
    return None


def mask_fits(mask: Tensor, text: Tensor, codebooks: int = 1) -> bool:
    """Whether a mask may belong to ids [B, L], codes [B, C, L], [B, L, C] or [B C, L], or embeddings [B, L, D].

    Models ignore most others without a word, or broadcast them.
    """
    if text.ndim < 2:
        return True  # packed
    batch_size, *lengths = text.shape
    lengths = lengths if not text.is_floating_point() else lengths[:1]
    if mask.ndim == 4:
        return mask.shape[0] in (1, batch_size) and mask.shape[2] in (1, *lengths)
    return mask.ndim == 2 and batch_size in (len(mask), codebooks * len(mask)) and mask.shape[1] in lengths


def described(name: str, value: Any) -> str:
    """Such as "input_ids [2, 5] int64"."""
    if isinstance(value, Tensor):
        return f"{name} {list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return f"{name} {type(value).__name__}"


@contextmanager
def calling(model: nn.Module, batch: Mapping[str, Any], name: str) -> Iterator[None]:
    """Around a call of the model: says with which batch it cannot be called, and why.

    Args:
        model: whose embeddings are asked for nothing that they do not have.
        batch: what it is called with.
        name: of the batch, such as "batch 0".

    Raises:
        ValueError: for whatever else than this package's own errors and a lack of memory is raised inside.
    """
    try:
        with ExitStack() as stack:
            for path, module in model.named_modules():
                if is_plain(module):
                    stack.enter_context(module.register_forward_pre_hook(partial(check_numbers, path, batch)))
            yield
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or is_ours(error):
            raise
        holds = ", ".join(described(key, value) for key, value in batch.items() if value is not None)
        first = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"the model cannot be called with {name}, which holds {holds}: {type(error).__name__}: {first}"
        ) from error


def is_ours(error: Exception) -> bool:
    """Whether this package has found the fault, and says it in its own words."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return isinstance(error, ValueError) and place.partition(".")[0] == __name__.partition(".")[0]


def is_plain(module: nn.Module) -> bool:
    """Whether a module looks up each of the numbers that it is given, and those alone."""
    if not isinstance(module, nn.Embedding):
        return False
    return type(module).forward is nn.Embedding.forward or "ScaledWordEmbedding" in type(module).__name__


def check_numbers(path: str, batch: Mapping[str, Any], module: nn.Embedding, args: tuple[Any, ...]) -> None:
    """Raise IndexError for numbers that an embedding does not have."""
    if not args or not isinstance(args[0], Tensor) or torch.compiler.is_compiling():
        return
    numbers = args[0]
    if numbers.is_floating_point() or numbers.dtype == torch.bool or numbers.is_meta or numbers.numel() == 0:
        return
    low, high = numbers.min().item(), numbers.max().item()
    size = max(module.num_embeddings, module.weight.shape[0])
    if low < 0 or high >= size:
        given = next((name for name, x in batch.items() if is_same(x, numbers)), f"the input of {path}")
        raise IndexError(f"{given} holds numbers from {low} to {high}: {path} has those from 0 to {size - 1}")


def is_same(x: Any, numbers: Tensor) -> bool:
    return isinstance(x, Tensor) and x.dtype == numbers.dtype and torch.equal(x.to(numbers.device), numbers)
