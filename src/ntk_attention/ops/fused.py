"""The paths with the prefix inside: their gradients in closed form, their launches few.

The forward pass is one kernel of ours for everything, or the library's kernel with the prefix merged into its output.
The backward pass is the library's, fed the merged output and log-sum-exp (see sdpa.py), and one more kernel for the
prefix. Kernels are Triton's (triton/launch.py) where there are any, and otherwise torch's own operations
(fused_torch.py).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import fused_torch
from .bundles import StateTensors, Tokens
from .plan import Path
from .sdpa import (
    additive_mask,
    empty_output,
    laid_out_as,
    laid_out_as_inputs,
    laid_out_as_query,
    library_backward,
    library_forward,
    needs_grad,
)
from .triton import decoder, launch

NUM_TOKENS = len(Tokens._fields)
Grads = tuple[Any, ...]  # tensors, or None
Backward = Callable[..., Grads]


def attend_fused(path: Path, tokens: Tokens, state: StateTensors) -> Tensor:
    """The merged output [B, H, L, d_v], by a path of plan.py."""
    compiling = torch.compiler.is_compiling()  # the operators serve torch.compile; without them a call is cheaper
    inputs = *tokens[:3], *state[:3]
    if not compiling and any(map(torch.is_neg, inputs)):
        # What torch's dispatcher does before it calls an operator: apply a sign that is still to be applied.
        query, key, value, Z, k, log_scale = (x.resolve_neg() for x in inputs)
        inputs = query, key, value, Z, k, log_scale
        tokens = tokens._replace(query=query, key=key, value=value)
        state = state._replace(Z=Z, k=k, log_scale=log_scale)
    if tokens.attn_mask is not None:
        shape = (*tokens.query.shape[:3], tokens.key.shape[2])
        tokens = tokens._replace(attn_mask=tokens.attn_mask.expand(shape))
    if path is Path.DECODE:
        return decode_op(*tokens, *state) if compiling else decoder.decode(tokens, state)
    if compiling:
        return forward_op(*tokens, *state, path.value)[0]
    if needs_grad(*inputs):
        return _Forward.apply(*inputs, tokens, state, path)
    return forward(tokens, state, path)[0]


def forward(tokens: Tokens, state: StateTensors, path: Path) -> tuple[Tensor, Tensor]:
    """out [B, H, L, d_v] and the log-sum-exp of all weights, those of the prefix included, [B, H, L] in float32.

    A row that no key is visible to has out = 0 and lse = +inf, which lets no gradient through.
    """
    if path in (Path.FUSED, Path.FUSED_SM90):
        return launch.fused_forward(tokens, state, path is Path.FUSED_SM90)
    query, attn_mask = tokens.query, tokens.attn_mask
    if attn_mask is not None:
        tokens = tokens._replace(attn_mask=additive_mask(attn_mask, query))
    context, lse, _, _ = library_forward(tokens)
    merge = fused_torch.merge_prefix if path is Path.MERGED_TORCH else launch.merge_prefix
    out, lse = merge(query, context, lse, state)
    if attn_mask is not None:
        dead = ~attn_mask.any(dim=-1)
        out, lse = out.masked_fill_(dead[..., None], 0.0), lse.masked_fill_(dead, math.inf)
    return laid_out_as_query(query, out), lse.contiguous()


def backward(
    grad_out: Tensor, out: Tensor, lse: Tensor, tokens: Tokens, state: StateTensors, path: Path, inputs_need_grad: bool
) -> Grads:
    """Gradients to query, key, value (None unless `inputs_need_grad`), Z and k."""
    query = tokens.query
    grads: tuple[Tensor | None, ...] = (None, None, None)
    grad_out = grad_out.resolve_neg()
    if inputs_need_grad:
        if tokens.attn_mask is not None:
            tokens = tokens._replace(attn_mask=additive_mask(tokens.attn_mask, query))
        grads = library_backward(grad_out, out, lse, None, None, tokens)
    prefix_backward = fused_torch.prefix_backward if path is Path.MERGED_TORCH else launch.prefix_backward
    grad_Z, grad_k = prefix_backward(grad_out, query, out, lse, grads[0], state)
    return *grads, grad_Z.to(state.Z.dtype), grad_k.to(state.k.dtype)


# The same as autograd knows it without torch's dispatcher, and as operators for torch.compile.


def save(ctx: Any, output: tuple[Tensor, Tensor], tokens: Tokens, state: StateTensors, path: Path) -> None:
    ctx.save_for_backward(*output, *tokens[:4], *state[:6])
    ctx.options = tokens[4:], state[6:], path


def gradients(ctx: Any, grad_out: Tensor, inputs_need_grad: bool, b_needs_grad: bool, backward: Backward) -> Grads:
    """To query, key, value, Z, k and b."""
    out, lse, *tensors = ctx.saved_tensors
    token_options, state_options, path = ctx.options
    tokens, state = Tokens(*tensors[:4], *token_options), StateTensors(*tensors[4:], *state_options)
    *grads, grad_Z, grad_k = backward(grad_out, out, lse, tokens, state, path, inputs_need_grad)
    grad_b = None
    if b_needs_grad:  # Z and k carry the factor e^b
        grad_b = ((state.Z * grad_Z).sum(dim=(1, 2)) + (state.k * grad_k).sum(dim=1)).to(state.log_scale.dtype)
    return *(grads if inputs_need_grad else (None, None, None)), grad_Z, grad_k, grad_b


class _Forward(torch.autograd.Function):
    """Of (query, key, value, Z, k, b, tokens, state, path); the bundles hold the same tensors."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *_, tokens, state, path = inputs
        output = forward(tokens, state, path)
        save(ctx, output, tokens, state, path)
        return output[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> Grads:
        needed = ctx.needs_input_grad
        return *gradients(ctx, grad_out, any(needed[:3]), needed[5], backward), None, None, None


@torch.library.custom_op("ntk_attention::forward", mutates_args=())
def forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    Z: Tensor,
    k: Tensor,
    log_scale: Tensor,
    index: Tensor | None,
    W: Tensor | None,
    table: Tensor | None,
    constant: bool,
    factor: float,
    width: int,
    start: int,
    path: str,
) -> tuple[Tensor, Tensor]:
    tokens = Tokens(query, key, value, attn_mask, dropout_p, is_causal, scale)
    state = StateTensors(Z, k, log_scale, index, W, table, constant, factor, width, start)
    out, lse = forward(tokens, state, Path(path))
    return laid_out_as(empty_output(query, value), out), lse


@forward_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    return empty_output(query, value), query.new_empty(query.shape[:3], dtype=dtype)


@torch.library.custom_op("ntk_attention::backward", mutates_args=())
def backward_op(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    Z: Tensor,
    k: Tensor,
    log_scale: Tensor,
    index: Tensor | None,
    W: Tensor | None,
    table: Tensor | None,
    constant: bool,
    factor: float,
    width: int,
    start: int,
    path: str,
    inputs_need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens = Tokens(query, key, value, attn_mask, dropout_p, is_causal, scale)
    state = StateTensors(Z, k, log_scale, index, W, table, constant, factor, width, start)
    *grads, grad_Z, grad_k = backward(grad_out, out, lse, tokens, state, Path(path), inputs_need_grad)
    inputs = laid_out_as_inputs(grads, tokens[:3]) if inputs_need_grad else (query.new_empty(0) for _ in range(3))
    return *inputs, grad_Z, grad_k.clone()  # an operator may not return views of one another


@backward_op.register_fake
def _(
    grad_out: Tensor, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    Z, k, inputs_need_grad = others[4], others[5], others[-1]
    inputs = (torch.empty_like(x) if inputs_need_grad else query.new_empty(0) for x in (query, key, value))
    return (*inputs, Z.new_empty(Z.shape), k.new_empty(k.shape))


def operator_backward(
    grad_out: Tensor, out: Tensor, lse: Tensor, tokens: Tokens, state: StateTensors, path: Path, inputs_need_grad: bool
) -> Grads:
    return backward_op(grad_out, out, lse, *tokens, *state, path.value, inputs_need_grad)


def operator_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *flat, path = inputs
    save(ctx, output, Tokens(*flat[:NUM_TOKENS]), StateTensors(*flat[NUM_TOKENS:]), Path(path))


def operator_gradients(ctx: Any, grad_out: Tensor, _: Any) -> Grads:
    """For each of `(*tokens, *state, path)`."""
    needed = ctx.needs_input_grad
    *inputs, grad_Z, grad_k, grad_b = gradients(
        ctx, grad_out, any(needed[:3]), needed[NUM_TOKENS + 2], operator_backward
    )
    no_tokens, no_state = (None,) * (NUM_TOKENS - 3), (None,) * (len(StateTensors._fields) - 3)
    return *inputs, *no_tokens, grad_Z, grad_k, grad_b, *no_state, None


forward_op.register_autograd(operator_gradients, setup_context=operator_save)


@torch.library.custom_op("ntk_attention::decode", mutates_args=())
def decode_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    Z: Tensor,
    k: Tensor,
    log_scale: Tensor,
    index: Tensor | None,
    W: Tensor | None,
    table: Tensor | None,
    constant: bool,
    factor: float,
    width: int,
    start: int,
) -> Tensor:
    tokens = Tokens(query, key, value, attn_mask, dropout_p, is_causal, scale)
    return decoder.decode(tokens, StateTensors(Z, k, log_scale, index, W, table, constant, factor, width, start))


@decode_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Tensor:
    B, H, L, _ = query.shape
    return query.new_empty(B, L, H, value.shape[-1]).transpose(1, 2)
