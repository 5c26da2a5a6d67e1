"""Attention over m real prefix tokens, the method that NTK-Attention replaces, done as fast as torch's kernels allow.

Every query sees the whole prefix and, causally, the other tokens. The prefix keys and values [1, H_kv, m, d] are the
same for the whole batch, as in prefix tuning.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import CausalBias

from ntk_attention.ops.sdpa import context_backward, context_forward


def prefix_cat(query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor, bias: CausalBias):
    """The usual way: the prefix in front of keys and values, then one kernel with a bottom-right causal mask."""
    B, H, _, _ = query.shape
    key, value = (
        torch.cat([prefix.expand(B, -1, -1, -1), x], dim=2) for prefix, x in ((prefix_key, key), (prefix_value, value))
    )
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=key.shape[1] != H)


def prefix_merge(query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor) -> Tensor:
    """Two kernels, one over the prefix and one causal over the rest, merged by their log-sum-exp."""
    return _PrefixMerge.apply(query, key, value, prefix_key, prefix_value)


class _PrefixMerge(torch.autograd.Function):
    """Both backward kernels get the merged output and log-sum-exp, which makes them exact (see ntk_attention.sdpa)."""

    @staticmethod
    def forward(ctx, query, key, value, prefix_key, prefix_value):
        scale = query.shape[-1] ** -0.5
        over_prefix = align(query, prefix_key, prefix_value)
        out, lse, seed, offset = context_forward(query, key, value, None, 0.0, True, scale)
        prefix_out, prefix_lse, *_ = context_forward(*over_prefix, None, 0.0, False, scale)
        prefix_out, prefix_lse = spread(prefix_out, len(query)), spread(prefix_lse, len(query))
        merged = torch.lerp(prefix_out, out, torch.sigmoid(lse - prefix_lse)[..., None].to(out.dtype))
        ctx.save_for_backward(
            query, key, value, prefix_key, prefix_value, merged, torch.logaddexp(lse, prefix_lse), seed, offset
        )
        return merged

    @staticmethod
    def backward(ctx, grad_out):
        query, key, value, prefix_key, prefix_value, merged, lse, seed, offset = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        grad_query, grad_key, grad_value = context_backward(
            grad_out, merged, lse, seed, offset, query, key, value, None, 0.0, True, scale
        )
        rows, keys, values = align(query, prefix_key, prefix_value)
        if len(rows) != len(query):
            grad_out, merged, lse = fold(grad_out), fold(merged), fold(lse)
        grad_rows, grad_keys, grad_values = context_backward(
            grad_out, merged, lse, seed, offset, rows, keys, values, None, 0.0, False, scale
        )
        grad_query = grad_query + spread(grad_rows, len(query))
        return grad_query, grad_key, grad_value, grad_keys.sum(0, keepdim=True), grad_values.sum(0, keepdim=True)


def align(query: Tensor, prefix_key: Tensor, prefix_value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and prefix with one batch size: the smaller of the two is copied."""
    B, H, L, _ = query.shape
    _, H_kv, m, _ = prefix_key.shape
    if 2 * H_kv * m < H * L:
        return query, prefix_key.expand(B, -1, -1, -1).contiguous(), prefix_value.expand(B, -1, -1, -1).contiguous()
    return fold(query), prefix_key, prefix_value


def fold(x: Tensor) -> Tensor:
    """[B, H, L, ...] -> [1, H, B L, ...]"""
    return x.transpose(0, 1).flatten(1, 2).unsqueeze(0)


def spread(x: Tensor, B: int) -> Tensor:
    """[1, H, B L, ...] -> [B, H, L, ...]; as it is where the batch was never folded."""
    return x if len(x) == B else x.squeeze(0).unflatten(1, (B, -1)).transpose(0, 1)
