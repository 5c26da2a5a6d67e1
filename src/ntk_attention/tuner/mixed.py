"""Batches whose rows have adapters of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..ops.state import RowStates
from .calls import MixedRows
from .feed_forward import FeedForwardRows
from .layer import NTKAttentionLayer

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
        self.indices: dict[torch.device, torch.Tensor] = {}  # one for all layers of a device
        for layer in layers:
            states = layer.stack(self.adapters)
            if states:
                device = states[0].Z.device
                on_device = self.indices.setdefault(device, index.to(device))
                self.rows[layer] = RowStates.stack(states, on_device)
                blocks = [layer[name].feed_forward if name in layer else None for name in self.adapters]
                if any(block is not None for block in blocks):
                    self.feed_forward_rows[layer] = FeedForwardRows.stack(blocks, on_device)

    def assign(self, adapter_names: Sequence[str]) -> None:
        """Give the rows other adapters, out of those whose states are here.

        Raises:
            ValueError: if there are more or fewer names than rows, or others.
        """
        index = self._index(adapter_names)
        for on_device in self.indices.values():
            if len(on_device) != len(index):
                raise ValueError(f"adapter_names has {len(index)} names for {len(on_device)} rows: expected as many")
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
                block = layer[adapter_name].feed_forward
                if block is not None:
                    self.feed_forward_rows[layer].put(place, block)

    def _index(self, adapter_names: Sequence[str]) -> torch.Tensor:
        places = {NO_ADAPTER: -1} | {name: i for i, name in enumerate(self.adapters)}
        if unknown := sorted(set(adapter_names) - set(places)):
            raise ValueError(f"adapter_names holds {unknown}, expected names of {self.adapters} or {NO_ADAPTER!r}")
        return torch.tensor([places[name] for name in adapter_names], dtype=torch.int32)


def copies_of_rows(model: nn.Module, arguments: dict[str, Any]) -> frozenset[int]:
    """How many rows `generate` may make of each: for beams, for several answers, with Whisper for beams of each."""
    config = arguments.get("generation_config") or getattr(model, "generation_config", None)
    names = ("num_beams", "num_return_sequences")
    beams, answers = (arguments.get(name) or getattr(config, name, None) or 1 for name in names)
    return frozenset({1, beams, answers, beams * answers})
