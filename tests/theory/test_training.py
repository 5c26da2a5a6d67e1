"""Gradient descent and what its start predicts."""

from itertools import pairwise

import pytest
import torch

from ntk_attention.theory import model
from ntk_attention.theory.inputs import INPUTS
from ntk_attention.theory.training import Start, descend


def start(m=64, n=3, d=4, paired=True):
    generator = torch.Generator().manual_seed(0)
    X = INPUTS["random"](n, d, generator)
    W, a = model.initial(d, m, 1.0, generator, paired=paired)
    return W, a, X, INPUTS["random"](n, d, generator)


def test_descent_is_torch_sgd():
    W, a, X, Y = start()
    run = descend(W, a, X, Y, 1e-4, 20)
    weights = W.clone().requires_grad_()
    optimizer = torch.optim.SGD([weights], lr=1e-4)
    for loss in run.loss:
        value = 0.5 * (model.outputs(weights, a, X) - Y).square().sum()
        assert value.item() == pytest.approx(loss, rel=1e-10)
        optimizer.zero_grad()
        value.backward()
        last = weights.detach().clone()
        optimizer.step()
    torch.testing.assert_close(run.W, last)
    assert len(run.loss) == 21
    assert run.drift == pytest.approx((last - W).norm(dim=0).max().item())


@pytest.mark.parametrize("paired", [False, True])
def test_prediction_in_the_lazy_regime(paired):
    """Near targets keep descent lazy at any m: the loss then follows the kernel at the start."""
    W, a, X, Y = start(paired=paired)
    Y = model.outputs(W, a, X) - 1e-4 * Y
    first = Start.of(W, a, X, Y)
    run = descend(W, a, X, Y, first.kernel_step(), 200)
    predicted = first.predicted_loss(first.kernel_step(), torch.arange(201.0).double())
    torch.testing.assert_close(torch.tensor(run.loss).double(), predicted, rtol=1e-2, atol=1e-20)


def test_careful_step_is_smaller_and_falls():
    W, a, X, Y = start()
    first = Start.of(W, a, X, Y)
    assert first.careful_step() < first.kernel_step()
    loss = descend(W, a, X, Y, first.careful_step(), 50).loss
    assert all(after < before for before, after in pairwise(loss))


def test_divergence_is_reported():
    W, a, X, Y = start(m=256)
    run = descend(W, a, X, Y, 10 * Start.of(W, a, X, Y).kernel_step(), 200)
    assert run.diverged
    assert len(run.loss) < 200


def test_target_ends_a_run():
    W, a, X, Y = start()
    run = descend(W, a, X, Y, Start.of(W, a, X, Y).kernel_step(), 10_000, target=0.5)
    assert run.loss[-1] <= 0.5 * run.loss[0] < run.loss[-2]
