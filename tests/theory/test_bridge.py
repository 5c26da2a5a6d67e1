"""The bridge to a real layer, on a layer of random tensors: its parts against plain attention, then all of it."""

import pytest
import torch
from torch.nn import functional

from ntk_attention.ops.features import feature_map
from ntk_attention.theory import run_bridge
from ntk_attention.theory.run_bridge import Layer

from .test_experiments import invoke

H, H_KV, D, L, D_MODEL = 4, 2, 8, 12, 16


def layer():
    generator = torch.Generator().manual_seed(0)
    randn = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    query, key, value = (randn(1, heads, L, D) / 2 for heads in (H, H_KV, H_KV))
    W_K, W_V = (randn(D_MODEL, H_KV * D) / 4 for _ in range(2))
    W_K = W_K / 2  # small logits: few random features do
    bare = Layer(query, key, value, query, randn(20, D_MODEL), W_K, W_V)
    target = bare.with_prefix(bare.heads(bare.context @ W_K), bare.heads(bare.context @ W_V))
    return Layer(query, key, value, target, bare.context, W_K, W_V)


def test_with_prefix_is_causal_attention_behind_it():
    real = layer()
    none = real.with_prefix(real.key[:, :, :0], real.value[:, :, :0])
    plain = functional.scaled_dot_product_attention(real.query, real.key, real.value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(none, plain)
    key, value = real.heads(real.context @ real.W_K), real.heads(real.context @ real.W_V)
    row = functional.scaled_dot_product_attention(  # the query at 5 sees the prefix and the tokens 0 to 5
        real.query[:, :, 5:6],
        torch.cat([key, real.key[:, :, :6]], dim=2),
        torch.cat([value, real.value[:, :, :6]], dim=2),
        enable_gqa=True,
    )
    torch.testing.assert_close(real.with_prefix(key, value)[:, :, 5:6], row)


def test_state_starts_at_its_prefix(monkeypatch):
    """With many features phi(q).phi(c) is exp(s q.c), and (Z, k) is the prefix it starts from."""
    monkeypatch.setattr(run_bridge, "START_LENGTH", 16)
    real = layer()
    (P,), of_prefix = run_bridge.prefix_parts(real, 16, torch.Generator().manual_seed(1))
    phi = feature_map("positive_random", num_features=20_000).bind(D)
    parts, of_state = run_bridge.state_parts(real, phi, torch.Generator().manual_seed(1))
    error = (of_state(parts) - of_prefix((P,))).norm() / of_prefix((P,)).norm()
    assert error < 0.05


def test_kernel_of_a_linear_map():
    A = torch.randn(6, 4)
    probes = torch.randn(3, 6)
    H_ = run_bridge.kernel_of(lambda parts: A @ parts[0], (torch.randn(4),), probes)
    torch.testing.assert_close(H_, probes @ A @ A.T @ probes.T)


@pytest.fixture
def small(monkeypatch):
    for name, value in (("STEPS", 20), ("LENGTHS", (1, 4, 16)), ("RANKS", (4, 8, 16)), ("START_LENGTH", 16)):
        monkeypatch.setattr(run_bridge, name, value)
    monkeypatch.setattr(run_bridge, "real_layer", lambda load_model, device: layer())


@pytest.mark.slow
def test_bridge(small, tmp_path):
    result = invoke("bridge", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    for text in ("prefix tokens, loss (held out) by m", "as a power of r, exponent", "lazy at", "elu, r = 8"):
        assert text in result.output
    assert (tmp_path / "bridge.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "bridge.jsonl").read_text().splitlines()) == 1 + 3 + 3 + 1
