"""Attention over real tokens with every score written out, where torch has no kernel: float64 on a GPU."""

import math

import torch
from torch import Tensor

from .bundles import Tokens
from .reference import scores

Attended = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""out [B, H, L, d_v], lse [B, H, L] in float32 (float64), seed and offset of dropout."""


def _keep(weights: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """What dropout leaves of the weights; the same for the same seed."""
    if seed is None or not dropout_p:
        return weights
    generator = torch.Generator(weights.device).manual_seed(int(seed))
    kept = torch.rand(weights.shape, generator=generator, device=weights.device) >= dropout_p
    return weights * kept / (1 - dropout_p)


def _weights(tokens: Tokens, lse: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """exp(scores - lse) [B, H, L, S], and lse; by default that of these scores."""
    query, key, _, attn_mask, _, is_causal, scale = tokens
    logits = scores(query, key, scale, mask=attn_mask, is_causal=is_causal)
    lse = torch.logsumexp(logits, dim=-1) if lse is None else lse
    return torch.exp(logits - lse.masked_fill(lse == -math.inf, 0.0)[..., None]), lse


def math_forward(tokens: Tokens) -> Attended:
    """Where torch has no fused kernel for the inputs (float64 on a GPU): the scores are written out."""
    query, value, dropout_p = tokens.query, tokens.value, tokens.dropout_p
    weights, lse = _weights(tokens)
    values = value.to(weights.dtype).repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    seed = torch.randint(2**62, (1,), device=query.device) if dropout_p else None
    out = _keep(weights, dropout_p, seed) @ values
    return out.to(query.dtype), lse, seed, None


def math_backward(
    grad_out: Tensor, out: Tensor, lse: Tensor, seed: Tensor | None, tokens: Tokens
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, _, dropout_p, _, scale = tokens
    weights, _ = _weights(tokens, lse)
    kept, H_kv = _keep(weights, dropout_p, seed), key.shape[1]
    q, k, v, dout, o = (x.to(weights.dtype) for x in (query, key, value, grad_out, out))
    k, v = (x.repeat_interleave(q.shape[1] // H_kv, dim=1) for x in (k, v))
    grad_logits = kept * (dout @ v.transpose(-1, -2)) - weights * (dout * o).sum(dim=-1, keepdim=True)
    grad_query = scale * grad_logits @ k
    grad_key, grad_value = (
        g.unflatten(1, (H_kv, -1)).sum(dim=2)
        for g in (scale * grad_logits.transpose(-1, -2) @ q, kept.transpose(-1, -2) @ dout)
    )
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)
