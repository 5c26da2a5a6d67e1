"""The parts of feed-forward blocks put into the weights of their linear layers, and taken out again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .feed_forward import FeedForwardPrefix, Part

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Merged:
    """What one linear layer was before the parts of some adapters went into its weight."""

    weight: nn.Parameter
    before: Tensor  # on the CPU: the way back is exact
    factors: tuple[tuple[Tensor, int], ...]  # those that went in, and their versions then

    @property
    def is_stale(self) -> bool:
        """Whether these were changed since."""
        return any(tensor._version != version for tensor, version in self.factors)

    @torch.no_grad()
    def undo(self) -> None:
        """Give the layer the weight that it had."""
        self.weight.copy_(self.before)


@torch.no_grad()
def merge(part: Part, prefixes: Sequence[FeedForwardPrefix], check_finite: bool) -> Merged:
    """Let the weight of a linear layer become W + sum of Z^T; see `check_mergeable` for which.

    Raises:
        ValueError: if the sum is not finite, and that is to be checked. The weight is as it was then.
    """
    weight: Any = part.last.weight
    Z = sum(prefix.plain_leading().float() @ prefix.plain_scaled().float() for prefix in prefixes)
    assert isinstance(Z, Tensor)
    merged = (weight.float() + (Z if is_transposed(part.last) else Z.mT).to(weight.device)).to(weight.dtype)
    if check_finite and not torch.isfinite(merged).all():
        raise ValueError(f"{part.layer}: the merged weight holds NaN or infinite values")
    factors = [x for prefix in prefixes for x in (prefix.part("Z_A"), prefix.part("Z_B"))]
    record = Merged(weight, weight.detach().to("cpu", copy=True), tuple((x, x._version) for x in factors))
    weight.copy_(merged)
    return record


def check_mergeable(parts: Iterable[Part]) -> None:
    """Raise ValueError if one of these cannot go into a weight; the message says which, and why."""
    for part in parts:
        layer, size = part.last, part.size
        if not part.layer:
            raise ValueError(
                f"the prefix beside a feed-forward block ({type(layer).__name__}) cannot be merged: expected those of "
                "linear layers"
            )
        weight = getattr(layer, "weight", None)
        reason = None
        if isinstance(layer, BaseTunerLayer):
            reason = f"it has other adapters, in a {type(layer).__name__}"
        elif not isinstance(weight, nn.Parameter) or type(weight.data) is not Tensor or weight.dtype not in DTYPES:
            reason = "its weight is quantised or spread over processes"
        elif weight.is_meta:
            reason = "its weight is offloaded"
        elif tuple(weight.shape) != (size.in_features, size.out_features)[:: 1 if is_transposed(layer) else -1]:
            reason = f"its weight has the shape {tuple(weight.shape)}"
        if reason is not None:
            raise ValueError(f"{part.layer} cannot take its part into its weight: {reason}")


def is_transposed(layer: nn.Module) -> bool:
    """Whether a layer keeps its weight as [in, out]: Conv1D of transformers."""
    return hasattr(layer, "nf")
