"""What a prefix state accepts and refuses."""

import pytest
import torch

from ntk_attention import PrefixState, feature_map


def test_defaults():
    state = PrefixState(torch.zeros(2, 8, 4), torch.ones(2, 8))
    assert (state.num_heads, state.num_features) == (2, 8)
    assert torch.equal(state.log_scale, torch.zeros(2))
    assert state.feature_map.name == "elu"


def test_to():
    state = PrefixState(torch.zeros(2, 8, 4), torch.ones(2, 8), feature_map=feature_map("positive_random").bind(2))
    moved = state.to(torch.float64)
    assert moved.Z.dtype == moved.k.dtype == moved.log_scale.dtype == torch.float64
    assert state.Z.dtype == state.feature_map.projection.dtype == torch.float32
    assert moved.feature_map.projection.dtype == torch.float64


def test_signed_maps_need_only_a_positive_count():
    phi = feature_map("taylor", degree=2)
    k = -torch.ones(1, phi.num_features(3))
    k[0, 0] = 5.0
    PrefixState(torch.zeros(1, 10, 4), k, feature_map=phi)
    with pytest.raises(ValueError, match="k must be positive for the feature map 'taylor', got a minimum of -5"):
        PrefixState(torch.zeros(1, 10, 4), -k * 1.0, feature_map=phi)


def with_nan(*shape):
    x = torch.ones(*shape)
    x.view(-1)[1] = float("nan")
    return x


@pytest.mark.parametrize(
    ("Z", "k", "log_scale", "message"),
    [
        (torch.zeros(2, 8), torch.ones(2, 8), None, r"Z \[H, r, d_v\] and k \[H, r\], got Z \[2, 8\] and k \[2, 8\]"),
        (torch.zeros(2, 8, 4), torch.ones(2, 7), None, r"got Z \[2, 8, 4\] and k \[2, 7\]"),
        (torch.zeros(2, 8, 4), torch.ones(3, 8), None, r"got Z \[2, 8, 4\] and k \[3, 8\]"),
        (torch.zeros(2, 8, 4), torch.ones(2, 8), torch.zeros(3), r"log_scale must be \[H\] = \[2\], got \[3\]"),
        (torch.zeros(2, 8, 4, dtype=torch.long), torch.ones(2, 8), None, "Z must be floating point, got torch.int64"),
        (torch.zeros(2, 8, 4), torch.zeros(2, 8), None, "k must be positive for the feature map 'elu', .*minimum of 0"),
        (torch.zeros(2, 8, 4), -torch.ones(2, 8), None, "minimum of -1"),
        (with_nan(2, 8, 4), torch.ones(2, 8), None, "Z holds NaN or infinite values"),
        (torch.zeros(2, 8, 4), with_nan(2, 8), None, "k holds NaN or infinite values"),
        (torch.zeros(2, 8, 4), torch.ones(2, 8), with_nan(2), "log_scale holds NaN or infinite values"),
    ],
)
def test_bad_states(Z, k, log_scale, message):
    with pytest.raises(ValueError, match=message):
        PrefixState(Z, k, log_scale)


def test_unknown_map():
    with pytest.raises(ValueError, match="unknown feature map 'gelu'"):
        PrefixState(torch.zeros(2, 8, 4), torch.ones(2, 8), feature_map="gelu")
