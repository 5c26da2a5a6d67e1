"""Feature maps against what they stand for: the printed elu + 1, the Taylor polynomial and exp, in fp64."""

import math

import pytest
import torch

from ntk_attention import FeatureMap, feature_map
from ntk_attention.ops.features import FEATURE_MAPS

MAPS = [
    feature_map("elu"),
    feature_map("elu", constant=True),
    feature_map("taylor", degree=2),
    feature_map("taylor", degree=4, constant=True),
    feature_map("positive_random", num_features=24, seed=3),
    feature_map("positive_random", constant=True),
    feature_map("anchored", num_features=24),
]


def points(n, d, size=1.0):
    return size * torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(n + d))


@pytest.mark.parametrize("phi", MAPS, ids=repr)
@pytest.mark.parametrize("d", [1, 3, 8])
def test_size_and_signs(phi, d):
    if phi.name in ("positive_random", "anchored"):
        phi = feature_map(phi.name, constant=phi.constant, **phi.options)  # a bound map keeps its d
    features = phi(points(50, d, 3.0))
    assert features.shape == (50, phi.num_features(d))
    nonnegative = phi.nonnegative(d)
    assert nonnegative.shape == (phi.num_features(d),)
    assert (features[:, nonnegative] >= 0).all()
    assert ((features[:, ~nonnegative] < 0).any(dim=0)).all()
    if phi.constant:
        assert torch.allclose(features[:, -1], torch.ones(50, dtype=torch.float64))


@pytest.mark.parametrize(
    ("phi", "d", "r"),
    [("elu", 64, 64), ("taylor", 64, 2145), ("taylor", 128, 8385), ("positive_random", 64, 256)],
)
def test_r_of_d(phi, d, r):
    assert feature_map(phi).num_features(d) == r
    assert feature_map(phi, constant=True).num_features(d) == r + 1


def test_elu_is_exact_for_very_negative_inputs():
    """fp32 against exp(x) in fp64, far below where elu(x) + 1 is 0."""
    phi = feature_map("elu")
    x = torch.tensor([[-1e4, -1e4 + 1, -3e4], [-50.0, -1e-3, 2.0], [0.0, 1e4, -20.0]])
    features, log_scale = phi.scaled(x)
    expected = torch.where(x > 0, torch.log1p(x.double().clamp_min(0)), x.double())
    visible = features > 0
    torch.testing.assert_close((features.log().double() + log_scale[:, None])[visible], expected[visible])
    assert log_scale[0] == -1e4 + 1
    assert features[0, 1] == 1
    assert (torch.nn.functional.elu(x[1:2]) + 1)[0, 0] == 0
    assert features[1, 0] == torch.exp(torch.tensor(-50.0))


@pytest.mark.parametrize("degree", [2, 4, 6])
def test_taylor_is_the_polynomial(degree):
    """phi(x).phi(y) against sum_{j <= g} (x.y)^j / j!, also for large x."""
    phi = feature_map("taylor", degree=degree)
    for size in (0.5, 5.0):
        x, y = points(7, 3, size), points(6, 3, size)
        product = x @ y.T
        expected = sum(product**j / math.factorial(j) for j in range(degree + 1))
        torch.testing.assert_close(phi(x) @ phi(y).T, expected)
        assert (expected > 0).all()


def test_random_features_are_unbiased_for_exp():
    """The mean over seeds against exp(x.y), within five standard errors."""
    x, y = points(4, 8, 0.3), points(5, 8, 0.3)
    maps = (feature_map("positive_random", num_features=16, seed=seed) for seed in range(400))
    estimates = torch.stack([phi(x) @ phi(y).T for phi in maps])
    error = estimates.mean(0) - torch.exp(x @ y.T)
    assert (error.abs() < 5 * estimates.std(0) / 400**0.5).all()


def test_random_features_are_orthogonal_and_seeded():
    first, again, other = (feature_map("positive_random", seed=seed).bind(8).projection for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    block = first[:8].double() @ first[:8].double().T
    assert (block - torch.diag(block.diagonal())).abs().max() < 1e-5


@pytest.mark.parametrize("phi", MAPS, ids=repr)
def test_large_inputs_stay_finite(phi):
    """Both parts and their gradients, in fp32, for |x| up to 10^4."""
    phi = feature_map(phi.name, constant=phi.constant, **phi.options)
    for value in (1e4, -1e4, 0.0):
        x = torch.full((2, 3), value).requires_grad_()
        features, log_scale = phi.scaled(x)
        features.sum().backward()
        assert all(torch.isfinite(t).all() for t in (features, log_scale, x.grad))
        assert features.max() <= max(1.0, abs(value) + 1)


@pytest.mark.parametrize("phi", MAPS, ids=repr)
def test_gradient(phi):
    """phi as a whole, log scale included, against finite differences."""
    phi = feature_map(phi.name, constant=phi.constant, **phi.options)
    for size in (0.3, 2.0):
        assert torch.autograd.gradcheck(phi, points(2, 3, size).requires_grad_())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "cosine",
            {},
            r"unknown feature map 'cosine': expected one of \['anchored', 'elu', 'pos.*, 'taylor'\]",
        ),
        ("elu", {"degree": 2}, r"'elu' does not take the options \['degree'\]"),
        ("taylor", {"degree": 3}, "even degree >= 2, got 3"),
        ("taylor", {"degree": 0}, "even degree >= 2, got 0"),
        ("positive_random", {"num_features": 0}, "num_features >= 1, got 0"),
        (MAPS[0], {"constant": True}, "together with a ready-made map"),
    ],
    ids=str,
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        feature_map(name, **options)


def test_registry():
    assert sorted(FEATURE_MAPS) == ["anchored", "elu", "positive_random", "taylor"]
    assert all(issubclass(cls, FeatureMap) and cls.name == name for name, cls in FEATURE_MAPS.items())
    assert feature_map(MAPS[0]) is MAPS[0]
    with pytest.raises(ValueError, match="drawn for head_dim 3, got 4"):
        feature_map("positive_random").bind(3).bind(4)


def test_directions_do_not_depend_on_the_default_device():
    with torch.device("meta"):
        bound = feature_map("positive_random", num_features=8).bind(4)
    assert torch.equal(bound.projection, feature_map("positive_random", num_features=8).bind(4).projection)


def test_the_slope_of_elu_at_zero_is_one():
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(torch.autograd.grad(feature_map("elu")(x).sum(), x)[0], torch.ones(3, dtype=torch.float64))
