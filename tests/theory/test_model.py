"""The closed forms of the stylized model against torch's automatic differentiation, in float64."""

import os
import subprocess
import sys

import pytest
import torch
from torch.func import jacrev, vmap

from ntk_attention.theory import model
from ntk_attention.theory.inputs import INPUTS

SIZES = [(1, 1, 1), (3, 2, 5), (4, 5, 33), (7, 3, 64)]  # n, d, m


def instance(n, d, m, seed=0, sigma=0.8, batch=()):
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *size: torch.randn(*batch, *size, generator=generator, dtype=torch.float64)  # noqa: E731
    X = randn(n, d)
    X = X / X.norm(dim=-1, keepdim=True)
    return sigma * randn(d, m), randn(m).sign(), X, randn(n, d)


def loop_outputs(W, a, X):
    """F by its formula, one input and one column at a time."""
    m = W.shape[1]
    rows = []
    for x in X:
        e = [torch.exp(W[:, r] @ x) for r in range(m)]
        rows.append(m * sum(e[r] * a[r] * W[:, r] for r in range(m)) / sum(e))
    return torch.stack(rows)


@pytest.mark.parametrize(("n", "d", "m"), SIZES)
def test_outputs(n, d, m):
    W, a, X, _ = instance(n, d, m)
    torch.testing.assert_close(model.outputs(W, a, X), loop_outputs(W, a, X), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("n", "d", "m"), SIZES)
def test_jacobian(n, d, m):
    W, a, X, _ = instance(n, d, m)
    J = jacrev(lambda w: model.outputs(w.T, a, X))(W.T.contiguous()).reshape(n * d, m * d)
    torch.testing.assert_close(model.jacobian(W, a, X), J, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("n", "d", "m"), SIZES)
def test_gradient(n, d, m):
    W, a, X, Y = instance(n, d, m)
    gradient = torch.func.grad(lambda W: 0.5 * (model.outputs(W, a, X) - Y).square().sum())(W)
    E, closed = model.residual_and_gradient(W, a, X, Y)
    torch.testing.assert_close(closed, gradient, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(E, model.outputs(W, a, X) - Y)


def test_batches():
    W, a, X, Y = instance(3, 2, 5, batch=(4,))
    torch.testing.assert_close(model.jacobian(W, a, X), vmap(model.jacobian)(W, a, X))
    for batched, single in zip(
        model.residual_and_gradient(W, a, X, Y), vmap(model.residual_and_gradient)(W, a, X, Y), strict=True
    ):
        torch.testing.assert_close(batched, single)
    torch.testing.assert_close(model.limit_kernel(X, 0.7)[2], model.limit_kernel(X[2], 0.7))


@pytest.mark.parametrize("chunk", [None, 1, 7])
@pytest.mark.parametrize(("n", "d", "m"), SIZES)
def test_kernel(n, d, m, chunk):
    W, a, X, _ = instance(n, d, m)
    J = model.jacobian(W, a, X)
    torch.testing.assert_close(model.kernel(W, a, X, chunk), J @ J.T / m, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("paired", [False, True])
def test_limit_kernel(paired):
    generator = torch.Generator().manual_seed(0)
    X = INPUTS["random"](4, 3, generator)
    limit = model.limit_kernel(X, 0.7)

    def error(m):
        H = model.kernel(*model.initial(3, m, 0.7, generator, paired=paired), X)
        return ((H - limit).norm() / limit.norm()).item()

    small, large = (sum(error(m) for _ in range(6)) / 6 for m in (2**8, 2**16))
    assert large < 0.05
    assert large < small / 6  # sqrt(256) = 16, up to the spread of six draws


def test_pairs_start_at_zero():
    W, a = model.initial(3, 64, 1.0, torch.Generator().manual_seed(0), paired=True)
    X = INPUTS["random"](5, 3, torch.Generator().manual_seed(1))
    assert model.outputs(W, a, X).abs().max() < 1e-12


@pytest.mark.parametrize("name", INPUTS)
def test_inputs(name):
    X = INPUTS[name](20, 6, torch.Generator().manual_seed(0))
    assert X.shape == (20, 6)
    torch.testing.assert_close(X.norm(dim=1), torch.ones(20, dtype=torch.float64))
    torch.testing.assert_close(X, INPUTS[name](20, 6, torch.Generator().manual_seed(0)))
    assert torch.pdist(X).min() > 1e-3


def test_errors():
    generator = torch.Generator()
    with pytest.raises(ValueError, match="even m for pairs, got d=2, m=3"):
        model.initial(2, 3, 1.0, generator, paired=True)
    with pytest.raises(ValueError, match="patches, asked for 100000"):
        INPUTS["image"](100000, 2, generator)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_kernel_memory():
    """n=64, d=16, m=2^16: J would take 8 GiB; H takes 8 MiB and a chunk 32 MiB."""
    script = """
import resource, torch
from ntk_attention.theory import model
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
X = torch.randn(64, 16, dtype=torch.float64)
X /= X.norm(dim=1, keepdim=True)
W, a = model.initial(16, 2**16, 1.0, torch.Generator().manual_seed(0))
model.kernel(W[:, :64], a[:64], X)
before = peak()
H = model.kernel(W, a, X)
assert H.shape == (1024, 1024) and torch.linalg.eigvalsh(H)[0] > 0
print(peak() - before)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert int(result.stdout) < 400 * 2**10, f"{result.stdout} KiB"
