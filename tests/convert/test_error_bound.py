"""The a-priori error bound: it always holds, it is nearly reached, and degrees are chosen by it."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ntk_attention import PrefixState, feature_map, ntk_attention
from ntk_attention.convert import choose_degree, taylor_error_bound
from ntk_attention.convert.error_bound import log_ratio


def prefix_attention(query, key, value, keys, values, is_causal):
    L, m = query.shape[2], keys.shape[2]
    logits = query @ torch.cat([keys, key], dim=2).transpose(-1, -2) * query.shape[-1] ** -0.5
    if is_causal:
        logits = logits.masked_fill(~torch.ones(L, m + L, dtype=torch.bool).tril(m), -math.inf)
    return torch.softmax(logits, dim=-1) @ torch.cat([values, value], dim=2)


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 2**20),
    m=st.integers(1, 300),
    L=st.integers(1, 9),
    d=st.integers(1, 6),
    degree=st.sampled_from((2, 4, 6, 8)),
    bound=st.floats(0.05, 4.0),
    extreme=st.booleans(),
)
@example(seed=0, m=1, L=1, d=1, degree=2, bound=4.0, extreme=True)
@example(seed=1, m=300, L=9, d=6, degree=8, bound=0.05, extreme=True)
def test_the_bound_holds(seed, m, L, d, degree, bound, extreme):
    """For entries anywhere in [-bound, bound], and for entries that are all +-bound."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        x = 2 * torch.rand(1, 2, n, d, dtype=torch.float64, generator=generator) - 1
        return bound * (x.sign() if extreme else x)

    query, key, value, keys, values = (draw(n) for n in (L, L, L, m, m))
    state = PrefixState.from_prefix(keys[0], values[0], feature_map("taylor", degree=degree))
    actual = ntk_attention(query, key, value, state, is_causal=True, backend="eager")
    error = (actual - prefix_attention(query, key, value, keys, values, True)).abs().max().item()
    assert error <= taylor_error_bound(bound, degree, d) + 1e-9 * bound


def test_the_bound_is_nearly_reached():
    """Two prefix tokens with the logits R and -R, weighted as the proof wants it, and almost no real token."""
    R, degree = 1.5, 2
    keys = torch.tensor([R**0.5, -(R**0.5)], dtype=torch.float64).view(1, 2, 1)
    many = round(math.exp(2 * R) * math.exp(-log_ratio(R, degree) / 2))
    keys = torch.cat([keys[:, :1], keys[:, 1:].expand(1, many, 1)], dim=1)
    values = torch.cat([torch.ones(1, 1, 1), -torch.ones(1, many, 1)], dim=1).double()
    query = torch.full((1, 1, 1, 1), R**0.5, dtype=torch.float64)
    far, nothing = torch.full_like(query, -1e3), torch.zeros_like(query)
    state = PrefixState.from_prefix(keys, values, feature_map("taylor", degree=degree))
    actual = ntk_attention(query, far, nothing, state, backend="eager")
    error = (actual - prefix_attention(query, far, nothing, keys[None], values[None], False)).abs().item()
    bound = taylor_error_bound(R**0.5, degree, 1, value_bound=1.0)
    assert 0.95 * bound < error <= bound


@pytest.mark.parametrize("degree", [2, 4, 8])
@pytest.mark.parametrize("R", [1e-3, 0.3, 1.0, 7.0, 60.0])
def test_the_ratio_of_weights(R, degree):
    """Against the polynomial itself in high precision."""
    from fractions import Fraction

    z = Fraction(R)
    up, down = (sum(x**j / math.factorial(j) for j in range(degree + 1)) for x in (z, -z))
    ratio = down / up  # b / a = e^2R P_g(-R) / P_g(R); e^2R exactly enough by its series
    exponential = sum((2 * z) ** j / Fraction(math.factorial(j)) for j in range(60 + int(20 * R)))
    excess = ratio * exponential - 1
    expected = math.log1p(float(excess)) if excess < 10**6 else math.log(ratio) + 2 * R
    assert log_ratio(R, degree) == pytest.approx(expected, rel=1e-6)


def test_choose_degree():
    for bound, tolerance, d in ((0.5, 1e-2, 64), (1.0, 1e-3, 16), (0.1, 0.5, 8)):
        degree = choose_degree(bound, tolerance, d)
        assert taylor_error_bound(bound, degree, d) <= tolerance
        assert degree == 2 or taylor_error_bound(bound, degree - 2, d) > tolerance
    with pytest.raises(ValueError, match=r"no degree up to 64 keeps the error below 0.01 .* logits reach 800"):
        choose_degree(10.0, 0.01, 64)
    with pytest.raises(ValueError, match="tolerance must be positive, got 0"):
        choose_degree(1.0, 0, 64)
    with pytest.raises(ValueError, match="even degree >= 2, got 8 and 3"):
        taylor_error_bound(1.0, 3, 8)
    with pytest.raises(ValueError, match="entry_bound must be positive and finite, got -1"):
        taylor_error_bound(-1.0, 2, 8)
