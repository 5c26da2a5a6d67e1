"""NTK-Attention: attention over real tokens and over a prefix state.

    T = D^-1 (A V + phi(Q) Z),   D = diag(A 1 + phi(Q) k),   A = exp(scale Q K^T)        (Algorithm 2 of the paper)

The mathematics stands in reference.py. A call is checked (checks.py), planned (plan.py) and run: by the reference, by
torch's own kernels (sdpa.py), or with the prefix inside (fused.py).
"""

import math
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .bundles import Prefixes, StateTensors, Tokens
from .checks import check_arguments, check_inputs, check_rotation
from .exact import LayerPrefix
from .fused import attend_fused
from .plan import Path, plan_attention
from .reference import Block, exact_scores, merge, prefix_block, scores, sink_block, token_block
from .rotation import Rotation
from .sdpa import HiddenRows, additive_mask, attend_sdpa, context, hidden_rows, needs_grad
from .state import PrefixState, RowStates


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
    rotation: Rotation | None = None,
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
        rotation: the rotary positions of the query. phi sees the query without them, so that the prefix is the same at
            every position; by default it sees the query as it is.
        backend: "eager" (the reference: any dtype, O(L S) memory), "sdpa" (torch's kernels, O(L) memory), "triton"
            (our kernels) or "auto", the fastest by measurement (plan.py). What the kernels of one do not cover goes to
            the one before it: "triton" covers bf16 and fp16 on a GPU with the map `elu`, bf16 with up to 512
            `positive_random` features, and no dropout; "sdpa" all but a mask that needs a gradient and dropout on a
            CPU.

    Returns:
        [B, H, L, d_v] in the dtype of query.

    Raises:
        ValueError: if shapes, heads, r, d, dtypes, devices or options do not fit each other; the message gives both
            sides.
    """
    check_inputs(query, key, value)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    tokens = Tokens(query, key, value, attn_mask, dropout_p, is_causal, scale)
    check_arguments(tokens, state, enable_gqa, backend)
    if rotation is not None:
        check_rotation(rotation, query)
    prefixes = Prefixes([state], math.sqrt(scale), rotation=rotation)
    if not torch.is_autocast_enabled(query.device.type):
        return attend(tokens, prefixes, backend=backend)
    query, key, value = autocast_inputs(query, key, value)
    with without_autocast(query.device.type):
        return attend(tokens._replace(query=query, key=key, value=value), prefixes, backend=backend)


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


def attend(tokens: Tokens, prefixes: Prefixes, *, softcap: float | None = None, backend: str = "auto") -> Tensor:
    """Attention over real tokens and over prefixes, [B, H, L, d_v] in the dtype of query; arguments checked before.

    Args:
        prefixes: at least a state or exact tokens.
        softcap: logits become softcap * tanh(logits / softcap) before the mask (Gemma 2).
        backend: as in `ntk_attention`.
    """
    path = plan_attention(tokens, prefixes, softcap, backend)
    if path.is_fused:
        state = prefixes.only_state
        assert state is not None
        return attend_fused(path, tokens, StateTensors.of(state, tokens.query, prefixes.factor, prefixes.rotation))
    query, key, value, attn_mask, *_ = tokens
    hidden = None if attn_mask is None else hidden_rows(attn_mask)
    prefix = hide_prefix(states_block(query, prefixes, tokens.scale, softcap), hidden, key.shape[2])
    if prefixes.sink is not None:
        prefix = merge(prefix, sink_block(prefixes.sink, query, value.shape[-1]))
    if path is Path.SDPA:
        return attend_sdpa(tokens, prefix)
    out = merge(real_block(tokens, softcap), prefix).out
    if hidden is not None:
        out = torch.where(hidden.dead[..., None], out.detach(), out)
    return out.to(query.dtype)


def states_block(query: Tensor, prefixes: Prefixes, scale: float, softcap: float | None = None) -> Block:
    """The prefixes but the sink, as one block."""
    blocks = [prefix_block(query, state, prefixes.factor, prefixes.rotation) for state in prefixes.states]
    if prefixes.exact is not None:
        blocks.append(exact_block(query, prefixes.exact, scale, softcap))
    return reduce(merge, blocks)


def real_block(tokens: Tokens, softcap: float | None = None) -> Block:
    """The block of the real tokens, every score written out."""
    query, key, value, attn_mask, dropout_p, is_causal, scale = tokens
    logits = scores(query, key, scale, mask=attn_mask, is_causal=is_causal, softcap=softcap)
    return token_block(logits, value, dropout_p)


def exact_block(query: Tensor, prefix: LayerPrefix, scale: float, softcap: float | None = None) -> Block:
    """The block of prefix tokens that are all there, in float32 (float64); differentiable with respect to all inputs.

    Without gradients it is a kernel's, in O(L) memory; with them, or with weights of the tokens, every score is written
    out.
    """
    tensors = [x for x in (query, *prefix) if x is not None]
    if softcap is not None or prefix.log_weights is not None or needs_grad(*tensors):
        return token_block(exact_scores(query, prefix, scale, softcap), prefix.values[None])
    B, H, L, d = query.shape
    rows = query.transpose(0, 1).reshape(1, H, B * L, d)  # the whole batch sees the same tokens
    keys, values = (x.to(query.dtype)[None] for x in (prefix.keys, prefix.values))
    out, lse, _, _ = context(Tokens(rows, keys, values, scale=scale))
    dtype = torch.promote_types(query.dtype, torch.float32)
    return Block(*(x[0].unflatten(1, (B, L)).transpose(0, 1).to(dtype) for x in (out, lse)))


def attention_weights(tokens: Tokens, prefixes: Prefixes, softcap: float | None = None) -> Tensor:
    """The weights of the real tokens [B, H, L, S] in the dtype of query; what they lack to 1 is the prefix's."""
    query, key, value, attn_mask, _, is_causal, scale = tokens
    logits = scores(query, key, scale, mask=attn_mask, is_causal=is_causal, softcap=softcap)
    hidden = None if attn_mask is None else hidden_rows(attn_mask)
    lse = [logits.logsumexp(dim=-1)]
    if prefixes.states or prefixes.exact is not None:
        lse.append(hide_prefix(states_block(query, prefixes, scale, softcap), hidden, key.shape[2]).lse)
    if prefixes.sink is not None:
        lse.append(sink_block(prefixes.sink, query, value.shape[-1]).lse)
    total = torch.stack([x.to(logits.dtype) for x in lse]).logsumexp(dim=0)
    return torch.exp(logits - total.masked_fill(total == -math.inf, 0.0)[..., None]).to(query.dtype)


@torch.no_grad()
def context_block(tokens: Tokens, *, softcap: float | None = None, sink: Tensor | None = None) -> Block:
    """The block of the real tokens alone (with the sink), without gradients: plain attention and its log-sum-exp."""
    query, _, value, attn_mask, *_ = tokens
    tokens = tokens._replace(dropout_p=0.0)
    if softcap is not None or sink is not None:
        block = real_block(tokens, softcap)
        block = block if sink is None else merge(block, sink_block(sink, query, value.shape[-1]))
        return Block(block.out.to(query.dtype), block.lse)
    if attn_mask is not None:
        tokens = tokens._replace(attn_mask=additive_mask(attn_mask, query))
    out, lse, _, _ = context(tokens)
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
