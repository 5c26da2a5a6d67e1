"""NTK-Attention: attention over real tokens and over a prefix state.

    T = D^-1 (A V + phi(Q) Z),   D = diag(A 1 + phi(Q) k),   A = exp(scale Q K^T)        (Algorithm 2 of the paper)

The prefix is one more block of attention, whose log-weight is log(phi(q).k) and whose value is phi(q) Z / phi(q).k.
Every backend merges that block with the block of real tokens: `attend_eager` below, the readable reference,
`attend_sdpa` in sdpa.py, on torch's own kernels, and `attend_fused` in fused.py, on our own.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .exact import LayerPrefix, exact_scores
from .fused import attend_fused, covers
from .sdpa import HiddenRows, additive_mask, attend_sdpa, context_forward, hidden_rows, supports_sdpa
from .state import PrefixState, RowStates
from .triton import launch

BACKENDS = ("auto", "eager", "sdpa", "triton")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Block(NamedTuple):
    """The part of a softmax that a set of keys contributes: its normalised output and the log of its weight."""

    out: Tensor  # [B, H, L, d_v]
    lse: Tensor  # [B, H, L]


def ntk_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: PrefixState | RowStates,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Scaled dot product attention with a prefix of any length, held in `state`.

    Conventions are those of `torch.nn.functional.scaled_dot_product_attention`; tensors may have any strides. Every
    query sees the prefix, also under `is_causal`; a row that no real token is visible to returns what plain attention
    returns there, and passes no gradient.

    Args:
        query: [B, H, L, d], in float64, float32, bfloat16 or float16.
        key: [B, H_kv, S, d].
        value: [B, H_kv, S, d_v].
        state: Z and k with H or H_kv heads, of any floating dtype; its arithmetic runs in float32 or, for float64
            inputs, in float64. `RowStates` gives every row of the batch its own.
        attn_mask: broadcastable to [B, H, L, S]: bool (True takes part) or additive in a floating dtype.
        dropout_p: on the weights of the real tokens; the prefix is never dropped.
        is_causal: query i sees the keys j <= i; not together with attn_mask.
        scale: of the logits, d^-1/2 by default. The feature map sees sqrt(scale) * query.
        enable_gqa: allow H to be a multiple of H_kv.
        backend: "eager" (the reference: any dtype, O(L S) memory), "sdpa" (torch's kernels, O(L) memory), "triton"
            (our kernels) or "auto", the fastest by measurement (the table `AUTO` in fused.py). What the kernels of one
            do not cover goes to the one before it: "triton" covers bf16 and fp16 on a GPU with the map `elu`, bf16
            with up to 512 `positive_random` features, and no dropout; "sdpa" all but a mask that needs a gradient and
            dropout on a CPU.

    Returns:
        [B, H, L, d_v] in the dtype of query.

    Raises:
        ValueError: if shapes, heads, r, d, dtypes, devices or options do not fit each other; the message gives both
            sides.
    """
    check_arguments(query, key, value, state, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = autocast_inputs(query, key, value)
    with without_autocast(query.device.type):
        factor = math.sqrt(scale)
        return attend(query, key, value, [state], factor, attn_mask, dropout_p, is_causal, scale, backend=backend)


def autocast_inputs(*inputs: Tensor) -> tuple[Tensor, ...]:
    """The inputs in the dtype of autocast, where it is on; what follows picks its own dtypes."""
    device_type = inputs[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return inputs
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in inputs)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Autocast off; nothing where it is off already: torch's context takes time in every layer of every step."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def prefix_block(query: Tensor, state: PrefixState | RowStates, factor: float) -> Block:
    """The block of the prefix: out = phi(Q) Z / phi(Q) k, lse = log(phi(Q) k) + b.

    Args:
        query: [B, H, L, d].
        state: with H heads, or fewer that divide H: then each serves the query heads of its group. One for all rows or
            one for each.
        factor: what the query is multiplied by before phi; sqrt(scale) unless the query is scaled already.

    Returns:
        out [B, H, L, d_v] and lse [B, H, L] in float32, or in float64 for a float64 query or state.
    """
    dtype = torch.promote_types(torch.promote_types(query.dtype, state.Z.dtype), torch.float32)
    B, H, L, _ = query.shape
    groups = H // state.num_heads
    phi, row_scale = state.feature_map.scaled(query.to(dtype) * factor)
    # [B, H, L, r] -> [B, H_state, G L, r]: the query heads of one state head share its matrices
    phi = phi.reshape(B, state.num_heads, groups * L, state.num_features)
    Z, k, b = state.of_rows() if isinstance(state, RowStates) else (state.Z, state.k, state.log_scale)
    phi_Z = (phi @ Z.to(dtype)).view(B, H, L, Z.shape[-1])
    phi_k = (phi @ k.to(dtype)[..., None]).view(B, H, L)
    b = b.to(dtype).repeat_interleave(groups, dim=-1)[..., None]
    # Where the signed monomials of a trained or rounded state sum to nothing positive, the prefix has no weight.
    has_weight = phi_k > torch.finfo(dtype).tiny
    phi_k = torch.where(has_weight, phi_k, 1.0)
    out = torch.where(has_weight[..., None], phi_Z / phi_k[..., None], 0.0)
    return Block(out, torch.where(has_weight, torch.log(phi_k) + row_scale + b, -math.inf))


def prefix_blocks(
    query: Tensor,
    states: Sequence[PrefixState | RowStates],
    factor: float,
    exact: LayerPrefix | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Block:
    """Several prefixes as one block; arguments as in `attend`."""
    blocks = [prefix_block(query, state, factor) for state in states]
    if exact is not None:
        blocks.append(exact_block(query, exact, scale, softcap))
    return reduce(merge_blocks, blocks)


def exact_block(query: Tensor, prefix: LayerPrefix, scale: float, softcap: float | None = None) -> Block:
    """The block of prefix tokens that are all there, in float32 (float64); differentiable with respect to all inputs.

    Without gradients it is a kernel's, in O(L) memory; with them, or with weights of the tokens, every score is written
    out.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    tensors = [x for x in (query, *prefix) if x is not None]
    plain = softcap is None and prefix.log_weights is None
    if plain and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        B, H, L, d = query.shape
        rows = query.transpose(0, 1).reshape(1, H, B * L, d)  # the whole batch sees the same tokens
        keys, values = (x.to(query.dtype)[None] for x in (prefix.keys, prefix.values))
        out, lse, _, _ = context_forward(rows, keys, values, None, 0.0, False, scale)
        out, lse = (x[0].unflatten(1, (B, L)).transpose(0, 1).to(dtype) for x in (out, lse))
        return Block(out, lse)
    logits = exact_scores(query, prefix, scale, softcap)
    values = prefix.values.to(dtype).repeat_interleave(query.shape[1] // prefix.values.shape[0], dim=0)
    return Block(torch.softmax(logits, dim=-1) @ values, torch.logsumexp(logits, dim=-1))


def merge_blocks(first: Block, second: Block) -> Block:
    """Two sets of keys as one: outputs weighted by their shares of the softmax."""
    lse = torch.logaddexp(first.lse, second.lse)
    share = torch.exp(first.lse - lse)[..., None]
    return Block(share * first.out + torch.exp(second.lse - lse)[..., None] * second.out, lse)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    states: Sequence[PrefixState | RowStates],
    factor: float,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    *,
    softcap: float | None = None,
    sink: Tensor | None = None,
    exact: LayerPrefix | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention over real tokens and over prefixes, one after another; as in `ntk_attention`, arguments checked before.

    Args:
        states: one or more; none only with `exact`.
        factor: what the query is multiplied by before phi; sqrt(scale) unless the query is scaled already.
        softcap: logits become softcap * tanh(logits / softcap) before the mask (Gemma2).
        sink: the logit of one more key per head whose value is 0: [H] (gpt-oss), or [B, H, L].
        exact: a prefix whose tokens are all there.
    """
    plain = dropout_p == 0 and softcap is None and sink is None and exact is None
    ours = backend == "auto" or (backend == "triton" and launch.covers(query, value))
    if ours and plain and len(states) == 1 and covers(query, key, value, states[0], attn_mask):
        return attend_fused(query, key, value, states[0], factor, attn_mask, is_causal, scale, backend)
    prefix = prefix_blocks(query, states, factor, exact, scale, softcap)
    hidden = None if attn_mask is None else hidden_rows(attn_mask)
    prefix = hide_prefix(prefix, hidden, key.shape[2])
    if sink is not None:
        prefix = merge_blocks(prefix, sink_block(sink, query, value))
    if backend == "eager" or softcap is not None or not supports_sdpa(query, attn_mask, dropout_p):
        return attend_eager(query, key, value, prefix, attn_mask, dropout_p, is_causal, scale, softcap).out
    return attend_sdpa(query, key, value, prefix, attn_mask, dropout_p, is_causal, scale)


def attend_eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: Block,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    softcap: float | None = None,
) -> Block:
    """The reference: every score is written out; autograd does the rest."""
    dtype = prefix.out.dtype
    groups = query.shape[1] // key.shape[1]
    K, V = (x.to(dtype).repeat_interleave(groups, dim=1) for x in (key, value))
    logits = masked_logits(query.to(dtype), K, attn_mask, is_causal, scale, softcap)
    hidden = None if attn_mask is None else hidden_rows(attn_mask)

    peak = torch.cat([logits, prefix.lse[..., None]], dim=-1).detach().amax(dim=-1, keepdim=True)
    peak = peak.masked_fill(peak == -math.inf, 0.0)  # nothing visible at all
    A = torch.exp(logits - peak)
    phi_k = torch.exp(prefix.lse[..., None] - peak)
    D = A.sum(dim=-1, keepdim=True) + phi_k
    AV = torch.dropout(A, dropout_p, train=True) @ V if dropout_p else A @ V
    out = (AV + phi_k * prefix.out) / D.masked_fill(D == 0, 1.0)
    if hidden is not None:
        out = torch.where(hidden.dead[..., None], out.detach(), out)
    return Block(out.to(query.dtype), (torch.log(D) + peak).squeeze(-1))


def masked_logits(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float, softcap: float | None
) -> Tensor:
    """Logits [B, H, L, S] of the real tokens, for as many key heads as query heads; -inf where a key is hidden."""
    logits = scale * query @ key.transpose(-1, -2)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if is_causal:
        visible = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
        logits = logits.masked_fill(~visible, -math.inf)
    if attn_mask is None:
        return logits
    if attn_mask.dtype == torch.bool:
        return logits.masked_fill(~attn_mask, -math.inf)
    return logits + attn_mask.to(logits.dtype)


def attention_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    states: Sequence[PrefixState | RowStates],
    factor: float,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    *,
    softcap: float | None = None,
    sink: Tensor | None = None,
    exact: LayerPrefix | None = None,
) -> Tensor:
    """The weights of the real tokens [B, H, L, S] in the dtype of query; what they lack to 1 is the prefix's.

    Arguments as in `attend`.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    K = key.to(dtype).repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = masked_logits(query.to(dtype), K, attn_mask, is_causal, scale, softcap)
    others = [prefix_blocks(query, states, factor, exact, scale, softcap)] if states or exact is not None else []
    hidden = None if attn_mask is None else hidden_rows(attn_mask)
    others = [hide_prefix(block, hidden, key.shape[2]) for block in others]
    if sink is not None:
        others.append(sink_block(sink, query, value))
    lse = torch.stack([logits.logsumexp(dim=-1), *(block.lse.to(dtype) for block in others)]).logsumexp(dim=0)
    weights = torch.exp(logits - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
    return weights.to(query.dtype)


def context_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    *,
    softcap: float | None = None,
    sink: Tensor | None = None,
) -> Block:
    """The block of the real tokens alone (with the sink), without gradients: plain attention and its log-sum-exp."""
    with torch.no_grad():
        if softcap is not None or sink is not None:
            sink = query.new_full(query.shape[1:2], -math.inf) if sink is None else sink
            nothing = sink_block(sink, query, value)
            return attend_eager(query, key, value, nothing, attn_mask, 0.0, is_causal, scale, softcap)
        mask = None if attn_mask is None else additive_mask(attn_mask, query)
        out, lse, _, _ = context_forward(query, key, value, mask, 0.0, is_causal, scale)
        if attn_mask is not None:
            out = out.masked_fill(hidden_rows(attn_mask).blank[..., None], 0.0)
        return Block(out, lse)


def hide_prefix(prefix: Block, hidden: HiddenRows | None, num_keys: int) -> Block:
    """Take the prefix away from rows that see no real token, which keep the output of the frozen model."""
    if num_keys == 0:
        return Block(prefix.out, prefix.lse.masked_fill(torch.ones_like(prefix.lse, dtype=torch.bool), -math.inf))
    if hidden is None:
        return prefix
    return Block(prefix.out, prefix.lse.masked_fill(hidden.dead, -math.inf))


def sink_block(sink: Tensor, query: Tensor, value: Tensor) -> Block:
    """One key per head with the logit `sink`, [H] or [B, H, L], and the value 0."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = query.new_zeros(*query.shape[:-1], value.shape[-1], dtype=dtype)
    return Block(out, (sink[:, None] if sink.dim() == 1 else sink).to(dtype).expand(query.shape[:-1]))


def check_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: PrefixState | RowStates,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    backend: str,
) -> None:
    check_inputs(query, key, value)
    B, H, L, _ = query.shape
    H_kv, S, d_v = value.shape[1:]
    if H_kv != H and (not enable_gqa or H % H_kv):
        raise ValueError(
            f"query has {H} heads and key {H_kv}: equal numbers are expected, or enable_gqa=True and a multiple"
        )
    check_state_fits(state, num_heads=H, num_kv_heads=H_kv, head_dim=query.shape[-1], value_dim=d_v)
    if isinstance(state, RowStates) and len(state.index) != B:
        raise ValueError(f"the state has an index of {len(state.index)} rows for a batch of {B}: expected as many")
    if attn_mask is not None:
        if is_causal:
            raise ValueError("attn_mask and is_causal=True exclude each other: put causality into the mask")
        check_mask(attn_mask, (B, H, L, S))
    for name, x in (("key", key), ("value", value), ("the state", state.Z), ("attn_mask", attn_mask)):
        if x is not None and x.device != query.device:
            raise ValueError(f"all tensors must be on one device, got query on {query.device} and {name} on {x.device}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if scale is not None and not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be positive and finite, got {scale}: phi acts on sqrt(scale) * query")
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: expected one of {BACKENDS}")


def check_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4:
            raise ValueError(f"{name} must be [B, H, L, d], got {list(x.shape)}")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}")
    B, d = query.shape[0], query.shape[3]
    if key.shape[0] != B or value.shape[0] != B or key.shape[3] != d or value.shape[1:3] != key.shape[1:3]:
        raise ValueError(
            f"key must be [{B}, H_kv, S, {d}] and value [{B}, H_kv, S, d_v] for query {list(query.shape)}, "
            f"got key {list(key.shape)} and value {list(value.shape)}"
        )
    same = query.dtype == key.dtype == value.dtype
    if torch.is_autocast_enabled(query.device.type):  # which makes all but float64 the same
        same = len({x.dtype == torch.float64 for x in (query, key, value)}) == 1
    if not same:
        raise ValueError(f"query, key and value must share a dtype, got {query.dtype}, {key.dtype}, {value.dtype}")
    for name, x in (("query", query), ("value", value)):
        if x.shape[1] == 0 or x.shape[3] == 0:
            raise ValueError(f"expected at least one head and a size of at least one, got {name} {list(x.shape)}")


def check_mask(attn_mask: Tensor, target: tuple[int, ...]) -> None:
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise ValueError(f"attn_mask must be bool or floating point, got {attn_mask.dtype}")
    sizes_fit = all(m == 1 or m == n for m, n in zip(reversed(attn_mask.shape), reversed(target), strict=False))
    if attn_mask.dim() > 4 or not sizes_fit:
        raise ValueError(f"attn_mask {list(attn_mask.shape)} does not broadcast to [B, H, L, S] = {list(target)}")


def check_state_fits(
    state: PrefixState | RowStates, *, num_heads: int, num_kv_heads: int, head_dim: int, value_dim: int
) -> None:
    """Raise ValueError unless the state has the heads, r and d_v that the attention needs."""
    if state.num_heads not in (num_heads, num_kv_heads):
        raise ValueError(
            f"the state has {state.num_heads} heads: expected {num_heads} (one per query head) or {num_kv_heads} "
            "(one per KV head)"
        )
    r = state.feature_map.num_features(head_dim)
    if state.num_features != r:
        raise ValueError(
            f"the state has r = {state.num_features} features, but {state.feature_map.name!r} makes r = {r} of "
            f"head_dim {head_dim}"
        )
    if state.Z.shape[-1] != value_dim:
        raise ValueError(f"the state has values of size {state.Z.shape[-1]}, the attention has {value_dim}")
