"""The backend on torch's own attention kernels, with an exact backward and O(L) memory.

A flash kernel returns its output o and the log-sum-exp lse of its logits, all that is needed to merge it with the
prefix block. Its backward computes exp(scale q.k - lse) and rowsum(dout * out) and nothing else from its own forward.
So it is fed the MERGED out and lse, and returns the exact gradients of the real-token part of NTK-Attention, without
a score matrix and without a second Q K^T. What is left, the gradient to the prefix block, is elementwise.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .bundles import Tokens
from .kernel_choice import EFFICIENT, FLASH, MATH, choose_kernel
from .reference import Block
from .sdpa_math import Attended, math_backward, math_forward

aten = torch.ops.aten

HIDDEN = -1e30  # added to a logit that must not count; still finite after the kernels' change to base 2


# Before: torch 2.11 compiles `_MergedAttention` so that all its gradients are zero.
COMPILES_TO_ZEROS = torch.__version__ < "2.13"  # a TorchVersion, which compares numbers


def supports_sdpa(query: Tensor, attn_mask: Tensor | None, dropout_p: float) -> bool:
    """What no kernel here covers: a gradient to the mask, dropout on a CPU, and devices other than CPU and CUDA."""
    if dropout_p and torch.compiler.is_compiling():  # the kernels' random states differ in shape
        return False
    if COMPILES_TO_ZEROS and torch.compiler.is_compiling() and torch.is_grad_enabled():
        return False
    if attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        return False
    return query.is_cuda or (query.is_cpu and dropout_p == 0)


def attend_sdpa(tokens: Tokens, prefix: Block) -> Tensor:
    """The output [B, H, L, d_v] of real tokens merged with the block of the prefix."""
    query, key, value, attn_mask, _, is_causal, _ = tokens
    (B, H, L, d), H_kv, d_v = query.shape, key.shape[1], value.shape[-1]
    out, lse = prefix
    packed = L == 1 and H_kv != H and not is_causal
    if packed:  # decoding: the query heads of a KV head become its rows, so that its keys are read once
        G = H // H_kv
        out, lse = out.reshape(B, H_kv, G, d_v), lse.reshape(B, H_kv, G)
        if attn_mask is not None and attn_mask.dim() >= 3 and attn_mask.shape[-3] == H:
            attn_mask = attn_mask.unflatten(-3, (H_kv, -1)).squeeze(-2)
        tokens = tokens._replace(query=query.reshape(B, H_kv, G, d), attn_mask=attn_mask)
    if torch.compiler.is_compiling() or needs_grad(out, lse, *tokens[:3]):
        merged = _MergedAttention.apply(out, lse, *tokens)
    else:
        merged = merged_attention(Block(out, lse), tokens)[0]
    return merged.reshape(B, H, L, d_v) if packed else merged


def needs_grad(*tensors: Tensor) -> bool:
    if not torch.is_grad_enabled():
        return False
    for x in tensors:  # noqa: SIM110  # a generator takes longer, in every layer of every step
        if x.requires_grad:
            return True
    return False


def merged_attention(prefix: Block, tokens: Tokens) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The output, and what its gradient needs of it, the mask that the kernel saw last."""
    prefix_out, prefix_lse = prefix
    dead = None
    if tokens.attn_mask is not None:
        dead, blank = (rows[..., None] for rows in hidden_rows(tokens.attn_mask))
        tokens = tokens._replace(attn_mask=additive_mask(tokens.attn_mask, tokens.query))
    out, lse, seed, offset = context(tokens)
    # A row without a prefix, whose lse is -inf, keeps the kernel's own output and lse. With no keys either the shares
    # are exp(-inf), not exp(-inf + inf).
    lse_all = torch.logaddexp(lse, prefix_lse).to(lse.dtype).clamp_min(torch.finfo(lse.dtype).min)
    context_share, prefix_share = (torch.exp(x - lse_all)[..., None] for x in (lse, prefix_lse))
    merged = (out * context_share + prefix_out * prefix_share).to(tokens.query.dtype)
    if dead is not None:
        merged = merged.masked_fill(blank, 0.0)
        # The weights of a dead row are not to be had from its lse, near HIDDEN: with +inf they are 0.
        lse_all = lse_all.masked_fill(dead.squeeze(-1), math.inf)
    return merged, (prefix_out, prefix_share, out, context_share, lse_all, dead, seed, offset, tokens.attn_mask)


class _MergedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, prefix_out: Tensor, prefix_lse: Tensor, *flat: Any) -> Tensor:
        tokens = Tokens(*flat)
        merged, saved = merged_attention(Block(prefix_out, prefix_lse), tokens)
        ctx.save_for_backward(*saved, *tokens[:3])
        ctx.options = tokens[4:]
        return merged

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        prefix_out, prefix_share, out, context_share, lse_all, dead, seed, offset, mask, *tensors = ctx.saved_tensors
        query, key, value = tensors
        tokens = Tokens(query, key, value, mask, *ctx.options)
        if dead is not None:
            grad_out = grad_out.masked_fill(dead, 0.0)
        grads: tuple[Tensor | None, ...] = (None, None, None)
        grad_prefix_out = grad_prefix_lse = None
        if any(ctx.needs_input_grad[2:5]):
            merged = (out * context_share + prefix_out * prefix_share).to(tokens.query.dtype)
            given = grad_out, merged, lse_all, seed, offset
            is_compiling = torch.compiler.is_compiling()
            grads = context_backward(*given, *tokens) if is_compiling else library_backward(*given, tokens)
        if any(ctx.needs_input_grad[:2]):
            grad_prefix_out = prefix_share * grad_out
            # prefix_out - merged, without the rounding of merged
            grad_prefix_lse = (grad_prefix_out * context_share * (prefix_out - out)).sum(dim=-1)
        return grad_prefix_out, grad_prefix_lse, *grads, None, None, None, None


def additive_mask(attn_mask: Tensor, query: Tensor) -> Tensor:
    """As the kernels want it: additive, in the dtype of query, with four dimensions and without -inf.

    A row of nothing but -inf, or of the smallest number of its dtype, is NaN in some kernels. With HIDDEN instead, it
    is an even average over all keys, as it is for plain attention with the smallest number.
    """
    hidden = max(HIDDEN, torch.finfo(query.dtype).min)
    # A dimension that only repeats what it holds stays one entry: the kernels repeat it without memory.
    attn_mask = attn_mask[tuple(slice(1 if stride == 0 else None) for stride in attn_mask.stride())]
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, hidden)
    attn_mask = attn_mask.to(query.dtype).clamp_min(hidden)  # in this order: a narrower dtype has no such number
    return attn_mask.reshape((1,) * (4 - attn_mask.dim()) + attn_mask.shape)


class HiddenRows(NamedTuple):
    """Rows that see no real token: bool, broadcastable to [B, H, L]."""

    dead: Tensor  # everything is False, -inf or, as transformers hides keys, the smallest number of the mask's dtype
    blank: Tensor  # everything is False or -inf: there plain attention returns 0


def hidden_rows(attn_mask: Tensor) -> HiddenRows:
    if attn_mask.dtype == torch.bool:
        dead = ~attn_mask.any(dim=-1)
        return HiddenRows(dead, dead)
    if attn_mask.numel() == 0:  # of which there is no largest
        nothing = torch.ones(attn_mask.shape[:-1], dtype=torch.bool, device=attn_mask.device)
        return HiddenRows(nothing, nothing)
    peak = attn_mask.detach().amax(dim=-1)
    return HiddenRows(peak <= torch.finfo(attn_mask.dtype).min / 2, peak == -math.inf)


def library_forward(tokens: Tokens) -> Attended:
    """Attention over real tokens, by one of torch's kernels."""
    query, key, value, attn_mask, dropout_p, is_causal, scale = tokens
    B, H, L, _ = query.shape
    d_v = value.shape[-1]
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    if query.numel() == 0 or key.numel() == 0:
        empty = query.new_zeros(B, H, L, d_v)
        return empty, query.new_full((B, H, L), -math.inf, dtype=lse_dtype), None, None
    inputs = _fit_memory(query, key, value, attn_mask)
    kernel = choose_kernel(dropout_p, is_causal, scale, *inputs)
    if kernel == MATH:
        return math_forward(tokens)
    query, key, value, attn_mask = _fit_kernel(kernel, *inputs)
    seed = offset = None
    if query.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
        )
    elif kernel == FLASH:
        out, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )
    elif kernel == EFFICIENT:
        out, lse, seed, offset = aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
        )
    else:
        out, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, dropout_p, is_causal, False, scale=scale
        )
    if lse.shape != (B, H, L):  # cuDNN adds a dimension, the efficient kernel pads L
        lse = lse.reshape(B, H, -1)[..., :L]
    if dropout_p == 0:
        seed = offset = None
    return out if out.shape[-1] == d_v else out[..., :d_v], lse.to(lse_dtype), seed, offset


def empty_output(query: Tensor, value: Tensor) -> Tensor:
    """[B, H, L, d_v], with heads inside or outside as in query: transformers lays [B, L, H, d] out."""
    B, H, L, _ = query.shape
    if query.stride(1) < query.stride(2):
        return query.new_empty(B, L, H, value.shape[-1]).transpose(1, 2)
    return query.new_empty(B, H, L, value.shape[-1])


def laid_out_as(expected: Tensor, x: Tensor) -> Tensor:
    """x in the strides of `expected`, whose memory takes it where they differ."""
    return x if x.stride() == expected.stride() else expected.copy_(x)


def laid_out_as_query(query: Tensor, out: Tensor) -> Tensor:
    """out [B, H, L, d_v] laid out as `empty_output`, which is not made where out is so already."""
    heads_inside = query.stride(1) < query.stride(2)
    is_right = (out.transpose(1, 2) if heads_inside else out).is_contiguous()
    return out if is_right else empty_output(query, out).copy_(out)


# Custom operators, so that torch.compile takes the kernels as they are and compiles what stands around them.


@torch.library.custom_op("ntk_attention::context_forward", mutates_args=())
def context_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`library_forward` with outputs as a custom operator must have them: new memory in a layout known beforehand."""
    tokens = Tokens(query, key, value, attn_mask, dropout_p, is_causal, scale)
    out, lse, *seeds = library_forward(tokens)
    seed, offset = (query.new_empty(0, dtype=torch.long) if x is None else x.clone() for x in seeds)
    return laid_out_as(empty_output(query, value), out), lse.contiguous(), seed, offset


@context_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, ...]:
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    seed = query.new_empty(0, dtype=torch.long)
    return empty_output(query, value), query.new_empty(query.shape[:3], dtype=lse_dtype), seed, torch.empty_like(seed)


def context(tokens: Tokens) -> Attended:
    """`library_forward`, for torch.compile as its operator; without one a call is cheaper."""
    return context_forward(*tokens) if torch.compiler.is_compiling() else library_forward(tokens)


def library_backward(
    grad_out: Tensor, out: Tensor, lse: Tensor, seed: Tensor | None, offset: Tensor | None, tokens: Tokens
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to query, key and value, given the merged out and lse."""
    given = query, key, value = tokens[:3]
    attn_mask, dropout_p, is_causal, scale = tokens[3:]
    if query.numel() == 0 or key.numel() == 0:
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    fitted = _fit_memory(query, key, value, attn_mask)
    kernel = choose_kernel(dropout_p, is_causal, scale, *fitted)
    if kernel == MATH:
        return math_backward(grad_out, out, lse, seed, tokens)
    fitted = _fit_kernel(kernel, *fitted)
    grad_out, out = (readable(pad_to(x, fitted[2].shape[-1])) for x in (grad_out, out))
    grads = _kernel_backward(kernel, grad_out, out, lse, seed, offset, Tokens(*fitted, dropout_p, is_causal, scale))
    if grads[1].shape[1] != key.shape[1]:  # the kernel saw repeated KV heads
        of_key, of_value = (g.unflatten(1, (key.shape[1], -1)).sum(dim=2) for g in grads[1:])
        grads = grads[0], of_key, of_value
    if grads[0].shape[-1] == query.shape[-1] == value.shape[-1]:
        return grads
    grad_query, grad_key, grad_value = (g[..., : x.shape[-1]] for g, x in zip(grads, given, strict=True))
    return grad_query, grad_key, grad_value


def _kernel_backward(
    kernel: int, grad_out: Tensor, out: Tensor, lse: Tensor, seed: Tensor | None, offset: Tensor | None, tokens: Tokens
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of one of torch's kernels, for inputs that fit it."""
    query, key, value, attn_mask, dropout_p, is_causal, scale = tokens
    L, S = query.shape[2], key.shape[2]
    if query.is_cuda:
        # As torch's own outputs lie in memory, which the kernels take for granted: with others cuDNN's gradients were
        # wrong (torch 2.11 on an H200).
        grad_out, out = (_laid_out_like(query, x) for x in (grad_out, out))
    lse = lse.contiguous()
    inputs = (grad_out, query, key, value)
    if query.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *inputs, out, lse, 0.0, is_causal, attn_mask=attn_mask, scale=scale
        )
    if dropout_p == 0:  # not read, but asked for
        seed = query.new_empty(2, dtype=torch.uint64) if kernel == FLASH else query.new_empty((), dtype=torch.long)
        offset = seed[0] if kernel == FLASH else seed
    if kernel == FLASH:
        return aten._scaled_dot_product_flash_attention_backward(
            *inputs, out, lse, None, None, L, S, dropout_p, is_causal, seed, offset, scale=scale
        )
    if kernel == EFFICIENT:
        # What the kernel's own forward makes: rows padded to 32, and out laid out as [B, L, H, d] (in half precision
        # the kernel reads another layout wrongly).
        lse = F.pad(lse, (0, -L % 32), value=math.inf)
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
        wanted = [True, True, True, False]  # query, key, value, mask
        return aten._scaled_dot_product_efficient_attention_backward(
            *inputs, attn_mask, out, lse, seed, offset, dropout_p, wanted, is_causal, scale=scale
        )[:3]
    return aten._scaled_dot_product_cudnn_attention_backward(
        *inputs, out, lse[..., None], seed, offset, None, None, None, L, S, dropout_p, is_causal, scale=scale
    )


def _laid_out_like(like: Tensor, x: Tensor) -> Tensor:
    """x in the strides of `torch.empty_like(like)`, which is not made where x has them already."""
    is_dense = like.is_contiguous() or like.transpose(1, 2).is_contiguous()
    return x if is_dense and x.stride() == like.stride() else laid_out_as(torch.empty_like(like), x)


def laid_out_as_inputs(grads: Iterable[Tensor], inputs: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Gradients as operators must have them: in a layout known beforehand, that of `torch.empty_like` of each input."""
    return tuple(laid_out_as(torch.empty_like(x), g) for g, x in zip(grads, inputs, strict=True))


@torch.library.custom_op("ntk_attention::context_backward", mutates_args=())
def context_backward(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    offset: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`library_backward` as a custom operator."""
    tokens = Tokens(query, key, value, attn_mask, dropout_p, is_causal, scale)
    grads = library_backward(grad_out, out, lse, seed, offset, tokens)
    return laid_out_as_inputs(grads, tokens[:3])  # type: ignore[return-value]  # three of them


@context_backward.register_fake
def _(
    grad_out: Tensor, out: Tensor, lse: Tensor, seed: Tensor | None, offset: Tensor | None, *tokens: Any
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) for x in tokens[:3])


def _fit_memory(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Pad d and d_v to one size that a kernel takes, and copy what no kernel can read where it lies."""
    d_max = max(query.shape[-1], value.shape[-1])
    if query.is_cuda:
        d_max += -d_max % 8
    query, key, value = (readable(pad_to(x, d_max)) for x in (query, key, value))
    return query, key, value, None if attn_mask is None else _readable_mask(attn_mask, key.shape[2])


def readable(x: Tensor) -> Tensor:
    """x [B, H, L, d], or a copy where kernels would read its memory wrongly.

    They ask for a contiguous last dimension and do not check it themselves, and their matrix products for rows that do
    not overlap. On a GPU they load 16 bytes at once, so that every row must begin at a multiple of them, and not all of
    them are right where heads share memory.
    """
    *strides, last = x.stride()
    fits = last == 1 and (x.shape[-2] == 1 or strides[-1] >= x.shape[-1])
    if fits and x.is_cuda:
        unit = 16 // x.element_size()
        fits = x.data_ptr() % 16 == 0
        if fits and (0 in strides or any(s % unit for s in strides)):
            fits = all(n == 1 or (s != 0 and s % unit == 0) for n, s in zip(x.shape, strides, strict=False))
    return x if fits else x.new_empty(x.shape).copy_(x)


def _readable_mask(attn_mask: Tensor, S: int) -> Tensor:
    """The same for an additive mask, whose other dimensions may be repeated; on a GPU with rows of S numbers."""
    if not attn_mask.is_cuda:
        fits = attn_mask.stride(-1) == 1 or attn_mask.shape[-1] == 1
        return attn_mask if fits else attn_mask.contiguous()
    rows = attn_mask.expand(*attn_mask.shape[:-1], S)
    aligned = rows.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in rows.stride()[:-1])
    if rows.stride(-1) == 1 and aligned:
        return rows
    return pad_to(rows.new_empty(rows.shape).copy_(rows), S + -S % 16)[..., :S]


def _fit_kernel(
    kernel: int, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Repeat KV heads and the mask where the kernel asks for it."""
    if kernel == EFFICIENT:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    return query, key, value, attn_mask


def pad_to(x: Tensor, size: int) -> Tensor:
    """Zeros behind the last dimension; no copy where none are missing."""
    return x if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1]))
