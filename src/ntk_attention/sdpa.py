"""The backend on torch's own attention kernels, with an exact backward and O(L) memory.

A flash kernel returns its output o and the log-sum-exp lse of its logits, all that is needed to merge it with the
prefix block. Its backward computes exp(scale q.k - lse) and rowsum(dout * out) and nothing else from its own forward.
So it is fed the MERGED out and lse, and returns the exact gradients of the real-token part of NTK-Attention, without
a score matrix and without a second Q K^T. What is left, the gradient to the prefix block, is elementwise.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten

# What `torch._fused_sdp_choice` returns (torch.nn.attention.SDPBackend)
MATH, FLASH, EFFICIENT, CUDNN = 0, 1, 2, 3
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
    return query.device.type == "cuda" or (query.device.type == "cpu" and dropout_p == 0)


def attend_sdpa(query, key, value, prefix, attn_mask, dropout_p, is_causal, scale):
    """Arguments as in `operation.attend_eager`; returns the merged output."""
    B, H, L, d = query.shape
    H_kv, d_v = key.shape[1], value.shape[-1]
    out, lse = prefix
    packed = L == 1 and H_kv != H and not is_causal
    if packed:  # decoding: the query heads of a KV head become its rows, so that its keys are read once
        G = H // H_kv
        query, out, lse = query.reshape(B, H_kv, G, d), out.reshape(B, H_kv, G, d_v), lse.reshape(B, H_kv, G)
        if attn_mask is not None and attn_mask.dim() >= 3 and attn_mask.shape[-3] == H:
            attn_mask = attn_mask.unflatten(-3, (H_kv, -1)).squeeze(-2)
    merged = _MergedAttention.apply(query, key, value, out, lse, attn_mask, dropout_p, is_causal, scale)
    return merged.reshape(B, H, L, d_v) if packed else merged


class _MergedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, prefix_out, prefix_lse, attn_mask, dropout_p, is_causal, scale):
        dead = None
        if attn_mask is not None:
            dead, blank = (rows[..., None] for rows in hidden_rows(attn_mask))
            attn_mask = additive_mask(attn_mask, query)
        out, lse, seed, offset = context_forward(query, key, value, attn_mask, dropout_p, is_causal, scale)
        lse_all = torch.logaddexp(lse, prefix_lse)
        # Rows without a prefix keep the kernel's own output and lse.
        alone = prefix_lse == -math.inf
        lse_all = torch.where(alone, lse, lse_all).to(lse.dtype)
        context_share = torch.where(alone, 1.0, torch.exp(lse - lse_all))[..., None]
        prefix_share = torch.where(alone, 0.0, torch.exp(prefix_lse - lse_all))[..., None]
        merged = (out * context_share + prefix_out * prefix_share).to(query.dtype)
        if dead is not None:
            merged = merged.masked_fill(blank, 0.0)
            # The weights of a dead row are not to be had from its lse, near HIDDEN: with +inf they are 0.
            lse_all = lse_all.masked_fill(dead.squeeze(-1), math.inf)
        ctx.save_for_backward(
            query, key, value, prefix_out, prefix_share, out, context_share, lse_all, attn_mask, dead, seed, offset
        )
        ctx.options = dropout_p, is_causal, scale
        return merged

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        query, key, value, prefix_out, prefix_share, out, context_share, lse_all, *rest = ctx.saved_tensors
        attn_mask, dead, seed, offset = rest
        if dead is not None:
            grad_out = grad_out.masked_fill(dead, 0.0)
        grad_query = grad_key = grad_value = grad_prefix_out = grad_prefix_lse = None
        if any(ctx.needs_input_grad[:3]):
            merged = (out * context_share + prefix_out * prefix_share).to(query.dtype)
            grad_query, grad_key, grad_value = context_backward(
                grad_out, query, key, value, merged, lse_all, attn_mask, seed, offset, *ctx.options
            )
        if any(ctx.needs_input_grad[3:5]):
            grad_prefix_out = prefix_share * grad_out
            # prefix_out - merged, without the rounding of merged
            grad_prefix_lse = (grad_prefix_out * context_share * (prefix_out - out)).sum(dim=-1)
        return grad_query, grad_key, grad_value, grad_prefix_out, grad_prefix_lse, None, None, None, None


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


def library_forward(query, key, value, attn_mask, dropout_p, is_causal, scale) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention over real tokens: out [B, H, L, d_v], lse [B, H, L] in float32 (float64), seed and offset."""
    B, H, L, _ = query.shape
    d_v = value.shape[-1]
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    no_seed = torch.empty(0, dtype=torch.long, device=query.device)
    if query.numel() == 0 or key.numel() == 0:
        empty = query.new_zeros(B, H, L, d_v)
        return empty, query.new_full((B, H, L), -math.inf, dtype=lse_dtype), no_seed, no_seed.clone()
    inputs = _fit_memory(query, key, value, attn_mask)
    kernel = _choose_kernel(dropout_p, is_causal, scale, *inputs)
    if kernel == MATH:
        return _math_forward(query, key, value, attn_mask, dropout_p, is_causal, scale)
    query, key, value, attn_mask = _fit_kernel(kernel, *inputs)
    seed, offset = no_seed, no_seed.clone()
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
    lse = lse.reshape(B, H, -1)[..., :L].to(lse_dtype)  # cuDNN adds a dimension, the efficient kernel pads L
    if dropout_p == 0:
        seed, offset = no_seed, no_seed.clone()
    return out[..., :d_v], lse, seed, offset


def empty_output(query: Tensor, value: Tensor) -> Tensor:
    """[B, H, L, d_v], with heads inside or outside as in query: transformers lays [B, L, H, d] out."""
    B, H, L, _ = query.shape
    if query.stride(1) < query.stride(2):
        return query.new_empty(B, L, H, value.shape[-1]).transpose(1, 2)
    return query.new_empty(B, H, L, value.shape[-1])


def laid_out_as(expected: Tensor, x: Tensor) -> Tensor:
    """x in the strides of `expected`, whose memory takes it where they differ."""
    return x if x.stride() == expected.stride() else expected.copy_(x)


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
    out, lse, seed, offset = library_forward(query, key, value, attn_mask, dropout_p, is_causal, scale)
    return laid_out_as(empty_output(query, value), out), lse.contiguous(), seed.clone(), offset.clone()


@context_forward.register_fake
def _(query, key, value, attn_mask, dropout_p, is_causal, scale):
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    seed = query.new_empty(0, dtype=torch.long)
    return empty_output(query, value), query.new_empty(query.shape[:3], dtype=lse_dtype), seed, torch.empty_like(seed)


def library_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    seed: Tensor,
    offset: Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to query, key and value, given the merged out and lse."""
    if query.numel() == 0 or key.numel() == 0:
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    fitted = _fit_memory(query, key, value, attn_mask)
    kernel = _choose_kernel(dropout_p, is_causal, scale, *fitted)
    if kernel == MATH:
        grads = _math_backward(grad_out, query, key, value, out, lse, attn_mask, seed, dropout_p, is_causal, scale)
        return _laid_out_as_inputs(grads, query, key, value)
    L, S, d, d_v = query.shape[2], key.shape[2], query.shape[3], value.shape[3]
    inputs_given = query, key, value
    query, key, value, attn_mask = _fit_kernel(kernel, *fitted)
    grad_out, out = (readable(pad_to(x, value.shape[-1])) for x in (grad_out, out))
    if query.is_cuda:
        # As torch's own outputs lie in memory, which the kernels take for granted: with others cuDNN's gradients were
        # wrong (torch 2.11 on an H200).
        grad_out, out = (laid_out_as(torch.empty_like(query), x) for x in (grad_out, out))
    lse = lse.contiguous()
    if query.device.type == "cuda" and dropout_p == 0:  # not read, but asked for
        seed = torch.empty(2, dtype=torch.uint64, device=query.device) if kernel == FLASH else seed.new_empty(())
        offset = torch.empty((), dtype=seed.dtype, device=query.device)
    inputs = (grad_out, query, key, value)
    if query.device.type == "cpu":
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *inputs, out, lse, 0.0, is_causal, attn_mask=attn_mask, scale=scale
        )
    elif kernel == FLASH:
        grads = aten._scaled_dot_product_flash_attention_backward(
            *inputs, out, lse, None, None, L, S, dropout_p, is_causal, seed, offset, scale=scale
        )
    elif kernel == EFFICIENT:
        # What the kernel's own forward makes: rows padded to 32, and out laid out as [B, L, H, d] (in half precision
        # the kernel reads another layout wrongly).
        lse = F.pad(lse, (0, -L % 32), value=math.inf)
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
        wanted = [True, True, True, False]  # query, key, value, mask
        grads = aten._scaled_dot_product_efficient_attention_backward(
            *inputs, attn_mask, out, lse, seed, offset, dropout_p, wanted, is_causal, scale=scale
        )[:3]
    else:
        lse = lse[..., None]
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            *inputs, out, lse, seed, offset, None, None, None, L, S, dropout_p, is_causal, scale=scale
        )
    grad_query, grad_key, grad_value = grads
    H_kv = inputs_given[1].shape[1]
    if grad_key.shape[1] != H_kv:  # the kernel saw repeated KV heads
        grad_key, grad_value = (g.unflatten(1, (H_kv, -1)).sum(dim=2) for g in (grad_key, grad_value))
    return _laid_out_as_inputs((grad_query[..., :d], grad_key[..., :d], grad_value[..., :d_v]), *inputs_given)


def _laid_out_as_inputs(grads: tuple[Tensor, ...], *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (laid_out_as(torch.empty_like(x), g) for x, g in zip(inputs, grads, strict=True))
    return query, key, value


context_backward = torch.library.custom_op("ntk_attention::context_backward", library_backward, mutates_args=())


@context_backward.register_fake
def _(grad_out, query, key, value, out, lse, attn_mask, seed, offset, dropout_p, is_causal, scale):
    return tuple(torch.empty_like(x) for x in (query, key, value))


def _choose_kernel(dropout_p, is_causal, scale, query, key, value, attn_mask) -> int:
    """The kernel that torch itself would take, `torch.nn.attention.sdpa_kernel` respected; MATH where it has none.

    With a mask it is always the efficient one: with cuDNN, torch's choice on Hopper, left-padded batches were answered
    wrongly (torch 2.11 on an H100; the cause was not found).
    """
    if query.device.type == "cpu":
        return FLASH
    if attn_mask is not None:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        params = torch.backends.cuda.SDPAParams(query, key, value, attn_mask, dropout_p, is_causal, False)
        return EFFICIENT if torch.backends.cuda.can_use_efficient_attention(params) else MATH
    try:
        choice = torch._fused_sdp_choice(
            query, key, value, None, dropout_p, is_causal, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
    except RuntimeError:  # none of those that sdpa_kernel allows
        return MATH
    return choice if choice in (FLASH, EFFICIENT, CUDNN) else MATH


def _fit_memory(query, key, value, attn_mask):
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
    strides, last = x.stride()[:-1], x.stride(-1)
    fits = last == 1 and (x.shape[-2] == 1 or strides[-1] >= x.shape[-1])
    if fits and x.is_cuda:
        unit = 16 // x.element_size()
        rows = zip(x.shape, strides, strict=False)
        fits = x.data_ptr() % 16 == 0 and all(n == 1 or (s != 0 and s % unit == 0) for n, s in rows)
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


def _fit_kernel(kernel, query, key, value, attn_mask):
    """Repeat KV heads and the mask where the kernel asks for it."""
    if kernel == EFFICIENT:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    return query, key, value, attn_mask


def pad_to(x: Tensor, size: int) -> Tensor:
    """Zeros behind the last dimension; no copy where none are missing."""
    return x if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1]))


def _scores(query, key, attn_mask, is_causal, scale):
    groups = query.shape[1] // key.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    logits = scale * query.to(dtype) @ key.to(dtype).repeat_interleave(groups, dim=1).transpose(-1, -2)
    if attn_mask is not None:
        logits = logits + attn_mask
    if is_causal:
        visible = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
        logits = logits.masked_fill(~visible, -math.inf)
    return logits


def _keep(weights, dropout_p, seed):
    """What dropout leaves of the weights; the same for the same seed."""
    if not dropout_p:
        return weights
    generator = torch.Generator(weights.device).manual_seed(int(seed))
    kept = torch.rand(weights.shape, generator=generator, device=weights.device) >= dropout_p
    return weights * kept / (1 - dropout_p)


def _math_forward(query, key, value, attn_mask, dropout_p, is_causal, scale):
    """Where torch has no fused kernel for the inputs (float64 on a GPU): the scores are written out."""
    logits = _scores(query, key, attn_mask, is_causal, scale)
    lse = torch.logsumexp(logits, dim=-1)
    weights = torch.exp(logits - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
    values = value.to(weights.dtype).repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    seed = torch.randint(2**62, (1 if dropout_p else 0,), device=query.device)
    out = _keep(weights, dropout_p, seed) @ values
    return out.to(query.dtype), lse, seed, torch.empty(0, dtype=torch.long, device=query.device)


def _math_backward(grad_out, query, key, value, out, lse, attn_mask, seed, dropout_p, is_causal, scale):
    logits = _scores(query, key, attn_mask, is_causal, scale)
    dtype, H_kv = logits.dtype, key.shape[1]
    weights = torch.exp(logits - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
    kept = _keep(weights, dropout_p, seed)
    q, k, v, dout, o = (x.to(dtype) for x in (query, key, value, grad_out, out))
    k, v = (x.repeat_interleave(q.shape[1] // H_kv, dim=1) for x in (k, v))
    grad_logits = kept * (dout @ v.transpose(-1, -2)) - weights * (dout * o).sum(dim=-1, keepdim=True)
    grad_query = scale * grad_logits @ k
    grad_key, grad_value = (
        g.unflatten(1, (H_kv, -1)).sum(dim=2)
        for g in (scale * grad_logits.transpose(-1, -2) @ q, kept.transpose(-1, -2) @ dout)
    )
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)
