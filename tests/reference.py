"""References that share no code with the package: the paper's formula, and the same in logarithms for any scale."""

import math

import torch


def naive(query, key, value, Z, k, b, phi, *, mask=None, is_causal=False, scale=None):
    """Algorithm 2 as printed, in the dtype given: T = D^-1 (A V + phi(Q) Z). Only for moderate logits."""
    H, d = query.shape[1], query.shape[-1]
    s = d**-0.5 if scale is None else scale
    K, V = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (key, value))
    Z, k = (x.repeat_interleave(H // x.shape[0], dim=0) for x in (Z * b.exp()[:, None, None], k * b.exp()[:, None]))
    A = torch.exp(s * query @ K.mT)
    if is_causal:
        A = A * torch.ones(A.shape[-2:], dtype=A.dtype, device=A.device).tril()
    if mask is not None:
        A = A * mask if mask.dtype == torch.bool else A * mask.exp()
    Phi = phi(math.sqrt(s) * query)  # [B, H, L, r]
    D = A.sum(-1) + torch.einsum("bhlr,hr->bhl", Phi, k)
    return (A @ V + torch.einsum("bhlr,hrd->bhld", Phi, Z)) / D[..., None]


def elu_phi(x):
    return torch.where(x > 0, x + 1, torch.exp(x))


def log_elu_phi(x):
    return torch.where(x > 0, torch.log1p(x.clamp_min(0)), x)


def in_logarithms(query, key, value, Z, k, b, log_phi, *, mask=None, is_causal=False, scale=None):
    """The same for positive features at any scale: feature i is a token of logit log(phi_i k_i) + b, value Z_i / k_i.

    Rows that no real token is visible to are not told apart here.
    """
    B, H, _, d = query.shape
    s = d**-0.5 if scale is None else scale
    K, V = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (key, value))
    Z, k, b = (x.repeat_interleave(H // x.shape[0], dim=0) for x in (Z, k, b))
    logits = s * query @ K.mT
    if is_causal:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
    prefix_logits = log_phi(math.sqrt(s) * query) + k.log()[:, None] + b[:, None, None]
    weights = torch.softmax(torch.cat([logits, prefix_logits], dim=-1), dim=-1)
    values = torch.cat([V, (Z / k[..., None]).expand(B, -1, -1, -1)], dim=-2)
    return weights @ values


def relative_error(actual, expected, floor=0.0):
    """max |actual - expected| / max |expected|, both finite."""
    assert torch.isfinite(actual).all()
    if expected.numel() == 0:
        return 0.0
    expected = expected.double()
    scale = max(expected.abs().max().item(), floor, 1e-300)
    return (actual.double() - expected).abs().max().item() / scale
