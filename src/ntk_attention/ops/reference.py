"""NTK-Attention in the paper's letters: the reference that every faster path is tested against.

    T = D^-1 (A V + phi(Q) Z),   D = diag(A 1 + phi(Q) k),   A = exp(s Q K^T)        (Algorithm 2 of the paper)

A set of keys is a block of the softmax: the log of its weight, and its normalised value. Real tokens, prefix tokens
that are all there, a prefix held in (Z, k), and a sink are such blocks, and T is the value of all of them merged.
Everything is written out and differentiated by autograd, in float32 or, for float64 inputs, in float64.

Letters: B rows of the batch, H heads, L queries, S keys, d and d_v sizes of a head, r features. A key head, or a head
of the state, serves the G = H / H_kv neighbouring query heads of its group.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .exact import LayerPrefix
from .rotation import Rotation, unrotated
from .state import PrefixState, RowStates


class Block(NamedTuple):
    """The part of a softmax that a set of keys contributes."""

    out: Tensor  # [B, H, L, d_v], D^-1 A V of these keys alone; 0 where they have no weight
    lse: Tensor  # [B, H, L], log of the row sums of A; -inf where they have no weight


def scores(
    Q: Tensor, K: Tensor, s: float, *, mask: Tensor | None = None, is_causal: bool = False, softcap: float | None = None
) -> Tensor:
    """Logits log A = s Q K^T [B, H, L, S]; -inf where a key is hidden.

    Args:
        Q: [B, H, L, d].
        K: [B, H_kv, S, d], or [1, H_kv, S, d] where every row sees the same keys.
        s: scale of the logits.
        mask: broadcastable to [B, H, L, S]: bool (True takes part) or added to the logits.
        is_causal: query i sees the keys j <= i.
        softcap: logits become softcap * tanh(logits / softcap) before the mask (Gemma 2).
    """
    dtype = torch.promote_types(Q.dtype, torch.float32)
    K = K.to(dtype).repeat_interleave(Q.shape[1] // K.shape[1], dim=1)
    logits = s * Q.to(dtype) @ K.transpose(-1, -2)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if is_causal:
        visible = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
        logits = logits.masked_fill(~visible, -math.inf)
    if mask is None:
        return logits
    return logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask.to(dtype)


def token_block(logits: Tensor, V: Tensor, dropout_p: float = 0.0) -> Block:
    """The block of keys with these logits [B, H, L, S] and values V [B, H_kv, S, d_v]; dropout is on their weights."""
    peak = torch.nn.functional.pad(logits.detach(), (0, 1), value=-math.inf).amax(dim=-1, keepdim=True)
    peak = peak.masked_fill(peak == -math.inf, 0.0)  # nothing is visible
    A = torch.exp(logits - peak)
    D = A.sum(dim=-1, keepdim=True)
    has_weight = D > 0
    D = torch.where(has_weight, D, 1.0)
    A = torch.dropout(A, dropout_p, train=True) if dropout_p else A
    V = V.to(A.dtype).repeat_interleave(A.shape[1] // V.shape[1], dim=1)
    lse = torch.where(has_weight, torch.log(D) + peak, -math.inf)
    return Block(A @ V / D, lse.squeeze(-1))


def exact_scores(Q: Tensor, prefix: LayerPrefix, s: float, softcap: float | None = None) -> Tensor:
    """Logits [B, H, L, m] of prefix tokens that are all there, which every query sees."""
    w = prefix.log_weights
    mask = None if w is None else w.repeat_interleave(Q.shape[1] // len(w), dim=0)[None, :, None]
    return scores(Q, prefix.keys[None], s, mask=mask, softcap=softcap)


def phi_input(Q: Tensor, factor: float, rotation: Rotation | None = None) -> Tensor:
    """What phi acts on, [B, H, L, d]: sqrt(s) Q, without the positions that a rotation has put into Q."""
    x = Q.to(torch.promote_types(Q.dtype, torch.float32)) * factor
    return x if rotation is None else unrotated(x, rotation)


def prefix_block(Q: Tensor, state: PrefixState | RowStates, factor: float, rotation: Rotation | None = None) -> Block:
    """The block of a prefix held in (Z, k, b): value phi(Q) Z / phi(Q) k, log-weight log(phi(Q) k) + b.

    Args:
        Q: [B, H, L, d].
        state: with H heads, or fewer that divide H. One for all rows, or one for each.
        factor: what the query is multiplied by before phi: sqrt(s), unless the query is scaled already.
        rotation: the rotary positions of Q, which phi sees undone; None for phi(sqrt(s) Q) as it is.
    """
    dtype = torch.promote_types(torch.promote_types(Q.dtype, state.Z.dtype), torch.float32)
    B, H, L, _ = Q.shape
    G = H // state.num_heads
    phi, row_scale = state.feature_map.scaled(phi_input(Q, factor, rotation).to(dtype))
    phi = phi.reshape(B, state.num_heads, G * L, state.num_features)  # the queries of a group share its matrices
    Z, k, b = state.of_rows() if isinstance(state, RowStates) else (state.Z, state.k, state.log_scale)
    phi_Z = (phi @ Z.to(dtype)).view(B, H, L, Z.shape[-1])
    phi_k = (phi @ k.to(dtype)[..., None]).view(B, H, L)
    b = b.to(dtype).repeat_interleave(G, dim=-1)[..., None]
    # Where the signed monomials of a trained or rounded state sum to nothing positive, the prefix has no weight.
    has_weight = phi_k > torch.finfo(dtype).tiny
    phi_k = torch.where(has_weight, phi_k, 1.0)
    out = torch.where(has_weight[..., None], phi_Z / phi_k[..., None], 0.0)
    return Block(out, torch.where(has_weight, torch.log(phi_k) + row_scale + b, -math.inf))


def sink_block(logit: Tensor, Q: Tensor, value_dim: int) -> Block:
    """The block of one key per head whose value is 0; its logit is [H] (gpt-oss) or [B, H, L]."""
    dtype = torch.promote_types(Q.dtype, torch.float32)
    logit = logit[:, None] if logit.dim() == 1 else logit
    return Block(Q.new_zeros(*Q.shape[:-1], value_dim, dtype=dtype), logit.to(dtype).expand(Q.shape[:-1]))


def merge(first: Block, second: Block) -> Block:
    """Two sets of keys as one: values weighted by their shares of the softmax."""
    peak = torch.maximum(first.lse, second.lse).detach()
    peak = peak.masked_fill(peak == -math.inf, 0.0)  # neither has weight
    A, B = (torch.exp(block.lse - peak) for block in (first, second))
    has_weight = A + B > 0
    D = torch.where(has_weight, A + B, 1.0)
    out = (A / D)[..., None] * first.out + (B / D)[..., None] * second.out
    return Block(out, torch.where(has_weight, torch.log(D) + peak, -math.inf))
