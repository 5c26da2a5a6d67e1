"""Batches whose rows have adapters of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ..ops.state import RowStates
from .calls import CALLS, MixedRows
from .feed_forward import FeedForwardRows
from .layer import NTKAttentionLayer, check_same_positions

# Inputs of towers, and in what the names of their placeholders among the tokens begin.
SIGNALS = {
    "pixel_values": "image",
    "pixel_values_videos": "video",
    "input_features": "audio",
    "input_values": "audio",
}
NO_ADAPTER = "__base__"  # PEFT's name for a row that no adapter is for


class MixedBatch(MixedRows):
    """The rows of a batch and the states of its adapters, made by `NTKAttentionModel.mixed_batch`.

    Both change in place: the next forward pass sees it, and so does the next replay of one that is in a CUDA graph.
    """

    @torch.no_grad()
    def __init__(
        self,
        layers: Sequence[NTKAttentionLayer],
        adapters: Sequence[str],
        adapter_names: Sequence[str],
        copies: frozenset[int],
    ):
        super().__init__(copies=copies)
        self.adapters = list(adapters)
        index = self._index(adapter_names)
        self.index = index
        self.indices: dict[torch.device, torch.Tensor] = {}  # one for all layers of a device
        for layer in layers:
            states = layer.stack(self.adapters)
            if states:
                device = states[0].Z.device
                on_device = self.index_on(device)
                self.rows[layer] = RowStates.stack(states, on_device)
                positions = {name: layer[name].positions for name in self.adapters if name in layer}
                check_same_positions(positions)
                if "free" in positions.values():
                    self.free.add(layer)
                parts = [layer[name].parts if name in layer else {} for name in self.adapters]
                self.feed_forward_rows[layer] = {
                    place: FeedForwardRows.stack([own.get(place) for own in parts], on_device)
                    for place in dict.fromkeys(place for own in parts for place in own)
                }

    def assign(self, adapter_names: Sequence[str]) -> None:
        """Give the rows other adapters, out of those whose states are here.

        Raises:
            ValueError: if there are more or fewer names than rows, or others.
        """
        index = self._index(adapter_names)
        if len(index) != len(self.index):
            raise ValueError(f"adapter_names has {len(index)} names for {len(self.index)} rows: expected as many")
        self.index.copy_(index)
        for on_device in self.indices.values():
            on_device.copy_(index)

    @torch.no_grad()
    def update(self, adapter_name: str) -> None:
        """Copy the state of an adapter again, after its weights have changed.

        Raises:
            ValueError: if its state is not here.
        """
        place = int(self._index([adapter_name])[0])
        for layer, rows in self.rows.items():
            if place >= 0 and adapter_name in layer:
                state = layer[adapter_name].state()
                for name in ("Z", "k", "log_scale"):
                    getattr(rows, name)[place].copy_(getattr(state, name))
                for part_name, part in layer[adapter_name].parts.items():
                    self.feed_forward_rows[layer][part_name].put(place, part)

    def index_on(self, device: torch.device) -> Tensor:
        return self.indices.setdefault(device, self.index.to(device, copy=True))

    def _index(self, adapter_names: Sequence[str]) -> torch.Tensor:
        places = {NO_ADAPTER: -1} | {name: i for i, name in enumerate(self.adapters)}
        if unknown := sorted(set(adapter_names) - set(places)):
            raise ValueError(f"adapter_names holds {unknown}, expected names of {self.adapters} or {NO_ADAPTER!r}")
        return torch.tensor([places[name] for name in adapter_names], dtype=torch.int32)


def copies_of_rows(model: nn.Module, args: Sequence[Any], arguments: dict[str, Any]) -> frozenset[int]:
    """How many rows `generate` may make of each: for beams, for several answers, with Whisper for beams of each.

    What the call does not say comes from the config of the call, the second argument, and what that does not say from
    the model's own.
    """
    configs = [arguments.get("generation_config"), *args[1:2], getattr(model, "generation_config", None)]
    values = [arguments, *(c if isinstance(c, dict) else getattr(c, "__dict__", {}) for c in configs)]

    def value(name: str) -> int:
        return next((x for found in values if (x := found.get(name)) is not None), 1)

    beams, answers = value("num_beams"), value("num_return_sequences")
    return frozenset({1, beams, answers, beams * answers})


def names_of_rows(adapter_names: Any) -> list[str]:
    """The names, of which a call may have got anything.

    Raises:
        ValueError: if it is no list of names.
    """
    if not isinstance(adapter_names, list | tuple) or not all(isinstance(name, str) for name in adapter_names):
        raise ValueError(f"adapter_names must be a list of names, one for each row of the batch, got {adapter_names!r}")
    return list(adapter_names)


def check_rows_stay(model: nn.Module, names: Sequence[str], arguments: dict[str, Any]) -> None:
    """Raise ValueError for a call in which Whisper drops rows, so that names would be those of others."""
    sound = arguments.get("input_features")
    if len(names) < 2 or sound is None or not hasattr(model, "generate_with_fallback"):
        return
    config: Any = model.config
    frames = 2 * config.max_source_positions
    if sound.shape[-1] > frames:
        raise ValueError(
            f"adapter_names has {len(names)} names for sound of {sound.shape[-1]} frames, and {type(model).__name__} "
            f"drops finished rows from such a batch: expected one row, or at most {frames} frames"
        )
    if isinstance(arguments.get("temperature"), list | tuple):
        raise ValueError(
            f"adapter_names has {len(names)} names for a list of temperatures, with which {type(model).__name__} runs "
            "some rows again without the others: expected one row, or one temperature"
        )


def hook_heads(model: nn.Module, adapters: Iterable[str]) -> None:
    """Let modules that were trained beside adapters look at the rows of mixed batches, from here on.

    PEFT makes them after the adapters, and knows rows only from hooks that last for one call, which other threads see.
    """
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    for module in wrappers:
        is_own = any(name in module.modules_to_save for name in adapters)
        if is_own and heads_of_rows not in module._forward_hooks.values():
            module.register_forward_hook(heads_of_rows, with_kwargs=True)


def heads_of_rows(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """After a call of such a module: for every row the output of its own adapter's, or of the base's.

    All are computed for all rows, so that nothing waits for the device and a CUDA graph sees other rows.
    """
    batch = CALLS.mixed
    if not isinstance(module, ModulesToSaveWrapper) or not isinstance(batch, MixedBatch) or module.disable_adapters:
        return None
    heads = [(i, name) for i, name in enumerate(batch.adapters) if name in module.modules_to_save]
    if not heads:
        return None
    out = module.original_module(*args, **kwargs)
    if not isinstance(out, Tensor):
        raise ValueError(
            f"modules_to_save holds a {type(module.original_module).__name__}, which returns {type(out).__name__}: "
            "expected a tensor in a mixed batch"
        )
    kind = type(module.original_module).__name__
    index = batch.index_of_batch(batch.index_on(out.device), len(out), kind)
    index = index.view(-1, *[1] * (out.dim() - 1))
    for place, name in heads:
        out = torch.where(index == place, module.modules_to_save[name](*args, **kwargs), out)
    return out


def check_signals(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a call of the model: raise ValueError where towers would give rows the adapters of others.

    A tower gets pictures one after another, whichever row they are of. As many as rows need not be one for each.
    """
    batch = CALLS.mixed
    ids = kwargs.get("input_ids", args[0] if args else None)
    given = [name for name in SIGNALS if isinstance(kwargs.get(name), Tensor)]
    if torch.compiler.is_compiling() or batch is None or not given or not isinstance(ids, Tensor):
        return
    if not has_tower(model, batch):
        return
    for name in given:
        signal, kind = kwargs[name], SIGNALS[name]
        config = getattr(model, "config", None)
        token = next(
            (x for end in ("id", "index") if (x := getattr(config, f"{kind}_token_{end}", None)) is not None), None
        )
        counts = [] if token is None else (ids == token).flatten(1).sum(dim=1).tolist()
        if not any(counts):
            continue
        # Sound and pictures of other sizes have other numbers of tokens.
        is_one_each = len(signal) == len(counts) and signal.dim() < 5
        if not all(counts) or (len(set(counts)) > 1 and not is_one_each):
            raise ValueError(
                f"{name} beside adapter_names, but the rows have {counts} {kind} tokens: expected as many in each: "
                'towers see the batch without its rows. Leave them out, for example by exclude_modules=["vision_tower"]'
            )


def has_tower(model: nn.Module, batch: MixedRows) -> bool:
    """Whether some layers of the batch are outside of the model of the text."""
    try:
        text: Any = model.get_decoder()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        text = None
    inside = set(text.modules()) if isinstance(text, nn.Module) and text is not model else set()
    return any(layer not in inside for layer in batch.rows)
