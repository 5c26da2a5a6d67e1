"""The backend on our own Triton kernels: launches, custom operators, and the table by which "auto" chooses."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .features import Elu
from .sdpa import additive_mask, empty_output, library_backward, library_forward
from .state import PrefixState

try:
    import triton
    from triton.tools.tensor_descriptor import TensorDescriptor

    from . import kernels

    INTERPRETED = triton.knobs.runtime.interpret  # on a CPU: for tests
except ImportError:  # torch for a CPU comes without Triton
    triton = None
    INTERPRETED = False

MAX_HEAD_DIM = {torch.bfloat16: 256, torch.float16: 128}
MAX_DECODE_ROWS = 64  # query heads of one KV head times query length

# How "auto" computes the forward pass on a GPU, by measurement on an H100 (results/benchmarks). Up to some length our
# fused kernel, which reads everything once; from there on the library's kernel, whose products are faster, and one more
# of ours that merges the prefix. With a mask it is always the fused kernel.
AUTO = (  # the largest head_dim that the row is for, the query length from which the prefix is merged
    (64, 2048),
    (128, 1024),
    (256, math.inf),
)


class Blocks(NamedTuple):
    """Sizes of a launch, by measurement on an H100."""

    rows: int  # of queries (BM)
    columns: int  # keys (BN) of the forward pass, features (BF) of the backward pass
    warps: int
    stages: int
    programs: int = 1  # per multiprocessor, where each goes through many rows
    registers: int | None = None  # at most, per thread


def forward_blocks(head_dim: int, length: int) -> Blocks:
    if head_dim <= 64:
        return Blocks(rows=64, columns=64, warps=4, stages=2)
    if head_dim <= 128:
        if length <= 512:
            return Blocks(rows=64, columns=32, warps=4, stages=3, registers=168)
        return Blocks(rows=64, columns=64, warps=4, stages=3)
    return Blocks(rows=64, columns=32, warps=8, stages=2)


def merge_blocks(head_dim: int) -> Blocks:
    if head_dim <= 64:
        return Blocks(rows=64, columns=64, warps=4, stages=3, programs=2)
    return Blocks(rows=64, columns=128, warps=8, stages=4)


def backward_blocks(head_dim: int, dtype: torch.dtype) -> Blocks:
    if head_dim <= 64:
        return Blocks(rows=32, columns=64, warps=4, stages=3, programs=2)
    if head_dim <= 128:
        is_bf16 = dtype == torch.bfloat16  # beside fp16, Z takes twice the memory
        return Blocks(rows=64 if is_bf16 else 32, columns=128, warps=8, stages=3 if is_bf16 else 2)
    return Blocks(rows=64, columns=64, warps=8, stages=2)


def padded(size: int) -> int:
    """A power of two that a matrix unit takes."""
    return max(16, 1 << (size - 1).bit_length())


def covers(query: Tensor, key: Tensor, value: Tensor, state: PrefixState, attn_mask: Tensor | None) -> bool:
    """What the kernels can do; the caller sees to dropout, softcap and sinks, which they cannot."""
    return (
        triton is not None
        and (query.is_cuda or INTERPRETED)
        and query.dtype in MAX_HEAD_DIM
        and type(state.feature_map) is Elu
        and min(query.shape[-1], value.shape[-1]) >= 16
        and max(query.shape[-1], value.shape[-1]) <= MAX_HEAD_DIM[query.dtype]
        and query.shape[-1] % 8 == value.shape[-1] % 8 == 0  # rows of 16 bytes
        and query.numel() > 0
        and key.numel() > 0
        and (attn_mask is None or attn_mask.dtype == torch.bool)
    )


def attend_fused(query, key, value, state, factor, attn_mask, is_causal, scale, prefer="auto"):
    """Arguments as in `operation.attend`; returns the merged output. `prefer`: "auto", or "triton" for no library."""
    B, H, L, d = query.shape
    tensors = (query, key, value, state.Z, state.k, state.log_scale)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(B, H, L, key.shape[2])
    constant = state.feature_map.constant
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    is_short = H // key.shape[1] * L <= MAX_DECODE_ROWS
    compiling = torch.compiler.is_compiling()  # the operators serve torch.compile; without them a call is cheaper
    if not needs_grad and is_short and (L == 1 or not is_causal):
        decode = decode_op if compiling else _decode
        return decode(*tensors, attn_mask, constant, scale, factor)
    merge_from = next(from_L for largest, from_L in AUTO if max(d, value.shape[-1]) <= largest)
    merges = prefer == "auto" and attn_mask is None and merge_from <= L
    forward = forward_op if compiling else _EagerForward.apply if needs_grad else _forward
    return forward(*tensors, attn_mask, constant, is_causal, scale, factor, merges)[0]


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    Z: Tensor,
    k: Tensor,
    log_scale: Tensor,
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
    B, H, L, d = query.shape
    d_v = value.shape[-1]
    Z, k = Z.contiguous(), k.contiguous()
    heads_per_state = H // Z.shape[0]
    sizes = {"D": d, "DV": d_v, "CONSTANT": constant, "BD": padded(d), "BDV": padded(d_v)}
    out = empty_output(query, value)
    if merges:
        blocks = merge_blocks(max(d, d_v))
        context, lse, _, _ = library_forward(query, key, value, None, 0.0, is_causal, scale)
        lse = lse.contiguous()
        programs = max(1, blocks.programs * _multiprocessors(query) // H)
        kernels.merge_prefix[H, programs](
            _descriptor(query, blocks.rows), _descriptor(context, blocks.rows), _descriptor(Z, padded(d)),
            Z, k, log_scale, _descriptor(out, blocks.rows), lse, B, H, heads_per_state, L, factor, **sizes,
            BM=blocks.rows, STAGES=blocks.stages, num_warps=blocks.warps, maxnreg=blocks.registers,
        )  # fmt: skip
        return out, lse
    # In the dtype of matrix products, since every program reads it: tf32 next to fp16, whose exponents are too few.
    Z_product = Z.to(torch.bfloat16 if query.dtype == torch.bfloat16 else torch.float32)
    lse = query.new_empty(B, H, L, dtype=torch.float32)
    blocks = forward_blocks(max(d, d_v), L)
    mask, mask_strides = _mask_arguments(attn_mask, query)
    kernels.fused_forward[triton.cdiv(L, blocks.rows), B * H](
        _descriptor(query, blocks.rows), _descriptor(key, blocks.columns), _descriptor(value, blocks.columns),
        _descriptor(Z_product, padded(d)), Z, k, log_scale, mask, _descriptor(out, blocks.rows), lse, *mask_strides,
        H, H // key.shape[1], heads_per_state, L, key.shape[2], d, scale, factor,
        **sizes, IS_CAUSAL=is_causal, MASKED=attn_mask is not None, BM=blocks.rows, BN=blocks.columns,
        num_warps=blocks.warps, num_stages=blocks.stages, maxnreg=blocks.registers,
    )  # fmt: skip
    return out, lse


forward_op = torch.library.custom_op("ntk_attention::forward", _forward, mutates_args=())


@forward_op.register_fake
def _(query, key, value, Z, k, log_scale, attn_mask, constant, is_causal, scale, factor, merges):
    return empty_output(query, value), query.new_empty(query.shape[:3], dtype=torch.float32)


def _backward(
    grad_out, query, key, value, Z, k, log_scale, attn_mask, out, lse, constant, is_causal, scale, factor,
    inputs_need_grad,
):  # fmt: skip
    """Gradients to query, key, value (empty unless `inputs_need_grad`), Z and k."""
    B, H, L, d = query.shape
    d_v = value.shape[-1]
    H_state, r = k.shape
    if inputs_need_grad:
        no_seed = torch.empty(0, dtype=torch.long, device=query.device)
        mask = None if attn_mask is None else additive_mask(attn_mask, query)
        grad_query, grad_key, grad_value = library_backward(
            grad_out, query, key, value, out, lse, mask, no_seed, no_seed, 0.0, is_causal, scale
        )
    else:
        grad_query, grad_key, grad_value = (query.new_empty(0) for _ in range(3))
    blocks = backward_blocks(max(d, d_v), query.dtype)
    features = min(blocks.columns, padded(d))
    feature_blocks = triton.cdiv(d, features)
    programs = blocks.programs * _multiprocessors(query) // (H_state * feature_blocks)
    splits = max(1, min(programs, triton.cdiv(L, blocks.rows) * B * H // H_state))
    parts = query.new_empty(splits, H_state * r * (d_v + 1), dtype=torch.float32)
    part_Z, part_k = parts.split((H_state * r * d_v, H_state * r), dim=1)
    kernels.prefix_backward[feature_blocks, H_state, splits](
        _descriptor(grad_out, blocks.rows), _descriptor(query, blocks.rows, features), _descriptor(out, blocks.rows),
        lse, _descriptor(grad_query if inputs_need_grad else query, blocks.rows, features),
        _descriptor(Z.contiguous(), features), k.contiguous(), log_scale, part_Z, part_k, parts.stride(0),
        B, H, H // H_state, L, factor, D=d, DV=d_v, CONSTANT=constant, ADD_TO_GRAD_Q=inputs_need_grad,
        BM=blocks.rows, BDV=padded(d_v), BF=features,
        STAGES=blocks.stages, num_warps=blocks.warps, maxnreg=blocks.registers,
    )  # fmt: skip
    grad_Z, grad_k = parts.sum(dim=0).split((H_state * r * d_v, H_state * r))
    return grad_query, grad_key, grad_value, grad_Z.view_as(Z).to(Z.dtype), grad_k.view_as(k).to(k.dtype)


@torch.library.custom_op("ntk_attention::backward", mutates_args=())
def backward_op(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    Z: Tensor,
    k: Tensor,
    log_scale: Tensor,
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
        grad_out, query, key, value, Z, k, log_scale, attn_mask, out, lse, constant, is_causal, scale, factor,
        inputs_need_grad,
    )  # fmt: skip
    return *grads, grad_k.clone()  # an operator may not return views of one another


@backward_op.register_fake
def _(grad_out, query, key, value, Z, k, log_scale, attn_mask, out, lse, constant, is_causal, scale, factor, needed):
    inputs = (torch.empty_like(x) if needed else query.new_empty(0) for x in (query, key, value))
    return (*inputs, torch.empty_like(Z), torch.empty_like(k))


def _setup_context(ctx, inputs, output):
    query, key, value, Z, k, log_scale, attn_mask, *options, _ = inputs
    ctx.save_for_backward(query, key, value, Z, k, log_scale, attn_mask, *output)
    ctx.options = options


def _gradients(ctx, grad_out, backward):
    """For each input of `_forward`, by either form of `_backward`."""
    query, key, value, Z, k, log_scale, attn_mask, out, lse = ctx.saved_tensors
    inputs_need_grad = any(ctx.needs_input_grad[:3])
    inputs = query, key, value, Z, k, log_scale, attn_mask, out, lse
    *grad_inputs, grad_Z, grad_k = backward(grad_out, *inputs, *ctx.options, inputs_need_grad)
    grad_log_scale = None
    if ctx.needs_input_grad[5]:  # Z and k carry the factor e^b
        grad_log_scale = ((Z * grad_Z).sum(dim=(1, 2)) + (k * grad_k).sum(dim=1)).to(log_scale.dtype)
    grad_inputs = grad_inputs if inputs_need_grad else (None, None, None)
    return *grad_inputs, grad_Z, grad_k, grad_log_scale, *(None,) * 6


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


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    Z: Tensor,
    k: Tensor,
    log_scale: Tensor,
    attn_mask: Tensor | None,
    constant: bool,
    scale: float,
    factor: float,
) -> Tensor:
    """out [B, H, L, d_v] of a short query that sees all keys, or those that the mask shows; one launch."""
    B, H, L, d = query.shape
    H_kv, S, d_v = key.shape[1], key.shape[2], value.shape[-1]
    out = empty_output(query, value)
    rows, keys = padded(H // H_kv * L), 64 if max(d, d_v) <= 128 else 32
    splits = max(1, min(triton.cdiv(_multiprocessors(query), B * H_kv), triton.cdiv(S, 2 * keys), 64))
    keys_per_split = triton.cdiv(triton.cdiv(S, splits), keys) * keys
    splits = triton.cdiv(S, keys_per_split)
    parts = (B * H_kv, splits + 1, rows) if splits > 1 else (0,)
    partial_out = query.new_empty(*parts, padded(d_v), dtype=torch.float32)
    partial_m, partial_l = (query.new_empty(parts, dtype=torch.float32) for _ in range(2))
    counter = COUNTERS.take(query.device, B * H_kv) if splits > 1 else partial_m
    mask, mask_strides = _mask_arguments(attn_mask, query)
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    query = query if query.stride(-1) == 1 else query.contiguous()
    kernels.decode[splits + (splits > 1), B * H_kv](
        query, key, value, Z.contiguous(), k.contiguous(), log_scale, mask, out, partial_out, partial_m, partial_l,
        counter, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *mask_strides, *out.stride()[:3],
        H_kv, H // H_kv, H // Z.shape[0], L, S, keys_per_split, scale, factor, D=d, DV=d_v, CONSTANT=constant,
        MASKED=attn_mask is not None, SPLITS=splits, ROWS=rows, BN=keys, BD=padded(d), BDV=padded(d_v),
        BF=min(64, padded(d)), STAGES=3, num_warps=4,
    )  # fmt: skip
    return out


decode_op = torch.library.custom_op("ntk_attention::decode", _decode, mutates_args=())


@decode_op.register_fake
def _(query, key, value, Z, k, log_scale, attn_mask, constant, scale, factor):
    return empty_output(query, value)


class Counters:
    """Zeroed integers in which the programs of one decoding launch count themselves; the kernel leaves zeros behind.

    Launches that may overlap must not share a counter. Launches of one stream follow one another, so a stream has one
    region. A captured launch can be replayed on any stream and gets a region for good: few, since graphs are few.
    """

    SIZE = 1 << 20

    def __init__(self) -> None:
        self.pools: dict[torch.device, Tensor] = {}
        self.used: dict[torch.device, int] = {}
        self.regions: dict[tuple[torch.device, int], Tensor] = {}

    def take(self, device: torch.device, size: int) -> Tensor:
        if device.type != "cuda":
            return torch.zeros(size, dtype=torch.int32)
        if torch.cuda.is_current_stream_capturing():
            if device in self.pools and self.used[device] + size <= self.SIZE:
                return self._cut(device, size)
            return torch.zeros(size, dtype=torch.int32, device=device)  # one more node in the graph
        stream = (device, torch.cuda.current_stream(device).cuda_stream)
        if stream not in self.regions or len(self.regions[stream]) < size:
            if device not in self.pools or self.used[device] + size > self.SIZE:
                self.pools[device] = torch.zeros(max(self.SIZE, size), dtype=torch.int32, device=device)
                self.used[device] = 0
                torch.cuda.synchronize(device)  # zero for every stream
            self.regions[stream] = self._cut(device, size)
        return self.regions[stream]

    def _cut(self, device: torch.device, size: int) -> Tensor:
        start = self.used[device]
        self.used[device] += size
        return self.pools[device][start : start + size]


COUNTERS = Counters()


def _multiprocessors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


def _descriptor(x: Tensor, rows: int, columns: int | None = None) -> "TensorDescriptor":
    """Blocks [..., rows, columns] of x [..., L, d]; x is copied only where the memory does not allow it."""
    strides = x.stride()
    unit = 16 // x.element_size()
    if strides[-1] != 1 or x.data_ptr() % 16 or any(s % unit or not s for s in strides[:-1]):
        x = x.new_empty(x.shape).copy_(x)
        strides = x.stride()
    block = [1] * (x.dim() - 2) + [rows, columns or padded(x.shape[-1])]
    descriptor = object.__new__(TensorDescriptor)  # its constructor would check all this again, at every launch
    descriptor.__dict__.update(base=x, shape=x.shape, strides=strides, block_shape=block)
    return descriptor


def _mask_arguments(attn_mask: Tensor | None, query: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    if attn_mask is None:
        return query, (0, 0, 0, 0)
    return attn_mask.view(torch.uint8), attn_mask.stride()
