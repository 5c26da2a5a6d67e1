"""The inequalities of docs/theory.md with their constants; all ask for |x_i| <= 1. Leading dimensions are batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .model import attention


@dataclass(frozen=True)
class Sizes:
    """What the bounds know about W: rho = max_r |w_r|, Gamma = max_i m sum_r S_ir^2, beta = max_ir m S_ir, n and d."""

    rho: Tensor  # [...]
    Gamma: Tensor  # [...]
    beta: Tensor  # [...]
    n: int
    d: int

    @classmethod
    def of(cls, W: Tensor, X: Tensor) -> Sizes:
        """Of W [..., d, m] and inputs X [..., n, d].

        Raises:
            ValueError: if an input is longer than 1.
        """
        longest = X.norm(dim=-1).max().item()
        if longest > 1 + 1e-9:
            raise ValueError(f"the bounds need inputs of at most unit norm, got one of {longest:.4g}")
        mS = W.shape[-1] * attention(W, X)  # [..., n, m]
        Gamma = mS.square().mean(dim=-1).amax(dim=-1)
        return cls(W.norm(dim=-2).amax(dim=-1), Gamma, mS.amax(dim=(-2, -1)), X.shape[-2], X.shape[-1])

    def __getitem__(self, index: int) -> Sizes:
        return Sizes(self.rho[index], self.Gamma[index], self.beta[index], self.n, self.d)

    def within(self, R: Tensor | float) -> Sizes:
        """Bounds on the sizes of every W~ with max_r |w~_r - w_r| <= R."""
        R = torch.as_tensor(R, dtype=self.rho.dtype, device=self.rho.device)
        return Sizes(self.rho + R, (4 * R).exp() * self.Gamma, (2 * R).exp() * self.beta, self.n, self.d)


def initial_norm(d: int, m: int, sigma: float, delta: float) -> float:
    """`initial_norm`: all |w_r(0)| stay below this with probability 1 - delta at least."""
    return sigma * (math.sqrt(d) + math.sqrt(2 * math.log(m / delta)))


def softmax_l1(R: Tensor) -> Tensor:
    """`softmax_l1`: sum_r |S~_r - S_r| <= R."""
    return R


def mean_shift(sizes: Sizes, R: Tensor) -> Tensor:
    """`mean_shift`: |F~ - F| / m <= R (1 + rho)."""
    return R * (1 + sizes.rho)


def jacobian_size(sizes: Sizes) -> Tensor:
    """`jacobian_size`: |J|_op / sqrt(m) <= sqrt(n Gamma) (1 + 2 rho)."""
    return (sizes.n * sizes.Gamma).sqrt() * (1 + 2 * sizes.rho)


def jacobian_shift(sizes: Sizes, R: Tensor | float, frobenius: bool = False) -> Tensor:
    """`jacobian_shift`: |J~ - J| / sqrt(m) <= D(R), in operator norm or in Frobenius norm."""
    R = torch.as_tensor(R, dtype=sizes.rho.dtype, device=sizes.rho.device)
    identity = math.sqrt(sizes.d) if frobenius else 1.0
    change = torch.expm1(2 * R) * (identity + 2 * (sizes.rho + R)) + R * (2 + sizes.rho)
    return (sizes.n * sizes.Gamma).sqrt() * change


def kernel_shift(sizes: Sizes, R: Tensor | float) -> Tensor:
    """`kernel_shift`: |H~ - H|_F <= D_F(R) (|J|_op + |J~|_op) / sqrt(m), both by `jacobian_size`."""
    return jacobian_shift(sizes, R, frobenius=True) * (jacobian_size(sizes) + jacobian_size(sizes.within(R)))


def kernel_shift_linear(sizes: Sizes, R: Tensor) -> Tensor:
    """`kernel_shift_linear`: the same for R <= 0.01, as a constant times R."""
    rho = sizes.rho
    factor = (2.03 * math.sqrt(sizes.d) + 5.05 * rho + 2.05) * (2.05 + 4.05 * rho)
    return R * sizes.n * sizes.Gamma * factor


def smallest_eigenvalue(sizes: Sizes, smallest: Tensor, R: Tensor) -> Tensor:
    """`smallest_eigenvalue`: lambda_min(H~) is at least (sqrt(lambda_min(H)) - D(R))^2 where that root is positive."""
    return (smallest.clamp_min(0).sqrt() - jacobian_shift(sizes, R)).clamp_min(0).square()


def gradient_column(sizes: Sizes, error: Tensor) -> Tensor:
    """`gradient_column`: |dL/dw_r| <= beta (1 + 2 rho) sqrt(n) |e| with error = |e|, the norm of the residual."""
    return sizes.beta * (1 + 2 * sizes.rho) * math.sqrt(sizes.n) * error


def one_step(sizes: Sizes, smallest: Tensor, largest: Tensor, m: int, eta: Tensor, moved: Tensor) -> Tensor:
    """`one_step`: |e(t+1)| / |e(t)| is at most this if eta m largest <= 1; `moved` is max_r |w_r(t+1) - w_r(t)|."""
    return 1 - eta * m * (smallest - largest.sqrt() * jacobian_shift(sizes, moved))


@dataclass(frozen=True)
class Certificate:
    """`linear_convergence`: for eta <= this eta, |e(t)| <= (1 - eta m lambda / 2)^t |e(0)| and no column moves by more
    than `drift` <= R, for all t. All fields [...]; `holds` says where the hypotheses are met."""

    holds: Tensor
    R: Tensor
    eta: Tensor
    drift: Tensor
    needed_m: Tensor  # the m that would do if lambda, Gamma, beta, rho and |e(0)| stayed as they are

    def __getitem__(self, index: int) -> Certificate:
        return Certificate(*(getattr(self, field.name)[index] for field in fields(self)))


def certificate(sizes: Sizes, smallest: Tensor, largest: Tensor, m: int, error: Tensor) -> Certificate:
    """The theorem's hypotheses at W(0), from the extreme eigenvalues of H(W(0)) and error = |e(0)|."""
    R = largest_below(lambda R: jacobian_shift(sizes, R), smallest.clamp_min(0).sqrt() / 8)
    ball = sizes.within(R)
    pull = gradient_column(ball, error)  # bounds |dL/dw_r| in the ball while |e| <= |e(0)|
    top = largest.sqrt() + jacobian_shift(sizes, R)  # bounds |J|_op / sqrt(m) in the ball
    step = largest_below(lambda r: jacobian_shift(ball, r), smallest / (4 * top))  # how far one step may go
    drift = 2 * pull / (m * smallest)
    eta = torch.minimum(1 / (m * top.square()), step / pull)
    return Certificate((smallest > 0) & (drift <= R), R, eta, drift, m * drift / R)


def largest_below(rising: Callable[[Tensor], Tensor], limit: Tensor, start: float = 8.0, halvings: int = 80) -> Tensor:
    """The largest argument in [0, start] where the rising function stays at or below `limit` [...], by bisection."""
    low, high = torch.zeros_like(limit), torch.full_like(limit, start)
    for _ in range(halvings):
        middle = (low + high) / 2
        fits = rising(middle) <= limit
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return low


def lazy_gap(sizes: Sizes, largest: Tensor, R: Tensor) -> Tensor:
    """`lazy_gap`: K with |e(t) - (I - eta m H(0))^t e(0)| <= t (1 - eta m lambda / 2)^(t-1) eta m K |e(0)|."""
    D = jacobian_shift(sizes, R)
    return 2 * largest.sqrt() * D + D.square()
