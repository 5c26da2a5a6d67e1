"""Every inequality of docs/theory.md on 1,000 random instances or more; each test carries the inequality's name."""

import math

import pytest
import torch

from ntk_attention.theory import bounds, model
from ntk_attention.theory.bounds import Sizes

from .test_model import instance

N = 1000  # instances of each test, all at once
SLACK = 1 + 1e-9  # rounding in float64
ROUNDING = 1e-12  # of F, which is of size m


def below(smaller, larger):
    ratio = smaller / larger
    assert ratio.shape[0] == N
    assert ratio.max() <= SLACK, f"{(ratio > SLACK).sum()} of {ratio.numel()} instances fail, worst {ratio.max():.4g}"


def sizes_of(seed):
    return [(3, 2, 6), (2, 4, 9), (5, 3, 20)][seed % 3]  # n, d, m


def perturb(W, R, generator, kind):
    """W~ with |w~_r - w_r| = R_r <= R: in random directions, all in one direction, or one column alone."""
    direction = torch.randn(W.shape, generator=generator, dtype=W.dtype)
    if kind == "together":
        direction = direction[..., :1].expand(W.shape).clone()
    direction = direction / direction.norm(dim=-2, keepdim=True)
    if kind == "alone":
        direction[..., 1:] = 0
    return W + R[:, None, None] * direction


@pytest.fixture(params=[(0, "random"), (1, "random"), (2, "random"), (0, "together"), (1, "alone")], ids=str)
def pair(request):
    """W, W~, a, X, Y and R: 1,000 instances with R from 1e-4 to 1, a third of them at most 0.01."""
    seed, kind = request.param
    W, a, X, Y = instance(*sizes_of(seed), seed, sigma=0.3 + 0.5 * seed, batch=(N,))
    generator = torch.Generator().manual_seed(100 + seed)
    R = 10 ** (-4 * torch.rand(N, generator=generator, dtype=torch.float64))
    X = X * torch.rand(N, X.shape[1], 1, generator=generator, dtype=torch.float64).sqrt()  # |x_i| <= 1
    return W, perturb(W, R, generator, kind), a, X, Y, R


def op(J):
    return torch.linalg.matrix_norm(J, ord=2)


def test_initial_norm():
    generator = torch.Generator().manual_seed(0)
    for d, m, sigma, delta in ((1, 8, 1.0, 0.5), (4, 50, 0.3, 0.1), (16, 300, 2.0, 0.5)):
        largest = sigma * torch.randn(N, d, m, generator=generator).norm(dim=1).amax(dim=1)
        assert (largest > bounds.initial_norm(d, m, sigma, delta)).double().mean() <= delta


def test_softmax_size(pair):
    W, _, _, X, _, _ = pair
    sizes = Sizes.of(W, X)
    below(torch.ones(N), sizes.Gamma)
    below(sizes.Gamma, sizes.beta)
    below(sizes.beta, (2 * sizes.rho).exp())


def test_softmax_ratio(pair):
    W, moved, _, X, _, R = pair
    ratio = model.attention(moved, X) / model.attention(W, X)
    below(ratio.amax(dim=(1, 2)), (2 * R).exp())
    below((1 / ratio).amax(dim=(1, 2)), (2 * R).exp())


def test_softmax_l1(pair):
    W, moved, _, X, _, R = pair
    below((model.attention(moved, X) - model.attention(W, X)).abs().sum(dim=2).amax(dim=1), bounds.softmax_l1(R))


def test_mean_shift(pair):
    W, moved, a, X, _, R = pair
    change = (model.outputs(moved, a, X) - model.outputs(W, a, X)).norm(dim=2).amax(dim=1) / W.shape[2]
    below(change, bounds.mean_shift(Sizes.of(W, X), R))


def test_within(pair):
    W, moved, _, X, _, R = pair
    bound, sizes = Sizes.of(W, X).within(R), Sizes.of(moved, X)
    for name in ("rho", "Gamma", "beta"):
        below(getattr(sizes, name), getattr(bound, name))


def test_jacobian_size(pair):
    W, _, a, X, _, _ = pair
    below(op(model.jacobian(W, a, X)) / math.sqrt(W.shape[2]), bounds.jacobian_size(Sizes.of(W, X)))


def test_jacobian_shift(pair):
    W, moved, a, X, _, R = pair
    change = (model.jacobian(moved, a, X) - model.jacobian(W, a, X)) / math.sqrt(W.shape[2])
    sizes = Sizes.of(W, X)
    below(op(change), bounds.jacobian_shift(sizes, R))
    below(torch.linalg.matrix_norm(change), bounds.jacobian_shift(sizes, R, frobenius=True))


def kernels(W, moved, a, X):
    J, J_moved = model.jacobian(W, a, X), model.jacobian(moved, a, X)
    return J @ J.mT / W.shape[2], J_moved @ J_moved.mT / W.shape[2]


def test_kernel_shift(pair):
    W, moved, a, X, _, R = pair
    H, H_moved = kernels(W, moved, a, X)
    below(torch.linalg.matrix_norm(H_moved - H), bounds.kernel_shift(Sizes.of(W, X), R))


def test_kernel_shift_linear(pair):
    W, _, a, X, _, R = pair
    R = R / 100  # from 1e-6 to 0.01
    moved = perturb(W, R, torch.Generator().manual_seed(5), "random")
    H, H_moved = kernels(W, moved, a, X)
    sizes = Sizes.of(W, X)
    below(torch.linalg.matrix_norm(H_moved - H), bounds.kernel_shift_linear(sizes, R))
    below(bounds.kernel_shift(sizes, R), bounds.kernel_shift_linear(sizes, R))


def test_smallest_eigenvalue(pair):
    W, moved, a, X, _, R = pair
    H, H_moved = (torch.linalg.eigvalsh(H)[:, 0] for H in kernels(W, moved, a, X))
    bound = bounds.smallest_eigenvalue(Sizes.of(W, X), H, R)
    assert (bound > H / 2).sum() > N / 50  # it says something, not only >= 0
    assert (H_moved - bound).min() > -1e-10


def test_gradient_column(pair):
    W, _, a, X, Y, _ = pair
    E, gradient = model.residual_and_gradient(W, a, X, Y)
    below(gradient.norm(dim=1).amax(dim=1), bounds.gradient_column(Sizes.of(W, X), E.flatten(1).norm(dim=1)))


def test_one_step(pair):
    W, _, a, X, Y, R = pair
    H = torch.linalg.eigvalsh(kernels(W, W, a, X)[0])
    E, gradient = model.residual_and_gradient(W, a, X, Y)
    eta = R / (W.shape[2] * H[:, -1])  # from 1e-4 to 1 of what the kernel allows
    after = model.outputs(W - eta[:, None, None] * gradient, a, X) - Y
    moved = (eta[:, None, None] * gradient).norm(dim=1).amax(dim=1)
    bound = bounds.one_step(Sizes.of(W, X), H[:, 0], H[:, -1], W.shape[2], eta, moved)
    below(after.flatten(1).norm(dim=1) / E.flatten(1).norm(dim=1), bound)


def certified(seed):
    """1,000 starts with targets so near that the hypotheses of the theorem are met, and their certificates.

    Of 1,200 starts those with the largest lambda: for the others the nearest targets are within rounding of F.
    """
    n, d, m = sizes_of(seed)
    W, a, X, noise = instance(n, d, m * 3, seed, sigma=1.0, batch=(N + 200,))
    smallest = torch.linalg.eigvalsh(kernels(W, W, a, X)[0])[:, 0]
    W, a, X, noise = (tensor[smallest.argsort()[-N:]] for tensor in (W, a, X, noise))
    H = kernels(W, W, a, X)[0]
    values, sizes = torch.linalg.eigvalsh(H), Sizes.of(W, X)
    unit = noise / noise.flatten(1).norm(dim=1)[:, None, None]
    edge = bounds.certificate(sizes, values[:, 0], values[:, -1], W.shape[2], torch.ones(N))
    error = 0.999 * edge.R / edge.drift  # drift is linear in |e(0)|: this is as far as the theorem reaches
    Y = model.outputs(W, a, X) - error[:, None, None] * unit
    certificate = bounds.certificate(sizes, values[:, 0], values[:, -1], W.shape[2], error)
    assert certificate.holds.all()
    assert error.min() > 100 * ROUNDING
    return W, a, X, Y, H, values, sizes, certificate, error


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_linear_convergence_and_lazy_gap(seed):
    W, a, X, Y, H, values, sizes, certificate, error = certified(seed)
    m, eta, start = W.shape[2], certificate.eta, W
    factor = 1 - eta * m * values[:, 0] / 2
    K = bounds.lazy_gap(sizes, values[:, -1], certificate.R)
    linear = e = (model.outputs(W, a, X) - Y).flatten(1)  # [N, n d]
    for t in range(1, 61):
        W = W - eta[:, None, None] * model.residual_and_gradient(W, a, X, Y)[1]
        e = (model.outputs(W, a, X) - Y).flatten(1)
        below(e.norm(dim=1), factor**t * error + ROUNDING)
        below((W - start).norm(dim=1).amax(dim=1), certificate.drift + ROUNDING)
        linear = linear - (eta * m)[:, None] * (H @ linear[..., None])[..., 0]
        below((e - linear).norm(dim=1), t * factor ** (t - 1) * eta * m * K * error + ROUNDING)
    below(certificate.drift, certificate.R)


def test_limit_positive():
    for n, d in ((2, 1), (3, 2), (4, 3)):
        generator = torch.Generator().manual_seed(n)
        X = torch.randn(4 * N, n, d, generator=generator, dtype=torch.float64)
        X = X / X.norm(dim=2, keepdim=True).clamp_min(1)
        distinct = torch.cdist(X, X) + 9 * torch.eye(n)
        X = X[distinct.amin(dim=(1, 2)) > 0.2][:N]
        assert len(X) == N
        assert torch.linalg.eigvalsh(model.limit_kernel(X, 1.0))[:, 0].min() > 1e-9
