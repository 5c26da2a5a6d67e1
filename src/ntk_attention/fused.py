"""The backend with the prefix inside: its gradients in closed form, its launches few.

For phi(x) = elu(x) + 1 there are two ways to the output: one kernel of ours for everything, and the library's kernel
with the prefix merged into its output. The backward pass is the library's, fed the merged output and log-sum-exp (see
sdpa.py), and one more kernel for the prefix. The kernels are Triton's (launches.py) where there are any, and otherwise
torch's own operations (portable.py).
"""

import math

import torch
from torch import Tensor

from . import launches, portable
from .features import Elu, PositiveRandom
from .sdpa import additive_mask, empty_output, laid_out_as, library_backward, library_forward
from .state import PrefixState, RowStates

# How "auto" computes the forward pass with Triton, by measurement on an H100 (results/benchmarks). Up to some length
# our fused kernel, which reads everything once; from there on the library's kernel, whose products are faster, and one
# more of ours that merges the prefix. With a mask it is always the fused kernel.
AUTO = (  # the largest head_dim that the row is for, the query length from which the prefix is merged
    (64, 8192),
    (128, 2048),
    (256, math.inf),
)


def covers(query: Tensor, key: Tensor, value: Tensor, state: PrefixState | RowStates, attn_mask: Tensor | None) -> bool:
    """What this backend can do; the caller sees to dropout, softcap and sinks, which it cannot."""
    if query.numel() == 0 or key.numel() == 0 or not (attn_mask is None or attn_mask.dtype == torch.bool):
        return False
    if isinstance(state, RowStates) and not (
        launches.covers(query, value) and state.Z.numel() < 2**31 and not _needs_grad(query, key, value, state)
    ):
        return False
    if type(state.feature_map) is PositiveRandom:
        return launches.covers_random(query, value, state.num_features)
    # Without our kernel, sdpa.py knows better how to decode.
    return type(state.feature_map) is Elu and (launches.covers(query, value) or query.shape[2] > 1)


def _needs_grad(query: Tensor, key: Tensor, value: Tensor, state: PrefixState | RowStates) -> bool:
    tensors = (query, key, value, state.Z, state.k, state.log_scale)
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def attend_fused(query, key, value, state, factor, attn_mask, is_causal, scale, prefer="auto"):
    """Arguments as in `operation.attend`; returns the merged output. `prefer`: "auto", or "triton" for no library."""
    B, H, L, d = query.shape
    phi = state.feature_map
    directions = phi.bind(d).projection if isinstance(phi, PositiveRandom) else None
    W = None if directions is None else directions.to(query.device, torch.float32)
    index = state.index if isinstance(state, RowStates) else None
    compiling = torch.compiler.is_compiling()  # the operators serve torch.compile; without them a call is cheaper
    inputs = (query, key, value, state.Z, state.k, state.log_scale)
    if not compiling:  # what torch's dispatcher does before it calls an operator
        query, key, value, Z, k, log_scale = (x.resolve_neg() if x.is_neg() else x for x in inputs)
        inputs = (query, key, value, Z, k, log_scale)
    tensors = (*inputs, index, W)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(B, H, L, key.shape[2])
    constant = phi.constant
    needs_grad = _needs_grad(query, key, value, state)
    if launches.covers(query, value):
        is_short = H // key.shape[1] * L <= launches.MAX_DECODE_ROWS
        if not needs_grad and is_short and not is_causal:
            decode = decode_op if compiling else launches.decode
            return decode(*tensors, attn_mask, constant, scale, factor)
        merge_from = next(length for largest, length in AUTO if max(d, value.shape[-1]) <= largest)
        merges = prefer == "auto" and W is None and attn_mask is None and merge_from <= L
    else:
        merges = True
    forward = forward_op if compiling else _EagerForward.apply if needs_grad else _forward
    return forward(*tensors, attn_mask, constant, is_causal, scale, factor, merges)[0]


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    Z: Tensor,
    k: Tensor,
    log_scale: Tensor,
    index: Tensor | None,
    W: Tensor | None,
    attn_mask: Tensor | None,
    constant: bool,
    is_causal: bool,
    scale: float,
    factor: float,
    merges: bool,
) -> tuple[Tensor, Tensor]:
    """out [B, H, L, d_v] and the log-sum-exp of all weights, those of the prefix included, [B, H, L] in float32.

    A row that no key is visible to has out = 0 and lse = +inf, which lets no gradient through.
    """
    state = Z, k, log_scale
    if not merges:
        return launches.fused_forward(
            query, key, value, *state, index, W, attn_mask, constant, is_causal, scale, factor
        )  # fmt: skip
    mask = None if attn_mask is None else additive_mask(attn_mask, query)
    context, lse, _, _ = library_forward(query, key, value, mask, 0.0, is_causal, scale)
    if launches.covers(query, value):
        out, lse = launches.merge_prefix(query, context, lse, *state, index, constant, factor)
    else:
        out, lse = portable.merge_prefix(query, context, lse, *state, constant, factor)
    if attn_mask is not None:
        dead = ~attn_mask.any(dim=-1)
        out, lse = out.masked_fill_(dead[..., None], 0.0), lse.masked_fill_(dead, math.inf)
    return laid_out_as(empty_output(query, value), out), lse.contiguous()


forward_op = torch.library.custom_op("ntk_attention::forward", _forward, mutates_args=())


@forward_op.register_fake
def _(query, key, value, Z, k, log_scale, index, W, attn_mask, constant, is_causal, scale, factor, merges):
    dtype = torch.promote_types(query.dtype, torch.float32)
    return empty_output(query, value), query.new_empty(query.shape[:3], dtype=dtype)


def _backward(
    grad_out, query, key, value, Z, k, log_scale, W, attn_mask, out, lse, constant, is_causal, scale, factor,
    inputs_need_grad,
):  # fmt: skip
    """Gradients to query, key, value (empty unless `inputs_need_grad`), Z and k."""
    grads: tuple[Tensor, ...] = tuple(query.new_empty(0) for _ in range(3))
    grad_out = grad_out.resolve_neg()
    if inputs_need_grad:
        no_seed = torch.empty(0, dtype=torch.long, device=query.device)
        mask = None if attn_mask is None else additive_mask(attn_mask, query)
        grads = library_backward(grad_out, query, key, value, out, lse, mask, no_seed, no_seed, 0.0, is_causal, scale)
    rows = grad_out, query, out, lse, grads[0] if inputs_need_grad else None
    if launches.covers(query, value):
        grad_Z, grad_k = launches.prefix_backward(*rows, Z, k, log_scale, W, constant, factor)
    else:
        grad_Z, grad_k = portable.prefix_backward(*rows, Z, k, log_scale, constant, factor)
    return *grads, grad_Z.to(Z.dtype), grad_k.to(k.dtype)


@torch.library.custom_op("ntk_attention::backward", mutates_args=())
def backward_op(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    Z: Tensor,
    k: Tensor,
    log_scale: Tensor,
    W: Tensor | None,
    attn_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    constant: bool,
    is_causal: bool,
    scale: float,
    factor: float,
    inputs_need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *grads, grad_k = _backward(
        grad_out, query, key, value, Z, k, log_scale, W, attn_mask, out, lse, constant, is_causal, scale, factor,
        inputs_need_grad,
    )  # fmt: skip
    return *grads, grad_k.clone()  # an operator may not return views of one another


@backward_op.register_fake
def _(grad_out, query, key, value, Z, k, log_scale, W, attn_mask, out, lse, constant, is_causal, scale, factor, needed):
    inputs = (torch.empty_like(x) if needed else query.new_empty(0) for x in (query, key, value))
    return (*inputs, Z.new_empty(Z.shape), k.new_empty(k.shape))


def _setup_context(ctx, inputs, output):
    query, key, value, Z, k, log_scale, _, W, attn_mask, *options, _ = inputs
    ctx.save_for_backward(query, key, value, Z, k, log_scale, W, attn_mask, *output)
    ctx.options = options


def _gradients(ctx, grad_out, backward):
    """For each input of `_forward`, by either form of `_backward`."""
    query, key, value, Z, k, log_scale, W, attn_mask, out, lse = ctx.saved_tensors
    inputs_need_grad = any(ctx.needs_input_grad[:3])
    inputs = query, key, value, Z, k, log_scale, W, attn_mask, out, lse
    *grad_inputs, grad_Z, grad_k = backward(grad_out, *inputs, *ctx.options, inputs_need_grad)
    grad_log_scale = None
    if ctx.needs_input_grad[5]:  # Z and k carry the factor e^b
        grad_log_scale = ((Z * grad_Z).sum(dim=(1, 2)) + (k * grad_k).sum(dim=1)).to(log_scale.dtype)
    grad_inputs = grad_inputs if inputs_need_grad else (None, None, None)
    return *grad_inputs, grad_Z, grad_k, grad_log_scale, *(None,) * 8


forward_op.register_autograd(
    lambda ctx, grad_out, _: _gradients(ctx, grad_out, backward_op), setup_context=_setup_context
)


class _EagerForward(torch.autograd.Function):
    """`_forward` with gradients, without the dispatcher."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        ctx.mark_non_differentiable(output[1])
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, _):
        return _gradients(ctx, grad_out, _backward)


@torch.library.custom_op("ntk_attention::decode", mutates_args=())
def decode_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    Z: Tensor,
    k: Tensor,
    log_scale: Tensor,
    index: Tensor | None,
    W: Tensor | None,
    attn_mask: Tensor | None,
    constant: bool,
    scale: float,
    factor: float,
) -> Tensor:
    return launches.decode(query, key, value, Z, k, log_scale, index, W, attn_mask, constant, scale, factor)


@decode_op.register_fake
def _(query, key, value, Z, k, log_scale, index, W, attn_mask, constant, scale, factor):
    return empty_output(query, value)
