"""Gradient descent on the stylized model, and what the kernel at the start says about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .bounds import Sizes, certificate
from .model import kernel, outputs, residual_and_gradient


@dataclass
class Run:
    """One run of gradient descent."""

    W: Tensor  # [d, m], where it ended
    loss: list[float] = field(default_factory=list)  # at W(0), W(1), ..., W(steps)
    drift: float = 0.0  # max_r |w_r(t) - w_r(0)| at the end
    drift_rms: float = 0.0  # the root mean square over r of the same
    diverged: bool = False  # the loss passed 10 times its start, or was not finite


def descend(
    W: Tensor,
    a: Tensor,
    X: Tensor,
    Y: Tensor,
    eta: float,
    steps: int,
    target: float = 0.0,
    watch: Callable[[int, Tensor], None] | None = None,
) -> Run:
    """W <- W - eta dL/dW, at most `steps` times, until the loss is below `target` times its start or has diverged.

    `watch` sees every t and W(t).
    """
    run = Run(W)
    for t in range(steps + 1):
        E, gradient = residual_and_gradient(run.W, a, X, Y)
        run.loss.append(0.5 * E.square().sum().item())
        run.diverged = not run.loss[-1] <= 10 * run.loss[0]  # also where it is NaN
        if watch:
            watch(t, run.W)
        if t == steps or run.diverged or run.loss[-1] <= target * run.loss[0]:
            break
        run.W = run.W - eta * gradient
    moved = (run.W - W).norm(dim=0)  # [m]
    run.drift, run.drift_rms = moved.max().item(), moved.square().mean().sqrt().item()
    return run


@dataclass(frozen=True)
class Start:
    """What W(0) says: H(W(0)) = U diag(values) U^T, the residual in the basis U, and the bounds' view of it."""

    values: Tensor  # [n d], rising
    residual: Tensor  # [n d], U^T (F(W(0)) - Y)
    m: int
    sizes: Sizes

    @classmethod
    def of(cls, W: Tensor, a: Tensor, X: Tensor, Y: Tensor) -> Start:
        values, vectors = torch.linalg.eigh(kernel(W, a, X))
        residual = vectors.T @ (outputs(W, a, X) - Y).flatten()
        return cls(values, residual, W.shape[1], Sizes.of(W, X))

    def kernel_step(self) -> float:
        """The step that the kernel allows: eta = 1 / (m lambda_max). Linearised descent diverges past twice that."""
        return 1 / (self.m * self.values[-1].item())

    def careful_step(self) -> float:
        """The step of our theorem `linear_convergence`: lambda / m over a polynomial in n, rho, Gamma and beta.

        The paper's rule has that form too, as far as recalled; its constants are not known to us.
        """
        return certificate(self.sizes, self.values[0], self.values[-1], self.m, self.residual.norm()).eta.item()

    def predicted_loss(self, eta: float, steps: Tensor) -> Tensor:
        """1/2 |(I - eta m H(W(0)))^t e(0)|^2 for t in steps [T]: the loss if the kernel never changed."""
        factors = (1 - eta * self.m * self.values).abs()  # [n d]
        return 0.5 * (factors ** (2 * steps[:, None]) * self.residual.square()).sum(dim=1)
