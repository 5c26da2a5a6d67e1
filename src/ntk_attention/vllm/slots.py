"""Places for the adapters that vLLM keeps ready, one for each of its LoRA slots, in tensors that stay where they are.

vLLM fills and empties them as it does those of LoRA, by `set_lora` and `reset_lora`. A slot of a LoRA adapter is empty
here, and weighs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.lora.layers.base import BaseLayerWithLoRA
from vllm.lora.lora_weights import LoRALayerWeights

from ..ops.bundles import StateTensors
from ..ops.features import FeatureMap, feature_map
from ..ops.rotation import Rotation
from ..ops.state import PrefixState


@dataclass(frozen=True)
class Share:
    """The heads of the query that this process of a tensor-parallel engine has: `count` of `total`, from `first` on."""

    first: int
    count: int
    total: int

    def of(self, x: Tensor) -> Tensor:
        """These heads of x [H, ...], which may be per KV head."""
        whole = x.repeat_interleave(self.total // len(x), dim=0)
        return whole[self.first : self.first + self.count].contiguous()


class Slots:
    """What slots have in common in all layers.

    Args:
        count: of the slots.
        punica: vLLM's record of which token has which slot.
        device: of the tensors.
    """

    def __init__(self, count: int, punica: Any, device: torch.device):
        self.count = count
        self.punica = punica
        self.device = device
        self.free = torch.zeros(count, dtype=torch.bool, device=device)  # whether phi sees queries without positions

    def of_tokens(self, count: int) -> Tensor:
        """The slots of so many tokens of this pass, int32; -1 for the base model.

        vLLM sets these for passes without adapters, too, in which a recorded graph may run that has prefixes.
        """
        return self.punica._token_lora_indices[:count].int()


class LayerStates(BaseLayerWithLoRA):
    """The states of one attention layer, a place for each slot; phi is elu with the constant feature.

    Args:
        slots: of the engine.
        num_heads: of the query, on this process.
        head_dim: d = d_v.
        dtype: of Z, which is what takes memory; k and b are float32.
    """

    def __init__(self, slots: Slots, num_heads: int, head_dim: int, dtype: torch.dtype):
        super().__init__()
        self.slots = slots
        self.feature_map: FeatureMap = feature_map("elu", constant=True)
        r = self.feature_map.num_features(head_dim)
        A, H, device = slots.count, num_heads, slots.device
        self.register_buffer("Z", torch.zeros(A, H, r, head_dim, dtype=dtype, device=device), persistent=False)
        self.register_buffer("k", torch.zeros(A, H, r, device=device), persistent=False)
        self.register_buffer("log_scale", torch.zeros(A, H, device=device), persistent=False)
        self.filled: set[int] = set()

    def reset_lora(self, index: int) -> None:
        """Empty a slot."""
        self.filled.discard(index)
        for x in (self.Z, self.k, self.log_scale):
            x[index] = 0

    def set_lora(self, index: int, lora_a: Tensor, lora_b: Tensor) -> None:
        """Fill a slot with what `weights` has packed."""
        k, log_scale, is_free = lora_b.split([self.k.shape[-1], 1, 1], dim=-1)
        self.Z[index].copy_(lora_a)
        self.k[index].copy_(k)
        self.log_scale[index].copy_(log_scale[:, 0])
        self.slots.free[index] = is_free[0, 0] > 0
        self.filled.add(index)

    def state(self, index: int) -> PrefixState:
        """The state in a slot."""
        return PrefixState.trusted(self.Z[index], self.k[index], self.log_scale[index], self.feature_map)

    def tensors(self, rows: Tensor, factor: float, rotation: Rotation | None) -> StateTensors:
        """All slots as kernels take them, with the slot of each token, or -1."""
        table, width, start = (None, 0, 0) if rotation is None else rotation
        return StateTensors(self.Z, self.k, self.log_scale, rows, None, table, True, factor, width, start)


def weights(name: str, state: PrefixState, is_free: bool, share: Share) -> LoRALayerWeights:
    """A state as vLLM carries the weights of one of its layers: two tensors, the heads of this process alone.

    Args:
        name: of the layer.
        state: of a whole layer, per query head or per KV head, with the constant feature or without.
        is_free: whether phi sees queries without positions.
        share: of the heads.
    """
    Z, k, log_scale = state.Z, state.k, state.log_scale
    if not state.feature_map.constant:  # a feature that weighs nothing
        Z, k = torch.nn.functional.pad(Z, (0, 0, 0, 1)), torch.nn.functional.pad(k, (0, 1))
    free = torch.full_like(log_scale, float(is_free))
    packed = torch.cat([k, log_scale[:, None], free[:, None]], dim=-1)
    return LoRALayerWeights(name, 1, 1, share.of(Z), share.of(packed), scaling=1)
