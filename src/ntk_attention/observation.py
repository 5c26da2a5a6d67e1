"""Looking at the attention of an adapted model while it runs: for calibration and for reports."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .layer import NTKAttentionLayer
from .operation import Block
from .sdpa import HIDDEN
from .sharding import device_of

# query [B, H, L, d], block of the real tokens, block of the prefix or None, factor of phi's input, and which rows
# [B, L] count
Observer = Callable[[Tensor, Block, Block | None, float, Tensor], None]
# input and output [N, D] of a feed-forward block, of the tokens that count
FeedForwardObserver = Callable[[Tensor, Tensor], None]


def adapted_layers(model: nn.Module, adapter_name: str = "default") -> dict[str, NTKAttentionLayer]:
    """The layers that hold the adapter, by module name.

    Raises:
        ValueError: if there is none.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, NTKAttentionLayer) and adapter_name in module
    }
    if not layers:
        raise ValueError(f"the model has no NTK-Attention adapter {adapter_name!r}: call get_peft_model first")
    return layers


def observe(
    model: nn.Module,
    layers: Mapping[str, NTKAttentionLayer],
    batches: Iterable[Mapping[str, Any]],
    observers: Mapping[str, Observer],
    feed_forward_observers: Mapping[str, FeedForwardObserver] | None = None,
) -> None:
    """Run the model over the batches, without gradients and dropout, and show its attention to one observer a layer.

    Those of feed-forward blocks, by the layer whose adapter looks after them, see these. Rows of padding do not count:
    those whose `attention_mask` is 0, and those that see no token.
    """
    device = device_of(model)
    with evaluating(model), torch.no_grad():
        for batch in batches:
            batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            for name, layer in layers.items():
                mask = padding_mask(model, name, batch)
                layer.observer = partial(show, observers[name], mask)
                if feed_forward_observers and name in feed_forward_observers:
                    layer.feed_forward_observer = partial(show_feed_forward, feed_forward_observers[name], mask)
            try:
                model(**batch)
            finally:
                for layer in layers.values():
                    layer.observer = layer.feed_forward_observer = None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, leaving every module's mode as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def show(
    observer: Observer, mask: Tensor | None, query: Tensor, context: Block, prefix: Block | None, factor: float
) -> None:
    """Call the observer with the rows [B, L] that count: those of real tokens, and those that see one."""
    lowest = max(HIDDEN, torch.finfo(query.dtype).min) / 2
    counts = (context.lse > lowest).all(dim=1)  # masks are the same for all heads
    if mask is not None and tuple(mask.shape) == tuple(counts.shape):
        counts = counts & mask.bool()
    observer(query, context, prefix, factor, counts)


def show_feed_forward(observer: FeedForwardObserver, mask: Tensor | None, x: Tensor, out: Tensor) -> None:
    """Call the observer with the real tokens; some families have one dimension for items and tokens."""
    x, out = x.reshape(-1, x.shape[-1]), out.reshape(-1, out.shape[-1])
    if mask is not None and mask.numel() == len(x):
        real = mask.reshape(-1).bool()
        x, out = x[real], out[real]
    observer(x, out)


def padding_mask(model: nn.Module, name: str, batch: Mapping[str, Any]) -> Tensor | None:
    """Which queries of the attention module `name` are real tokens: [B, L], or None where all are."""
    parts = name.split(".")
    if any("vision" in part for part in parts):
        return None
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and "decoder" in parts:
        if batch.get("decoder_attention_mask") is None and batch.get("labels") is not None:
            return batch["labels"] != -100
        return batch.get("decoder_attention_mask")
    return batch.get("attention_mask")


def prefix_shares(model: nn.Module, batches: Iterable[Mapping[str, Any]], adapter_name: str = "default") -> Tensor:
    """The share of attention that the active prefixes take: [layers, H], averaged over the real tokens."""
    layers = adapted_layers(model, adapter_name)
    sums: dict[str, Any] = dict.fromkeys(layers, 0.0)
    rows = dict.fromkeys(layers, 0)

    def see(name: str) -> Observer:
        def add(query: Tensor, context: Block, prefix: Block | None, factor: float, counts: Tensor) -> None:
            if prefix is not None:
                share = torch.sigmoid(prefix.lse - context.lse).transpose(0, 1)[:, counts]  # [H, N]
                sums[name] = sums[name] + share.double().sum(dim=1)
                rows[name] += share.shape[1]

        return add

    observe(model, layers, batches, {name: see(name) for name in layers})
    if not all(rows.values()):
        raise ValueError("no token reached the adapter: is it active, and is the text empty?")
    return torch.stack([sums[name] / rows[name] for name in layers]).cpu()
