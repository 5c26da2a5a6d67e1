"""Feature maps phi: R^d -> R^r with phi(x).phi(y) standing for exp(x.y).

A map acts on ``x = sqrt(scale) * query`` (and on ``sqrt(scale) * key`` when a state is built), so that
phi(q).phi(c) stands for exp(scale * q.c), whatever the scale of the model.

exp overflows easily, so every map returns its features in two parts, ``phi(x) = exp(row_scale) * features``, with one
log scale per row. The two parts are exact together: no logit is too large and none is rounded to zero too early.
"""

import math
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn


class ScaledFeatures(NamedTuple):
    """phi(x) = exp(row_scale)[..., None] * features."""

    features: Tensor  # [..., r]
    row_scale: Tensor  # [...], a constant for autograd: only the product of both parts has a meaning


class Monomials(NamedTuple):
    """Those of degree g in (1, x), the number 1 being variable 0: sorted tuples of g variables, r of them."""

    steps: list[tuple[Tensor, Tensor]]  # degree by degree: which monomial of the degree before, times which variable
    coefficient: Tensor  # [r], 1 / sqrt(a!)
    is_even: Tensor  # bool [r], all exponents of x are even


class FeatureMap(nn.Module):
    """Base class of the feature maps.

    Args:
        constant: append the feature 1, which lets a centred state fold back into plain (Z, k).
    """

    name: str
    stands_for_tokens = True  # whether sums over the tokens of a prefix make a state that stands for it
    is_signed = False  # whether features may be negative; then `nonnegative` says which are not
    kernel: str | None = None  # by which name the kernels know the map, if they do; not inherited

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.kernel = cls.__dict__.get("kernel")

    def __init__(self, *, constant: bool = False):
        super().__init__()
        if not isinstance(constant, bool):
            raise ValueError(f"constant must be True or False, got {constant!r}")
        self.constant = constant
        self.options: dict[str, Any] = {}

    def num_features(self, head_dim: int) -> int:
        """r as a function of d, the constant feature included."""
        return self._num_features(head_dim) + self.constant

    def nonnegative(self, head_dim: int) -> Tensor:
        """Which features are >= 0 for every x: bool [r]. Only these may carry the normaliser of a trained state."""
        own = self._nonnegative(head_dim)
        return torch.cat([own, own.new_ones(1)]) if self.constant else own

    def constant_index(self, num_features: int) -> int | None:
        """Which of the r features is the number 1; None without one."""
        return num_features - 1 if self.constant else None

    def scaled(self, x: Tensor) -> ScaledFeatures:
        """The features of x [..., d] in two parts, in the dtype of x (float32 or float64)."""
        features, row_scale = self._scaled(x)
        if self.constant:
            # The constant is exp(-row_scale) in units of the row's scale: keep that from overflowing.
            lifted = row_scale.clamp_min(0.0)
            features = features * torch.exp(row_scale - lifted)[..., None]
            features = torch.cat([features, torch.exp(-lifted)[..., None]], dim=-1)
            row_scale = lifted
        return ScaledFeatures(features, row_scale)

    def forward(self, x: Tensor) -> Tensor:
        """phi(x) [..., r] itself: for reading and for tests; it may overflow where `scaled` does not."""
        features, row_scale = self.scaled(x)
        return features * torch.exp(row_scale)[..., None]

    def bind(self, head_dim: int) -> "FeatureMap":
        """Draw what depends on d (only random maps hold such a tensor); called before the first use."""
        return self

    def stored_shapes(self, head_dim: int) -> dict[str, tuple[int, ...]]:
        """The tensors that a bound map keeps in files."""
        return {}

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in {**self.options, "constant": self.constant}.items())

    def _num_features(self, head_dim: int) -> int:
        raise NotImplementedError

    def _nonnegative(self, head_dim: int) -> Tensor:
        return torch.ones(self._num_features(head_dim), dtype=torch.bool)

    def _scaled(self, x: Tensor) -> ScaledFeatures:
        raise NotImplementedError


class Elu(FeatureMap):
    """phi(x) = elu(x) + 1, r = d: the map of the published implementation.

    It is exp(x) for x < 0 and x + 1 above. phi(x).phi(y) is far from exp(x.y), so that a state of given tokens stands
    for them loosely (the published code makes one so); it is cheap, positive and trains well.
    """

    name = kernel = "elu"

    def _num_features(self, head_dim: int) -> int:
        return head_dim

    def _scaled(self, x: Tensor) -> ScaledFeatures:
        row_scale = x.detach().amax(dim=-1).clamp_max(0.0)  # below zero only where every feature is exp(x_i)
        # elu(x) + 1 would cancel to 0 below -17 in float32; exp(x) does not. The slope at zero is one, which clamp_max
        # has given up in torch 2.14.
        features = torch.exp(torch.where(x > 0, 0.0, x) - row_scale[..., None]) + torch.relu(x)
        return ScaledFeatures(features, row_scale)


class Taylor(FeatureMap):
    """All monomials of degree <= g, merged, so that phi(x).phi(y) = sum_{j <= g} (x.y)^j / j!; r = C(d + g, g).

    Section 4 of the paper (Theorem 4.1) by the polynomial method. The monomial x^a has the coefficient 1 / sqrt(a!),
    since (x.y)^j = sum_{|a| = j} (j! / a!) x^a y^a. Even degrees keep the polynomial positive, hence the normaliser.

    Args:
        degree: g, even and positive.
    """

    name = "taylor"
    is_signed = True

    def __init__(self, degree: int = 2, *, constant: bool = False):
        super().__init__(constant=constant)
        if isinstance(degree, bool) or not isinstance(degree, int) or degree < 2 or degree % 2:
            raise ValueError(
                f"taylor needs an even degree >= 2, got {degree!r}: an odd one can make the normaliser negative"
            )
        self.degree = degree
        self.options = {"degree": degree}
        self._monomials: dict[tuple[int, torch.device], Monomials] = {}

    def _num_features(self, head_dim: int) -> int:
        return math.comb(head_dim + self.degree, self.degree)

    def _nonnegative(self, head_dim: int) -> Tensor:
        return self._tables(head_dim, torch.device("cpu")).is_even

    def constant_index(self, num_features: int) -> int:
        appended = super().constant_index(num_features)
        return 0 if appended is None else appended  # the monomial of degree 0

    def _tables(self, head_dim: int, device: torch.device) -> "Monomials":
        if (head_dim, device) not in self._monomials:
            variables = torch.combinations(torch.arange(head_dim + 1), self.degree, with_replacement=True)
            run = torch.ones(len(variables), dtype=torch.long)  # how often the current variable has stood in a row
            factorial = torch.ones(len(variables), dtype=torch.float64)
            for j in range(1, self.degree):
                run = torch.where(variables[:, j] == variables[:, j - 1], run + 1, 1)
                factorial *= torch.where(variables[:, j] > 0, run, 1)
            steps = []
            for degree in range(1, self.degree + 1):
                # Sorted tuples in lexicographic order: those that begin alike stand together.
                tuples = torch.combinations(torch.arange(head_dim + 1), degree, with_replacement=True)
                begins = torch.ones(len(tuples), dtype=torch.bool)
                begins[1:] = (tuples[1:, :-1] != tuples[:-1, :-1]).any(dim=1)
                parent = torch.cumsum(begins, dim=0) - 1
                steps.append((parent.to(device), tuples[:, -1].to(device)))
            # Sorted and even in number: all exponents are even when the variables stand in equal pairs.
            is_even = (variables[:, 0::2] == variables[:, 1::2]).all(dim=1)
            self._monomials[head_dim, device] = Monomials(steps, factorial.rsqrt().to(device), is_even.to(device))
        return self._monomials[head_dim, device]

    def _scaled(self, x: Tensor) -> ScaledFeatures:
        steps, coefficient, _ = self._tables(x.shape[-1], x.device)
        # phi is homogeneous of degree g in (1, x): divide by t >= 1 and carry g log t in the log scale.
        t = x.detach().abs().amax(dim=-1, keepdim=True).clamp_min(1.0)
        one_x = torch.cat([torch.ones_like(t), x], dim=-1) / t
        features = torch.ones_like(t)
        for parent, variable in steps:
            features = features[..., parent] * one_x[..., variable]
        return ScaledFeatures(features * coefficient.to(x.dtype), self.degree * torch.log(t.squeeze(-1)))


class PositiveRandom(FeatureMap):
    """Orthogonal positive random features: phi_i(x) = exp(w_i.x - |x|^2 / 2) / sqrt(r), unbiased for exp(x.y).

    Choromanski et al. 2021 (arXiv 2009.14794), FAVOR+. The directions w_i are drawn from `seed` in float64 and are
    stored with the state.

    Args:
        num_features: r; 4 d by default.
        seed: of the directions.
    """

    name = kernel = "positive_random"

    def __init__(self, num_features: int | None = None, seed: int = 0, *, constant: bool = False):
        super().__init__(constant=constant)
        if num_features is not None and (type(num_features) is not int or num_features < 1):
            raise ValueError(f"positive_random needs num_features >= 1, got {num_features!r}")
        if type(seed) is not int or not 0 <= seed < 2**63:
            raise ValueError(f"positive_random needs a seed from 0 to 2^63 - 1, got {seed!r}")
        self.size = num_features
        self.seed = seed
        self.options = {"num_features": num_features, "seed": seed}
        self.projection: Tensor | None
        self.register_buffer("projection", None)  # [r, d]

    def _num_features(self, head_dim: int) -> int:
        return self.size if self.size is not None else 4 * head_dim

    def stored_shapes(self, head_dim: int) -> dict[str, tuple[int, ...]]:
        return {"projection": (self._num_features(head_dim), head_dim)}

    def bind(self, head_dim: int) -> "PositiveRandom":
        if self.projection is None:
            projection = orthogonal_gaussian(self._num_features(head_dim), head_dim, self.seed)
            self.projection = projection.to(torch.get_default_dtype())
        elif self.projection.shape[-1] != head_dim:
            raise ValueError(
                f"this positive_random map was drawn for head_dim {self.projection.shape[-1]}, got {head_dim}"
            )
        return self

    def _scaled(self, x: Tensor) -> ScaledFeatures:
        projection = cast(Tensor, self.bind(x.shape[-1]).projection)
        logits = x @ projection.to(x).T - 0.5 * x.square().sum(dim=-1, keepdim=True)
        peak = logits.detach().amax(dim=-1, keepdim=True)
        return ScaledFeatures(torch.exp(logits - peak), peak.squeeze(-1) - 0.5 * math.log(len(projection)))


class Anchored(PositiveRandom):
    """phi_i(x) = exp(w_i.x): features that peak where chosen keys do, for states that are fitted.

    With w_i = sqrt(scale) c_i a state is a KV cache of the r keys c_i, in which every head has its own weights and
    values. `anchor` takes the keys of a prefix that are looked at most; until then the directions are random.

    Args:
        num_features, seed: as in `PositiveRandom`.
    """

    name = "anchored"
    stands_for_tokens = False

    def _scaled(self, x: Tensor) -> ScaledFeatures:
        projection = cast(Tensor, self.bind(x.shape[-1]).projection)
        logits = x @ projection.to(x).T
        peak = logits.detach().amax(dim=-1, keepdim=True)
        return ScaledFeatures(torch.exp(logits - peak), peak.squeeze(-1))


def orthogonal_gaussian(rows: int, columns: int, seed: int) -> Tensor:
    """Gaussian rows made orthogonal in blocks of `columns`, their lengths kept: float64 [rows, columns]."""
    generator = torch.Generator().manual_seed(seed)
    square = partial(torch.randn, columns, columns, dtype=torch.float64, generator=generator, device="cpu")
    blocks = []
    for _ in range(math.ceil(rows / columns)):
        gaussian = square()
        lengths = square().norm(dim=-1)
        Q, R = torch.linalg.qr(gaussian)
        # Without the signs of R, which LAPACK fixes, Q would not be uniform over rotations and the features biased.
        blocks.append(Q * R.diagonal().sign() * lengths[:, None])
    return torch.cat(blocks)[:rows]


FEATURE_MAPS: dict[str, type[FeatureMap]] = {cls.name: cls for cls in (Elu, Taylor, PositiveRandom, Anchored)}


def feature_map(name: str | FeatureMap, **options: Any) -> FeatureMap:
    """Make a feature map by name, e.g. ``feature_map("taylor", degree=4)``; a map passes through unchanged.

    Args:
        name: one of `FEATURE_MAPS`, or a `FeatureMap` (then without options).
        options: of that map; every map also takes ``constant=True``.

    Raises:
        ValueError: if the name or an option is unknown, or an option's value does not fit.
    """
    if isinstance(name, FeatureMap):
        if options:
            raise ValueError(f"options {sorted(options)} were given together with a ready-made map {name!r}")
        return name
    if name not in FEATURE_MAPS:
        raise ValueError(f"unknown feature map {name!r}: expected one of {sorted(FEATURE_MAPS)} or a FeatureMap")
    try:
        return FEATURE_MAPS[name](**options)
    except TypeError as error:
        raise ValueError(f"feature map {name!r} does not take the options {sorted(options)}: {error}") from None
