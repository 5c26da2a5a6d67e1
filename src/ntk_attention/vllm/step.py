"""The tokens of one forward pass of an engine: which slot each has, and where it stands in its text.

What is made of them is kept on vLLM's metadata of the pass, which all layers of a kind share and which is made anew for
the next one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

from ..ops.rotation import Rotation
from .slots import Slots

KEPT = "ntk_attention_step"  # the attribute of the metadata


class RotaryTable:
    """What undoes a rotary embedding of vLLM, for every position, and nothing at all in the last row."""

    def __init__(self, embedding: RotaryEmbedding):
        cos, sin = (x[None] for x in embedding.cos_sin_cache.chunk(2, dim=-1))
        rotation = Rotation.of(cos, sin, width=None if embedding.is_neox_style else 2)
        P = rotation.num_pairs
        nothing = (torch.arange(2 * P, device=cos.device) < P).to(rotation.table.dtype)
        self.table = torch.cat([rotation.table[0], nothing[None]])  # [positions + 1, 2 P]
        self.width = rotation.width

    @property
    def last(self) -> int:
        """The row for queries that phi sees as they are."""
        return len(self.table) - 1


class Request(NamedTuple):
    """One text of the pass: its tokens are those from `start` on, at the end of `length` tokens."""

    place: int  # in the batch
    slot: int
    start: int
    end: int
    length: int


class Step:
    """Use `Step.of`.

    Args:
        metadata: of vLLM, for the attention of this pass.
        slots: of the engine.
    """

    def __init__(self, metadata: Any, slots: Slots):
        T = metadata.num_actual_tokens
        self.slots, self.metadata = slots, metadata
        self.rows: Tensor = slots.of_tokens(T)  # int32 [T], the slot of each token, -1 for the base model
        self.tables: dict[RotaryTable, Tensor] = {}
        starts = metadata.query_start_loc
        tokens = torch.arange(T, dtype=starts.dtype, device=starts.device)
        # Behind the last request stand tokens that fill up a recorded graph, which nobody looks at.
        request = torch.searchsorted(starts[1:], tokens, right=True).clamp_max(len(metadata.seq_lens) - 1)
        self.positions = (metadata.seq_lens[request] - starts[request + 1] + tokens).clamp_min(0)  # [T]

    @classmethod
    def of(cls, metadata: Any, slots: Slots) -> Step:
        """That of this metadata, made by the first layer that asks."""
        kept = vars(metadata).get(KEPT)
        if kept is None:
            kept = cls(metadata, slots)
            setattr(metadata, KEPT, kept)
        return kept

    def table(self, rotary: RotaryTable) -> Tensor:
        """What undoes the rotation of each token's query, [T, 2 P]; nothing where its adapter wants it rotated."""
        if rotary not in self.tables:
            is_free = self.slots.free[self.rows.clamp_min(0)]
            row = torch.where(is_free, self.positions.clamp_max(rotary.last - 1), rotary.last)
            self.tables[rotary] = rotary.table.index_select(0, row)
        return self.tables[rotary]

    def requests(self) -> list[Request]:
        """All of them: on a CPU, where reading tensors costs nothing."""
        starts, lengths = self.metadata.query_start_loc.tolist(), self.metadata.seq_lens.tolist()
        slots = self.rows.tolist()
        spans = enumerate(zip(starts[:-1], starts[1:], lengths, strict=False))
        return [Request(i, slots[start], start, end, length) for i, (start, end, length) in spans if end > start]
