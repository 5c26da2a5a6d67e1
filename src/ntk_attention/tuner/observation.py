"""Looking at the attention of an adapted model while it runs: for calibration and for reports."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..ops.reference import Block, phi_input
from ..ops.rotation import Rotation
from ..ops.sdpa import HIDDEN
from .batches import calling, checked_batches, named
from .calls import during_calls
from .distributed import device_of, put_together
from .feed_forward import Part
from .layer import NTKAttentionLayer, input_of

# query [B, H, L, d], block of the real tokens, block of the prefix or None, phi's input [B, H, L, d], and which rows
# [B, L] count
Observer = Callable[[Tensor, Block, Block | None, Tensor, Tensor], None]


class FeedForwardObserver(Protocol):
    """Sees the parts of a feed-forward block run, by their names: the tokens that count."""

    def observe_input(self, name: str, x: Tensor) -> None:
        """What a part gets, [N, in]."""

    def observe_output(self, name: str, out: Tensor) -> None:
        """What is made of it without prefixes, [N, out]."""


def adapted_layers(model: nn.Module, adapter_name: str = "default") -> dict[str, NTKAttentionLayer]:
    """The layers that hold the adapter, by module name.

    Raises:
        ValueError: if there is none.
    """
    if not isinstance(adapter_name, str):
        raise ValueError(f"adapter_name must be the name of one adapter, got {adapter_name!r}")
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, NTKAttentionLayer) and adapter_name in module
    }
    if not layers:
        raise ValueError(f"the model has no NTK-Attention adapter {adapter_name!r}: call get_peft_model first")
    return layers


def base_model_of(model: Any) -> Any:
    """The model of transformers that PEFT has wrapped; the model itself where it has not."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def observe(
    model: nn.Module,
    layers: Mapping[str, NTKAttentionLayer],
    batches: Iterable[Mapping[str, Any]],
    observers: Mapping[str, Observer],
    feed_forward_observers: Mapping[str, FeedForwardObserver] | None = None,
    source: str | None = None,
    adapter_name: str = "default",
) -> None:
    """Run the model over the batches, without gradients and dropout, and show its attention to one observer a layer.

    Those of feed-forward blocks, by the layer whose adapter looks after them, see these. Rows of padding do not count:
    those whose `attention_mask` is 0, and those that see no token. Errors number the batches of `source`, the argument
    that they were given as. Phi's input is that of the adapter of this name, with or without positions as it has it.

    Raises:
        ValueError: if the model cannot be called with one of them.
    """
    device = device_of(model)
    blocks = feed_forward_observers or {}
    base = base_model_of(model)
    # Nothing comes after, and some models make too small a cache of their own.
    options = {"use_cache": False} if "use_cache" in inspect.signature(base.forward).parameters else {}
    with evaluating(model), torch.no_grad():
        for number, batch in enumerate(batches):
            with ExitStack() as stack:
                stack.enter_context(calling(base, batch, "a batch" if source is None else named(number, source)))
                # Copies: some models write into their inputs.
                batch = {k: v.to(device, copy=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
                masks = {name: padding_mask(model, name, batch) for name in layers}
                watchers = {
                    layer: partial(show, observers[name], masks[name], is_free(layer, adapter_name))
                    for name, layer in layers.items()
                }
                stack.enter_context(during_calls(watchers=watchers))
                for name, layer in layers.items():
                    if name in blocks:
                        for part in layer.parts.values():
                            if part.size.name in layer[adapter_name].parts:
                                stack.enter_context(showing(part, blocks[name], masks[name], layer.mesh))
                model(**{**options, **batch})


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


def is_free(layer: NTKAttentionLayer, adapter_name: str) -> bool:
    """Whether phi of an adapter sees queries without their positions."""
    return adapter_name in layer and layer[adapter_name].positions == "free"


def show(
    observer: Observer,
    mask: Tensor | None,
    is_free: bool,
    query: Tensor,
    context: Block,
    prefix: Block | None,
    factor: float,
    rotation: Rotation | None,
) -> None:
    """Call the observer with the rows [B, L] that count: those of real tokens, and those that see one.

    The mask has another shape in towers, whose rows are no tokens of the text. NaN counts, so that it is noticed.
    """
    lowest = max(HIDDEN, torch.finfo(query.dtype).min) / 2
    counts = ~(context.lse <= lowest).any(dim=1)  # masks are the same for all heads
    if mask is not None and tuple(mask.shape) == tuple(counts.shape):
        counts = counts & mask.bool()
    x = phi_input(query, factor, rotation if is_free else None)
    observer(query, context, prefix, x, counts)


@contextmanager
def showing(part: Part, observer: FeedForwardObserver, mask: Tensor | None, mesh: DeviceMesh | None) -> Iterator[None]:
    """Call the observer with every input and output of a part, whole where processes of a mesh have slices."""
    name, size = part.size.name, part.size

    def see_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = put_together(input_of(args, kwargs), size.in_features, mesh)
        observer.observe_input(name, real_tokens(x, mask))

    def see_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        out = put_together(output if isinstance(output, Tensor) else output[0], size.out_features, mesh)
        observer.observe_output(name, real_tokens(out, mask))

    with (
        part.first.register_forward_pre_hook(see_input, with_kwargs=True),
        part.last.register_forward_hook(see_output),
    ):
        yield


def real_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """[N, D] of [..., D]; some families have one dimension for items and tokens."""
    x = x.reshape(-1, x.shape[-1])
    return x if mask is None or mask.numel() != len(x) else x[mask.reshape(-1).bool()]


def padding_mask(model: nn.Module, name: str, batch: Mapping[str, Any]) -> Tensor | None:
    """Which queries of the attention module `name` are real tokens: [B, L], or None where all are.

    Masks of other kinds hide keys, which says which queries see none.
    """
    mask = any_mask(model, name, batch)
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def any_mask(model: nn.Module, name: str, batch: Mapping[str, Any]) -> Any:
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
    batches = checked_batches(batches, model=model)

    def see(name: str) -> Observer:
        def add(query: Tensor, context: Block, prefix: Block | None, x: Tensor, counts: Tensor) -> None:
            if prefix is not None:
                share = torch.sigmoid(prefix.lse - context.lse).transpose(0, 1)[:, counts]  # [H, N]
                sums[name] = sums[name] + share.double().sum(dim=1)
                rows[name] += share.shape[1]

        return add

    observe(model, layers, batches, {name: see(name) for name in layers}, None, "batches", adapter_name)
    if not all(rows.values()):
        raise ValueError("no token reached the adapter: is it active, and is the text empty?")
    return torch.stack([sums[name] / rows[name] for name in layers]).cpu()


def token_shares(model: nn.Module, input_ids: Tensor, adapter_name: str = "default") -> Tensor:
    """The share of attention that the active prefixes take of each token of a text [1, L]: [layers, H, L]."""
    layers = adapted_layers(model, adapter_name)
    found: dict[str, Tensor] = {}

    def see(name: str) -> Observer:
        def keep(query: Tensor, context: Block, prefix: Block | None, x: Tensor, counts: Tensor) -> None:
            if prefix is not None and prefix.lse.shape[-1] == input_ids.shape[1]:
                found[name] = torch.sigmoid(prefix.lse - context.lse)[0].double()

        return keep

    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    observe(model, layers, [batch], {name: see(name) for name in layers}, adapter_name=adapter_name)
    if not found:
        raise ValueError("no token reached the adapter: is it active, and is the text empty?")
    return torch.stack(list(found.values())).cpu()
