"""The stylized model of section 3, its Jacobian and its neural tangent kernel.

    F(W, x) = m * sum_r S_r(x) a_r w_r  in R^d,   S(x) = softmax(W^T x),   w_r(0) ~ N(0, sigma^2 I),   a_r = +-1 fixed

the model as far as we recall it: one query x attends to a prefix of m tokens w_r that are keys and, up to the sign a_r,
values. Loss 1/2 sum_i |F(W, x_i) - y_i|^2. All functions take leading batch dimensions, written ``...``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_NUMBERS = 2**22  # numbers that one chunk of the kernel may hold: 32 MiB in float64


def initial(d: int, m: int, sigma: float, generator: torch.Generator, paired: bool = False) -> tuple[Tensor, Tensor]:
    """W(0) [d, m] and a [m] in float64 on the generator's device.

    Args:
        paired: draw half of the columns and give each to both signs, so that F(W(0), x) = 0 for every x. With
            independent signs F(W(0), x) is of size sqrt(m).

    Raises:
        ValueError: if a size is not positive, or m is odd where pairs are wanted.
    """
    if min(d, m) < 1 or sigma <= 0 or (paired and m % 2):
        raise ValueError(f"need d, m >= 1, sigma > 0 and an even m for pairs, got d={d}, m={m}, sigma={sigma}")
    drawn = m // 2 if paired else m
    options = {"dtype": torch.float64, "device": generator.device}
    W = sigma * torch.randn(d, drawn, generator=generator, **options)  # type: ignore[call-overload]
    if paired:
        sign = torch.ones(drawn, **options)  # type: ignore[call-overload]
        return torch.cat([W, W], dim=1), torch.cat([sign, -sign])
    a = torch.randint(0, 2, (m,), generator=generator, device=generator.device)
    return W, 2.0 * a.double() - 1.0


def attention(W: Tensor, X: Tensor) -> Tensor:
    """S [..., n, m] of W [..., d, m] and inputs X [..., n, d]."""
    return torch.softmax(X @ W, dim=-1)


def outputs(W: Tensor, a: Tensor, X: Tensor) -> Tensor:
    """F(W, X) [..., n, d] of W [..., d, m], a [..., m], X [..., n, d]."""
    return W.shape[-1] * (attention(W, X) * a[..., None, :]) @ W.mT


def residual_and_gradient(W: Tensor, a: Tensor, X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
    """E = F - Y [..., n, d] and dL/dW [..., d, m], from one pass over the attention.

    dL/dw_r = sum_i J_r(x_i)^T e_i = m sum_i S_ir (a_r e_i + ((a_r w_r - F_i / m) . e_i) x_i)
    """
    m = W.shape[-1]
    S = attention(W, X)  # [..., n, m]
    mean = (S * a[..., None, :]) @ W.mT  # [..., n, d], F / m
    E = m * mean - Y
    slope = S * (a[..., None, :] * (E @ W) - (mean * E).sum(dim=-1, keepdim=True))  # [..., n, m]
    return E, m * (a[..., None, :] * (E.mT @ S) + X.mT @ slope)


def jacobian(W: Tensor, a: Tensor, X: Tensor) -> Tensor:
    """dF/dW [..., n d, m d], rows (i, output), columns (r, coordinate): for small m.

    dF(x)/dw_r = m S_r(x) (a_r I + v_r x^T) with v_r = a_r w_r - F / m
    """
    d, m = W.shape[-2:]
    n = X.shape[-2]
    S = attention(W, X)
    mean = (S * a[..., None, :]) @ W.mT
    V = (a[..., None, :] * W).mT[..., None, :, :] - mean[..., :, None, :]  # [..., n, m, d]
    identity = torch.eye(d, dtype=W.dtype, device=W.device) * a[..., None, :, None, None]  # [..., 1, m, d, d]
    blocks = identity + V[..., :, None] * X[..., :, None, None, :]  # [..., n, m, d (output), d (input)]
    J = m * S[..., None, None] * blocks
    return J.transpose(-3, -2).reshape(*J.shape[:-4], n * d, m * d)


def chunks(m: int, size: int) -> Iterator[slice]:
    """[m] in slices of at most `size`."""
    return (slice(start, start + size) for start in range(0, m, size))


def kernel(W: Tensor, a: Tensor, X: Tensor, chunk: int | None = None) -> Tensor:
    """H(W) = J J^T / m [n d, n d] without J: W [d, m] is read in chunks of columns, twice.

    Block (i, j) is m sum_r S_ir S_jr (a_r I + v_ir x_i^T)(a_r I + v_jr x_j^T)^T. It needs the sums over r of
    S_ir S_jr times 1, a_r, w_r, a_r w_r and w_r w_r^T only, so that the memory is O(n^2 d^2 + chunk).
    """
    (d, m), n = W.shape, len(X)
    chunk = chunk or max(1, CHUNK_NUMBERS // max(n * n, d * d))
    log_sum = torch.stack([torch.logsumexp(X @ W[:, c], dim=1) for c in chunks(m, chunk)]).logsumexp(dim=0)  # [n]
    mean = torch.zeros(n, d, dtype=W.dtype, device=W.device)  # F / m
    sums = torch.zeros(n * n, 2 + 2 * d + d * d, dtype=W.dtype, device=W.device)
    for c in chunks(m, chunk):
        w, sign = W[:, c].T, a[c, None]  # [c, d], [c, 1]
        S = torch.exp(X @ W[:, c] - log_sum[:, None])  # [n, c]
        mean += S @ (sign * w)
        powers = (torch.ones_like(sign), sign, w, sign * w, (w[:, :, None] * w[:, None, :]).flatten(1))
        sums.addmm_((S[:, None] * S[None]).flatten(0, 1), torch.cat(powers, dim=1))
    return m * kernel_of_sums(sums.view(n, n, -1), mean, X)


def kernel_of_sums(sums: Tensor, mean: Tensor, X: Tensor) -> Tensor:
    """The blocks of H / m from the sums [n, n, 2 + 2d + d^2] of `kernel` and F / m [n, d]: [n d, n d]."""
    n, d = X.shape
    one, sign, w, sign_w, ww = sums.split([1, 1, d, d, d * d], dim=-1)
    left, right = mean[:, None, :], mean[None, :, :]  # f_i and f_j: [n, 1, d], [1, n, d]
    outer = ww.view(n, n, d, d) - sign_w[..., None] * right[..., None, :] - left[..., None] * sign_w[..., None, :]
    outer = outer + (one * left)[..., None] * right[..., None, :]  # sum_r S_ir S_jr v_ir v_jr^T
    blocks = one[..., None] * torch.eye(d, dtype=X.dtype, device=X.device)
    blocks = blocks + X[None, :, :, None] * (w - sign * right)[..., None, :]  # x_j (sum_r S_ir S_jr a_r v_jr)^T
    blocks = blocks + (w - sign * left)[..., None] * X[:, None, None, :]
    blocks = blocks + (X @ X.T)[..., None, None] * outer
    return blocks.transpose(1, 2).reshape(n * d, n * d)


def limit_kernel(X: Tensor, sigma: float) -> Tensor:
    """The limit of H(W(0)) as m grows [..., n d, n d], for independent signs and for pairs.

    Block (i, j) is exp(sigma^2 x_i.x_j) (I + x_j u^T + u x_i^T + (x_i.x_j) (sigma^2 I + u u^T)) with
    u = sigma^2 (x_i + x_j).
    """
    n, d = X.shape[-2:]
    inner = X @ X.mT
    u = sigma**2 * (X[..., :, None, :] + X[..., None, :, :])  # [..., n, n, d]
    identity = torch.eye(d, dtype=X.dtype, device=X.device)
    blocks = identity + X[..., None, :, :, None] * u[..., None, :] + u[..., None] * X[..., :, None, None, :]
    blocks = blocks + inner[..., None, None] * (sigma**2 * identity + u[..., None] * u[..., None, :])
    blocks = torch.exp(sigma**2 * inner)[..., None, None] * blocks
    return blocks.transpose(-3, -2).reshape(*X.shape[:-2], n * d, n * d)
