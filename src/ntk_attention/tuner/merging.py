"""The parts of feed-forward blocks put into the weights of their linear layers, and taken out again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .feed_forward import FeedForwardPrefix, Part

WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Merged:
    """What one linear layer was before the parts of some adapters went into its weight."""

    weight: nn.Parameter
    before: Tensor  # on the CPU: the way back is exact
    factors: tuple[tuple[Tensor, int | None], ...]  # that went in, and their versions; None of inference mode's tensors

    @property
    def is_stale(self) -> bool:
        """Whether these were changed since; through `.data` leaves no trace, and torch.compile reads no versions."""
        if torch.compiler.is_compiling():
            return False
        return any(version is not None and x._version != version for x, version in self.factors)

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
    exact = torch.promote_types(weight.dtype, torch.float32)
    merged = weight.to(exact)
    for prefix in prefixes:
        Z = prefix.plain_leading().to(weight.device, exact) @ prefix.plain_scaled().to(weight.device, exact)
        merged = merged + (Z if is_transposed(part.last) else Z.mT)
    merged = merged.to(weight.dtype)
    if check_finite and not torch.isfinite(merged).all():
        raise ValueError(f"{part.layer}: the merged weight holds NaN or infinite values")
    factors = [x for prefix in prefixes for x in (prefix.part("Z_A"), prefix.part("Z_B"))]
    versions = tuple((x, None if x.is_inference() else x._version) for x in factors)
    record = Merged(weight, weight.detach().to("cpu", copy=True), versions)
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
        weight: Any = getattr(layer, "weight", None)
        reason = None
        if isinstance(layer, BaseTunerLayer):
            reason = f"it has other adapters, in a {type(layer).__name__}"
        elif type(getattr(weight, "data", None)) is not Tensor or weight.dtype not in WEIGHT_DTYPES:
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
