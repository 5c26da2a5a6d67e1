"""The arguments of a call, bundled as they belong together.

A bundle is a tuple: `(*tokens, *state)` is the flat list that custom operators and autograd ask for.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from .exact import LayerPrefix
from .features import PositiveRandom
from .rotation import Rotation
from .state import PrefixState, RowStates


class Tokens(NamedTuple):
    """Real tokens and how queries see them, in the order in which torch's kernels take them."""

    query: Tensor  # [B, H, L, d]
    key: Tensor  # [B, H_kv, S, d]
    value: Tensor  # [B, H_kv, S, d_v]
    attn_mask: Tensor | None = None  # broadcastable to [B, H, L, S]: bool, or added to the logits
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float = 1.0  # of the logits


class Prefixes(NamedTuple):
    """What stands before the real tokens, one after another."""

    states: Sequence[PrefixState | RowStates]
    factor: float  # what the query is multiplied by before phi: sqrt(scale), unless the query is scaled already
    exact: LayerPrefix | None = None  # tokens that are all there
    sink: Tensor | None = None  # logit of one more key per head whose value is 0: [H], or [B, H, L]
    rotation: Rotation | None = None  # rotary positions of the query, which phi sees undone

    @property
    def only_state(self) -> PrefixState | RowStates | None:
        """The state, if there is one and nothing else."""
        alone = len(self.states) == 1 and self.exact is None and self.sink is None
        return self.states[0] if alone else None


class StateTensors(NamedTuple):
    """A state as kernels take it."""

    Z: Tensor  # [H, r, d_v], or a stack of states [A, H, r, d_v]; H may be a divisor of the heads of the query
    k: Tensor  # [H, r] or [A, H, r]
    log_scale: Tensor  # b, [H] or [A, H]
    rows: Tensor | None = None  # int32 [B], the place of each row's state in the stack, see `RowStates`
    W: Tensor | None = None  # directions of positive random features [r, d] in float32; None for the map elu
    table: Tensor | None = None  # of the rotary positions that are undone before phi, see `Rotation`
    constant: bool = False  # whether the last feature is the constant 1
    factor: float = 1.0  # what the query is multiplied by before phi
    width: int = 0  # of the runs that its pairs lie in
    start: int = 0  # the first rotated number

    @classmethod
    def of(
        cls, state: PrefixState | RowStates, query: Tensor, factor: float, rotation: Rotation | None = None
    ) -> "StateTensors":
        phi = state.feature_map
        W = None
        if phi.kernel == "positive_random":
            directions = cast(PositiveRandom, phi).bind(query.shape[-1]).projection
            assert directions is not None
            W = directions.to(query.device, torch.float32)
        rows = state.index if isinstance(state, RowStates) else None
        table, width, start = (None, 0, 0) if rotation is None else rotation
        return cls(state.Z, state.k, state.log_scale, rows, W, table, phi.constant, factor, width, start)

    @property
    def rotation(self) -> Rotation | None:
        """What is undone before phi."""
        return None if self.table is None else Rotation(self.table, self.width, self.start)
