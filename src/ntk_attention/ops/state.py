"""The prefix state (Z, k): what is left of a prefix of any length."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .features import FeatureMap, feature_map
from .triton import token_sums

CHUNK_BYTES = 2**20, 2**28  # of the features of one chunk: on a CPU, on a GPU
SMALL = 1e-30  # a sum of features that may have lost tokens
_map = feature_map  # arguments of this name hide the function


@dataclass(frozen=True)
class PrefixState:
    """A prefix of any length as two small tensors (Algorithm 2 of the paper).

    For prefix keys c_i and values u_i it stands for Z = sum_i phi(c_i) u_i^T and k = sum_i phi(c_i). The effective
    tensors are Z e^b and k e^b with b = `log_scale`, so that no exponent of a real head overflows.

    Args:
        Z: [H, r, d_v], floating point.
        k: [H, r], same dtype and device. Positive for maps of positive features; the signed monomials of
            `taylor` take any sign, but the sum over their first feature, the number of tokens, must be positive.
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

    @classmethod
    def from_prefix(
        cls,
        keys: Tensor,
        values: Tensor,
        feature_map: str | FeatureMap = "taylor",
        *,
        scale: float | None = None,
        chunk_size: int | None = None,
    ) -> "PrefixState":
        """The state of a given prefix: Z = sum_i phi(c_i) u_i^T and k = sum_i phi(c_i) (section 4 of the paper).

        It stands for the prefix as well as phi(q).phi(c) stands for exp(scale q.c). A longer prefix comes in parts:
        `update` adds tokens, `+` joins two states, `all_reduce` those of several processes.

        Args:
            keys: c [H, m, d], m >= 1, as attention would see them: after any position encoding.
            values: u [H, m, d_v].
            feature_map: a name or a map, without the constant feature, which is not a sum over tokens.
            scale: of the logits, d^-1/2 by default.
            chunk_size: tokens whose features are in memory at once; by default as many as a cache or, on a GPU, one
                launch of each kernel can make good use of.

        Returns:
            A state with H heads in float32, or in float64 for float64 keys.

        Raises:
            ValueError: if shapes do not fit, a value is not finite, or the map has the constant feature or does not
                make states that stand for tokens.
        """
        check_tokens(keys, values)
        made = _map(feature_map).bind(keys.shape[-1])
        if made.constant:
            raise ValueError(f"a state of given tokens needs a map without the constant feature, got {made!r}")
        if not made.stands_for_tokens:
            raise ValueError(f"sums over tokens say nothing with the map {made.name!r}: fit the state instead")
        made = copy.deepcopy(made).to(keys.device)
        H, r, d_v = keys.shape[0], made.num_features(keys.shape[-1]), values.shape[-1]
        dtype = torch.promote_types(keys.dtype, torch.float32)
        nothing = cls.trusted(
            Z=torch.zeros(H, r, d_v, dtype=dtype, device=keys.device),
            k=torch.zeros(H, r, dtype=dtype, device=keys.device),
            log_scale=torch.full((H,), -math.inf, dtype=dtype, device=keys.device),
            feature_map=made,
        )
        return nothing.update(keys, values, scale=scale, chunk_size=chunk_size)

    def update(
        self, keys: Tensor, values: Tensor, *, scale: float | None = None, chunk_size: int | None = None
    ) -> "PrefixState":
        """The state with more tokens at the end of its prefix; arguments and errors as in `from_prefix`."""
        check_tokens(keys, values)
        H, m, d = keys.shape
        if self.num_heads != H or values.shape[-1] != self.Z.shape[-1]:
            raise ValueError(
                f"the state has {self.num_heads} heads and values of size {self.Z.shape[-1]}, got keys "
                f"{list(keys.shape)} and values {list(values.shape)}"
            )
        if self.num_features != self.feature_map.num_features(d):
            raise ValueError(
                f"the state has r = {self.num_features} features, but {self.feature_map.name!r} makes "
                f"{self.feature_map.num_features(d)} of keys of size {d}"
            )
        factor = (d**-0.5 if scale is None else scale) ** 0.5
        if chunk_size is None and token_sums.covers(keys, values, self.feature_map):
            Z, k = token_sums.elu_sums(keys, values, factor)
            if (k.amax(dim=1) > SMALL).all():  # else every feature of some head is tiny, and needs its scale
                return self + self._rebuilt(Z, k, torch.zeros_like(k[:, 0]))
        if chunk_size is None:
            chunk_size = max(1, CHUNK_BYTES[keys.is_cuda] // (4 * H * max(self.num_features, d)))
        # Sums over chunks are kept in float64: the rounding of millions of additions would show in float32.
        Z, k, b = self.Z.double(), self.k.double(), self.log_scale.double()
        for start in range(0, m, chunk_size):
            part = slice(start, start + chunk_size)
            features, log_scale = self.feature_map.scaled(keys[:, part].to(self.Z.dtype) * factor)
            peak = torch.maximum(b, log_scale.amax(dim=1).double())  # no exponent below is positive
            features = features * torch.exp(log_scale - peak[:, None].to(log_scale.dtype))[..., None]
            carried = torch.exp(b - peak)
            Z = Z * carried[:, None, None] + features.transpose(1, 2) @ values[:, part].to(features.dtype)
            k = k * carried[:, None] + features.sum(dim=1, dtype=torch.float64)
            b = peak
        return self._rebuilt(Z, k, b)

    def __add__(self, other: "PrefixState") -> "PrefixState":
        """The state of two prefixes one after another."""
        if not isinstance(other, PrefixState):
            return NotImplemented
        if self.Z.shape != other.Z.shape or not same_map(self.feature_map, other.feature_map):
            raise ValueError(
                f"only states of one shape and feature map add: got Z {list(self.Z.shape)} with {self.feature_map!r} "
                f"and Z {list(other.Z.shape)} with {other.feature_map!r}"
            )
        peak = torch.maximum(self.log_scale, other.log_scale).double()
        (Z1, k1), (Z2, k2) = (state._at_scale(peak) for state in (self, other))
        return self._rebuilt(Z1 + Z2, k1 + k2, peak)

    def weighted(self, log_weight: float) -> "PrefixState":
        """The state with every token of its prefix counted e^log_weight times."""
        return PrefixState.trusted(self.Z, self.k, self.log_scale + log_weight, self.feature_map)

    def all_reduce(self, group: Any = None) -> "PrefixState":
        """The state of a prefix that is spread over the processes of a group; every process gets the same."""
        peak = self.log_scale.to(torch.float64, copy=True)  # reduced in place
        dist.all_reduce(peak, dist.ReduceOp.MAX, group)
        Z, k = (x.contiguous() for x in self._at_scale(peak))  # summed in the order of the memory
        for x in (Z, k):
            dist.all_reduce(x, dist.ReduceOp.SUM, group)
        return self._rebuilt(Z, k, peak)

    def _at_scale(self, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        """Z and k in float64 in units of e^log_scale."""
        factor = torch.exp(self.log_scale.double() - log_scale)
        return self.Z.double() * factor[:, None, None], self.k.double() * factor[:, None]

    def _rebuilt(self, Z: Tensor, k: Tensor, log_scale: Tensor) -> "PrefixState":
        """Sums in float64 as a state of this dtype."""
        if not self.feature_map.is_signed:  # a feature that is tiny for all tokens stays positive
            k = k.clamp_min(torch.finfo(self.Z.dtype).tiny)
        Z, k, log_scale = (x.to(self.Z.dtype) for x in (Z, k, log_scale))
        return PrefixState(Z, k, log_scale, self.feature_map)

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
            x = getattr(self, name)
            if not x.is_floating_point():
                raise ValueError(f"{name} must be floating point, got {x.dtype}")
            if x.device != self.Z.device:
                raise ValueError(f"a state lies on one device, got Z on {self.Z.device} and {name} on {x.device}")

    def _check_values(self) -> None:
        for name in ("Z", "k", "log_scale"):
            if not torch.isfinite(getattr(self, name)).all():
                raise ValueError(f"{name} holds NaN or infinite values")
        positive = self.k[:, :1] if self.feature_map.is_signed else self.k
        if not (positive > 0).all():
            raise ValueError(
                f"k must be positive for the feature map {self.feature_map.name!r}, got a minimum of "
                f"{positive.min().item():.3g}: it is the normaliser phi(q).k of the prefix"
            )


@dataclass(frozen=True)
class RowStates:
    """A prefix for every row of a batch: a stack of states and, for each row, the place of its state in the stack.

    Attention reads all tensors anew in every call, also in one that is replayed from a CUDA graph: what is copied into
    them in place counts from then on.

    Args:
        Z: [A, H, r, d_v], floating point, of A states.
        k: [A, H, r].
        log_scale: b [A, H].
        feature_map: that of all states.
        index: int32 [B], from 0 to A - 1, or -1 for a row without a prefix, which is plain attention. Values outside
            are not looked for: on a GPU a kernel would read whatever memory is there.

    Raises:
        ValueError: if shapes do not fit each other, index is not int32 [B], or a tensor is on another device.
    """

    Z: Tensor
    k: Tensor
    log_scale: Tensor
    feature_map: FeatureMap
    index: Tensor

    def __post_init__(self) -> None:
        Z, k, b, index = self.Z, self.k, self.log_scale, self.index
        if Z.dim() != 4 or k.shape != Z.shape[:3] or b.shape != Z.shape[:2]:
            raise ValueError(
                f"a stack of states needs Z [A, H, r, d_v], k [A, H, r] and log_scale [A, H], got {list(Z.shape)}, "
                f"{list(k.shape)} and {list(b.shape)}"
            )
        if index.dim() != 1 or index.dtype != torch.int32 or index.device != Z.device:
            raise ValueError(
                f"index must be int32 [B] on {Z.device}, got {index.dtype} {list(index.shape)} on {index.device}"
            )
        for name, x in (("k", k), ("log_scale", b)):
            if x.device != Z.device:
                raise ValueError(f"a stack lies on one device, got Z on {Z.device} and {name} on {x.device}")

    @classmethod
    def stack(cls, states: Sequence[PrefixState], index: Tensor) -> "RowStates":
        """Copies of the states in one stack.

        Raises:
            ValueError: if the states differ in shape or feature map, or there are none; and as for the class.
        """
        if not states:
            raise ValueError("a stack needs at least one state, got none")
        first = states[0]
        for state in states[1:]:
            if state.Z.shape != first.Z.shape or not same_map(state.feature_map, first.feature_map):
                raise ValueError(
                    f"the rows of a batch need states of one shape and feature map: got Z {list(first.Z.shape)} with "
                    f"{first.feature_map!r} and Z {list(state.Z.shape)} with {state.feature_map!r}"
                )
        Z, k, b = (torch.stack([getattr(s, name) for s in states]) for name in ("Z", "k", "log_scale"))
        return cls(Z, k, b, first.feature_map, index)

    def of_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Copies for every row: Z [B, H, r, d_v], k [B, H, r] and log_scale [B, H], which is -inf without a prefix."""
        Z, k, b = (x.index_select(0, self.index.clamp_min(0)) for x in (self.Z, self.k, self.log_scale))
        return Z, k, b.masked_fill((self.index < 0)[:, None], -math.inf)

    @property
    def num_heads(self) -> int:
        return self.Z.shape[1]

    @property
    def num_features(self) -> int:
        return self.Z.shape[2]


def same_map(first: FeatureMap, second: FeatureMap) -> bool:
    """Whether two maps make the same features."""
    if (first.name, first.options, first.constant) != (second.name, second.options, second.constant):
        return False
    tensors = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b.to(a)) for a, b in tensors)


def check_tokens(keys: Tensor, values: Tensor) -> None:
    """Raise ValueError unless keys [H, m, d] and values [H, m, d_v] are a prefix, m >= 1, of finite values."""
    if keys.dim() != 3 or values.dim() != 3 or keys.shape[:2] != values.shape[:2]:
        raise ValueError(
            f"a prefix needs keys [H, m, d] and values [H, m, d_v], got {list(keys.shape)} and {list(values.shape)}"
        )
    if keys.shape[1] == 0:
        raise ValueError("a prefix needs at least one token, got m = 0")
    if keys.numel() == 0 or values.numel() == 0:
        raise ValueError(
            f"expected at least one head and sizes of at least one, got keys {list(keys.shape)} and values "
            f"{list(values.shape)}"
        )
    if keys.device != values.device:
        raise ValueError(f"keys and values must be on one device, got {keys.device} and {values.device}")
    for name, x in (("keys", keys), ("values", values)):
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
        if not torch.isfinite(torch.stack(torch.aminmax(x))).all():  # one pass over x, and no copy
            raise ValueError(f"{name} hold NaN or infinite values")
