"""How many pairs a state of r features returns, and how near the others come: the bounds of docs/theory.md.

m queries have the features Phi [m, r] and should get the values V [m, d_v]. A state (Z, k) returns F = D^-1 Phi Z with
D = diag(Phi k), whose entries are positive.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ITERATIONS = {"k": 60, "answers": 200}  # of L-BFGS
ROUNDING = 1e-11  # singular values below this share of the largest are 0


def lost_values(Phi: Tensor) -> Tensor:
    """`rank`: values [m] of -1 and 1 on which every state is off by 1 somewhere; 0 where any value would do.

    Raises:
        ValueError: if the rows of Phi are independent: then every value is returned.
    """
    left, sizes, _ = torch.linalg.svd(Phi, full_matrices=True)
    if len(Phi) <= int((sizes > ROUNDING * sizes[0]).sum()):
        raise ValueError(f"the {len(Phi)} rows of Phi are independent: a state returns every value")
    n = left[:, -1]  # n^T Phi = 0
    return torch.where(n.abs() > 1e-9, n.sign(), 0.0)


def generic_pairs(r: int, d_v: int, phi_parameters: int = 0) -> int:
    """`counting`: almost no V of more rows than this is returned exactly: m d_v <= r d_v + r - 1, and as many more as
    phi itself has parameters that were fitted to V."""
    return (r * d_v + r - 1 + phi_parameters) // d_v


def exact_states(Phi: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """All (Z, k) with Phi Z = diag(Phi k) V: an orthonormal basis, Z [n, r, d_v] and k [n, r]."""
    (m, r), d_v = Phi.shape, V.shape[1]
    of_Z = torch.kron(Phi, torch.eye(d_v, dtype=Phi.dtype, device=Phi.device))
    of_k = -(V[:, :, None] * Phi[:, None, :]).reshape(m * d_v, r)
    _, sizes, right = torch.linalg.svd(torch.cat([of_Z, of_k], dim=1), full_matrices=True)
    basis = right[int((sizes > ROUNDING * sizes[0]).sum()) :]
    return basis[:, : r * d_v].reshape(-1, r, d_v), basis[:, r * d_v :]


def log_dichotomies(m: int, r: int) -> float:
    """`dichotomies`: the log of how many of the 2^m sign patterns m linear forms in r unknowns have at most."""
    terms = torch.tensor([log_binomial(m - 1, j) for j in range(min(r, m))], dtype=torch.float64)
    return math.log(2) + float(torch.logsumexp(terms, dim=0))


def log_binomial(n: int, j: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(j + 1) - math.lgamma(n - j + 1)


def decodable_pairs(r: int, d_v: int, N: int) -> int:
    """`decoding`: of the tables of more pairs than this, values read off as the nearest of N, some are out of reach."""

    def fits(m: int) -> bool:
        return m * math.log(N) <= log_dichotomies(m * N * (N - 1) // 2, r * (d_v + 1))

    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def wrong_signs(m: int, r: int) -> float:
    """`wrong_signs`: of m random signs every state has this share wrong at least, on average over the signs."""
    patterns, total, fewer = log_dichotomies(m, r) - m * math.log(2), 0.0, -math.inf
    for e in range(m):
        term = log_binomial(m, e)
        fewer = max(fewer, term) + math.log1p(
            math.exp(-abs(fewer - term))
        )  # the log of how many patterns are that near
        reached = patterns + fewer
        if reached >= 0:
            break
        total += 1 - math.exp(reached)
    return total / m


def every_state(m: int, r: int) -> float:
    """`every_state`: the mean squared error of m random signs is at least this with any Z and k, on average."""
    return 2 * wrong_signs(m, r)


def rank_tail(S: Tensor, r: int) -> float:
    """`rank_tail`: sum_{j > r} sigma_j(S)^2 / |S|_F^2, the part of the outputs S V that a state of r features loses at
    least, on average over V, if k does not depend on V."""
    squares = torch.linalg.svdvals(S).square()
    return float(squares[r:].sum() / squares.sum())


def sharp_tail(m: int, r: int, share: float) -> float:
    """`sharp_tail`: sum_{j > r} sigma_j(S)^2 / m is at least this if every query gives its own key this share."""
    return max(0.0, math.sqrt(max(0.0, 1 - r / m)) - math.sqrt(2) * (1 - share)) ** 2


# --- the best state ---


def reach(Phi: Tensor, k: Tensor) -> Tensor:
    """An orthonormal basis [m, r] of what states with this k can return."""
    # A basis of Phi divided by D spans what Phi divided by D does, and is far better conditioned.
    return torch.linalg.qr(torch.linalg.qr(Phi)[0] / (Phi @ k)[:, None])[0]


def nearest_output(A: Tensor, T: Tensor) -> Tensor:
    """Of what the basis A can return, the nearest to the targets T [m, d_v]."""
    return A @ (A.T @ T)


def nearest_answers(A: Tensor, V: Tensor) -> Tensor:
    """Of what the basis A can return, the output whose scores F V^T say best which of the values V [m, d_v] belongs to
    which query: by L-BFGS on the cross-entropy, which is convex."""
    m = len(V)
    Z = (m**0.5 * A.T @ V / m).requires_grad_()
    optimizer = torch.optim.LBFGS([Z], max_iter=ITERATIONS["answers"], line_search_fn="strong_wolfe")
    right = torch.arange(m, device=V.device)

    def loss() -> Tensor:
        optimizer.zero_grad()
        entropy = torch.nn.functional.cross_entropy(m**0.5 * A @ Z @ V.T, right)
        entropy.backward()
        return entropy

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return m**0.5 * A @ Z.detach()


def best_normaliser(Phi: Tensor, T: Tensor) -> Tensor:
    """k > 0 [r] whose nearest output is nearest to T: by L-BFGS on log k, from where all features weigh the same.

    Raises:
        ValueError: if a feature is negative.
    """
    if (Phi < 0).any():
        raise ValueError(f"features must not be negative, got one of {Phi.min().item():.3g}")
    start = -torch.log(Phi.mean(dim=0).clamp_min(1e-30))
    log_k = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([log_k], max_iter=ITERATIONS["k"], line_search_fn="strong_wolfe")
    Q = torch.linalg.qr(Phi)[0]

    def lost() -> Tensor:
        optimizer.zero_grad()
        k = torch.exp(log_k - log_k.detach().amax())
        A = torch.linalg.qr(Q / (Phi @ k)[:, None])[0]
        loss = 1 - (A.T @ T).square().sum() / T.square().sum()
        loss.backward()
        return loss

    optimizer.step(lost)  # type: ignore[no-untyped-call]
    found = log_k.detach()
    k = torch.exp(found - found.amax())
    return k if k.isfinite().all() else torch.exp(start - start.amax())
