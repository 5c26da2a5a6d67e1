"""The prefix state (Z, k): what is left of a prefix of any length."""

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .features import FeatureMap, feature_map


@dataclass(frozen=True)
class PrefixState:
    """A prefix of any length as two small tensors (Algorithm 2 of the paper).

    For prefix keys c_i and values u_i it stands for Z = sum_i phi(c_i) u_i^T and k = sum_i phi(c_i). The effective
    tensors are Z e^b and k e^b with b = `log_scale`, so that no exponent of a real head overflows.

    Args:
        Z: [H, r, d_v], floating point.
        k: [H, r], same dtype and device. Positive for the positive maps (`elu`, `positive_random`); the signed
            monomials of `taylor` take any sign, but the sum over their first feature, the number of tokens, must be
            positive.
        log_scale: b [H]; zeros by default.
        feature_map: a name or a `FeatureMap`.

    Raises:
        ValueError: if shapes do not fit each other, a value is not finite, or k is not positive where it must be.
    """

    Z: Tensor
    k: Tensor
    log_scale: Tensor = None  # type: ignore[assignment]  # zeros by default
    feature_map: FeatureMap = "elu"  # type: ignore[assignment]  # a name becomes a map

    def __post_init__(self) -> None:
        object.__setattr__(self, "feature_map", feature_map(self.feature_map))
        if self.log_scale is None:
            object.__setattr__(self, "log_scale", torch.zeros_like(self.k[..., 0]))
        self._check_shapes()
        if not torch.compiler.is_compiling() and self.Z.device.type != "meta":
            self._check_values()

    @classmethod
    def trusted(cls, Z: Tensor, k: Tensor, log_scale: Tensor, feature_map: FeatureMap) -> "PrefixState":
        """Without the checks, which read every value: for states that are made anew in each training step."""
        state = object.__new__(cls)
        for name, value in (("Z", Z), ("k", k), ("log_scale", log_scale), ("feature_map", feature_map)):
            object.__setattr__(state, name, value)
        return state

    @property
    def num_heads(self) -> int:
        return self.Z.shape[0]

    @property
    def num_features(self) -> int:
        """r, the number of features, the constant one included."""
        return self.Z.shape[1]

    def to(self, *args: Any, **kwargs: Any) -> "PrefixState":
        """The state on another device or in another dtype, like `Tensor.to`."""
        return replace(
            self,
            Z=self.Z.to(*args, **kwargs),
            k=self.k.to(*args, **kwargs),
            log_scale=self.log_scale.to(*args, **kwargs),
            feature_map=copy.deepcopy(self.feature_map).to(*args, **kwargs),
        )

    def _check_shapes(self) -> None:
        H, r = self.k.shape if self.k.dim() == 2 else (None, None)
        if self.Z.dim() != 3 or tuple(self.Z.shape[:2]) != (H, r):
            raise ValueError(
                f"a state needs Z [H, r, d_v] and k [H, r], got Z {list(self.Z.shape)} and k {list(self.k.shape)}"
            )
        if tuple(self.log_scale.shape) != (H,):
            raise ValueError(f"log_scale must be [H] = [{H}], got {list(self.log_scale.shape)}")
        for name in ("Z", "k", "log_scale"):
            if not getattr(self, name).is_floating_point():
                raise ValueError(f"{name} must be floating point, got {getattr(self, name).dtype}")

    def _check_values(self) -> None:
        for name in ("Z", "k", "log_scale"):
            if not torch.isfinite(getattr(self, name)).all():
                raise ValueError(f"{name} holds NaN or infinite values")
        positive = self.k[:, :1] if self.feature_map.name == "taylor" else self.k
        if not (positive > 0).all():
            raise ValueError(
                f"k must be positive for the feature map {self.feature_map.name!r}, got a minimum of "
                f"{positive.min().item():.3g}: it is the normaliser phi(q).k of the prefix"
            )
