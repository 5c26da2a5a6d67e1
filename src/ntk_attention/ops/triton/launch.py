"""Launches of the Triton kernels: block sizes, descriptors, work space."""

import threading
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..sdpa import empty_output

try:
    import triton
    from triton.tools.tensor_descriptor import TensorDescriptor

    from . import kernels

    INTERPRETED = triton.knobs.runtime.interpret  # on a CPU: for tests
except ImportError:  # torch for a CPU comes without Triton
    triton = None
    INTERPRETED = False
try:
    from . import forward_sm90
except (ImportError, AttributeError):  # Gluon, which changes from version to version
    forward_sm90 = None  # type: ignore[assignment]

MAX_HEAD_DIM = {torch.bfloat16: 256, torch.float16: 128}
MAX_RANDOM_FEATURES = 512
MAX_DECODE_ROWS = 64  # query heads of one KV head times query length


def covers(query: Tensor, value: Tensor) -> bool:
    """Whether there are kernels for this device, dtype, d and d_v (with the map elu and no mask, or a bool one)."""
    d, d_v = query.shape[-1], value.shape[-1]
    return (
        triton is not None
        and (query.is_cuda or INTERPRETED)
        and query.dtype in MAX_HEAD_DIM
        and min(d, d_v) >= 16
        and max(d, d_v) <= MAX_HEAD_DIM[query.dtype]
        and d % 8 == d_v % 8 == 0  # rows of 16 bytes
    )


def covers_random(query: Tensor, value: Tensor, r: int) -> bool:
    """The same for the map positive_random with r features."""
    sizes_fit = max(query.shape[-1], value.shape[-1]) <= 128 and r <= MAX_RANDOM_FEATURES
    return covers(query, value) and query.dtype == torch.bfloat16 and sizes_fit


class Blocks(NamedTuple):
    """Sizes of a launch, by measurement on an H100."""

    rows: int  # of queries (BM)
    columns: int  # keys (BN) of the forward pass, features (BF) of the backward pass
    warps: int
    stages: int
    programs: int = 1  # per multiprocessor, where each goes through many rows
    registers: int | None = None  # at most, per thread


def forward_blocks(head_dim: int, length: int, is_masked: bool) -> Blocks:
    if head_dim <= 64:
        return Blocks(rows=64, columns=64, warps=4, stages=2, registers=None if is_masked else 96)
    if head_dim <= 128:
        if length <= 512 and not is_masked:
            return Blocks(rows=64, columns=32, warps=4, stages=3, registers=168)
        return Blocks(rows=64, columns=64, warps=4, stages=3)
    return Blocks(rows=64, columns=32, warps=8, stages=2)


def hopper_blocks(head_dim: int, length: int) -> Blocks:
    return Blocks(rows=64, columns=64, warps=4, stages=3 if head_dim == 128 and length > 1024 else 2)


def random_blocks() -> Blocks:
    return Blocks(rows=64, columns=64, warps=4, stages=2)


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


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up. triton.cdiv serves kernels too, and is much slower for that."""
    return -(-a // b)


def padded(size: int) -> int:
    """A power of two that a matrix unit takes."""
    return max(16, 1 << (size - 1).bit_length())


def fused_forward(query, key, value, Z, k, log_scale, index, W, attn_mask, constant, is_causal, scale, factor):
    """One kernel for tokens and prefix: out [B, H, L, d_v] and the lse of both [B, H, L].

    index: int32 [B], with Z, k and log_scale a stack as in `RowStates`; None where all rows have the same state.
    W: the directions of positive random features [r, d] in float32; None for the map elu.
    """
    B, H, L, d = query.shape
    d_v = value.shape[-1]
    H_state = Z.shape[-3]
    Z, k, log_scale, places = _state_arguments(Z, k, log_scale, index)
    # In the dtype of matrix products, since every program reads it: tf32 next to fp16, whose exponents are too few.
    Z_product = Z.to(torch.bfloat16 if query.dtype == torch.bfloat16 else torch.float32)
    out = empty_output(query, value)
    lse = query.new_empty(B, H, L, dtype=torch.float32)
    if attn_mask is None and W is None and _suits_hopper(query, value):
        blocks = hopper_blocks(d, L)
        x, y = (1, 1, blocks.rows, d), (1, 1, blocks.columns, d)
        forward_sm90.fused_forward[ceil_div(L, blocks.rows), B * H](
            _gluon_descriptor(query, x), _gluon_descriptor(key, y), _gluon_descriptor(value, y),
            _gluon_descriptor(Z_product[None], y), Z, k, log_scale, places, _gluon_descriptor(out, x), lse,
            H, H // key.shape[1], H // H_state, L, key.shape[2], scale, factor,
            D=d, CONSTANT=constant, MIXED=index is not None, IS_CAUSAL=is_causal,
            BM=blocks.rows, BN=blocks.columns, STAGES=blocks.stages, num_warps=blocks.warps,
        )  # fmt: skip
        return out, lse
    is_random = W is not None
    blocks = random_blocks() if is_random else forward_blocks(max(d, d_v), L, attn_mask is not None)
    features = blocks.columns if is_random else padded(d)
    mask, mask_strides = _mask_arguments(attn_mask, query)
    kernels.fused_forward[ceil_div(L, blocks.rows), B * H](
        _descriptor(query, blocks.rows), _descriptor(key, blocks.columns), _descriptor(value, blocks.columns),
        _descriptor(W, features) if is_random else Z, _descriptor(Z_product, features), Z, k, log_scale, places, mask,
        _descriptor(out, blocks.rows), lse, *mask_strides,
        H, H // key.shape[1], H // H_state, L, key.shape[2], d, scale, factor,
        RANDOM=is_random, R=k.shape[-1] - constant, D=d, DV=d_v, CONSTANT=constant, MIXED=index is not None,
        IS_CAUSAL=is_causal, MASKED=attn_mask is not None,
        BM=blocks.rows, BN=blocks.columns, BD=padded(d), BDV=padded(d_v), BF=features,
        num_warps=blocks.warps, num_stages=blocks.stages, maxnreg=blocks.registers,
    )  # fmt: skip
    return out, lse


def merge_prefix(query, context, lse, Z, k, log_scale, index, constant, factor):
    """See `portable.merge_prefix`, and `fused_forward` for `index`; context and lse are given up."""
    B, H, L, d = query.shape
    d_v = context.shape[-1]
    H_state = Z.shape[-3]
    Z, k, log_scale, places = _state_arguments(Z, k, log_scale, index)
    lse = lse.contiguous()
    out = empty_output(query, context)
    if out.stride() == context.stride():
        out = context
    blocks = merge_blocks(max(d, d_v))
    groups = 1 if index is None else B  # of rows that have the same state
    programs = max(1, blocks.programs * _multiprocessors(query) // (groups * H))
    kernels.merge_prefix[groups * H, programs](
        _descriptor(query, blocks.rows), _descriptor(context, blocks.rows), _descriptor(Z, padded(d)),
        Z, k, log_scale, places, _descriptor(out, blocks.rows), lse, B // groups, H, H // H_state, L, factor,
        D=d, DV=d_v, CONSTANT=constant, MIXED=index is not None, BM=blocks.rows, BD=padded(d), BDV=padded(d_v),
        STAGES=blocks.stages, num_warps=blocks.warps, maxnreg=blocks.registers,
    )  # fmt: skip
    return out, lse


def prefix_backward(grad_out, query, out, lse, grad_query, Z, k, log_scale, W, constant, factor):
    """See `portable.prefix_backward`."""
    log_scale, lse = log_scale.contiguous(), lse.contiguous()
    if grad_query is not None:
        described = _described(grad_query)
        if described is not grad_query:  # the kernels add to a copy
            grads = prefix_backward(grad_out, query, out, lse, described, Z, k, log_scale, W, constant, factor)
            grad_query.copy_(described)
            return grads
    if W is not None:
        return _random_backward(grad_out, query, out, lse, grad_query, Z, k, log_scale, W, constant, factor)
    B, H, L, d = query.shape
    d_v = out.shape[-1]
    H_state, r = k.shape
    blocks = backward_blocks(max(d, d_v), query.dtype)
    features = min(blocks.columns, padded(d))
    feature_blocks = ceil_div(d, features)
    programs = blocks.programs * _multiprocessors(query) // (H_state * feature_blocks)
    splits = max(1, min(programs, ceil_div(L, blocks.rows) * B * H // H_state))
    parts = query.new_empty(splits, H_state * r * (d_v + 1), dtype=torch.float32)
    part_Z, part_k = parts.split((H_state * r * d_v, H_state * r), dim=1)
    adds = grad_query is not None
    kernels.prefix_backward[feature_blocks, H_state, splits](
        _descriptor(grad_out, blocks.rows), _descriptor(query, blocks.rows, features), _descriptor(out, blocks.rows),
        lse, _descriptor(grad_query if adds else query, blocks.rows, features),
        _descriptor(Z.contiguous(), features), k.contiguous(), log_scale, part_Z, part_k, parts.stride(0),
        B, H, H // H_state, L, factor, D=d, DV=d_v, CONSTANT=constant, ADD_TO_GRAD_Q=adds,
        BM=blocks.rows, BDV=padded(d_v), BF=features,
        STAGES=blocks.stages, num_warps=blocks.warps, maxnreg=blocks.registers,
    )  # fmt: skip
    grad_Z, grad_k = parts.sum(dim=0).split((H_state * r * d_v, H_state * r))
    return grad_Z.view_as(Z), grad_k.view_as(k)


def _random_backward(grad_out, query, out, lse, grad_query, Z, k, log_scale, W, constant, factor):
    B, H, L, d = query.shape
    d_v = out.shape[-1]
    H_state, r = k.shape
    R = r - constant
    blocks = random_blocks()
    warps = 8 if max(d, d_v) > 64 else 4
    feature_blocks = ceil_div(R, blocks.columns)
    programs = 2 * _multiprocessors(query) // (H_state * feature_blocks)
    splits = max(1, min(programs, ceil_div(L, blocks.rows) * B * H // H_state))
    parts = query.new_empty(splits, H_state * r * (d_v + 1), dtype=torch.float32)
    part_Z, part_k = parts.split((H_state * r * d_v, H_state * r), dim=1)
    rows = tuple(_descriptor(x, blocks.rows) for x in (grad_out, query, out))
    directions = _descriptor(W, blocks.columns)
    sizes = {"R": R, "CONSTANT": constant, "BM": blocks.rows, "BD": padded(d), "BDV": padded(d_v), "BF": blocks.columns}
    kernels.random_backward[feature_blocks, H_state, splits](
        *rows, lse, directions, log_scale, part_Z, part_k, parts.stride(0), B, H, H // H_state, L, factor,
        DV=d_v, STAGES=1, num_warps=warps, **sizes,
    )  # fmt: skip
    if grad_query is not None:
        kernels.random_grad_query[ceil_div(L, blocks.rows), B * H](
            *rows, lse, _descriptor(grad_query, blocks.rows), directions, _descriptor(Z.contiguous(), blocks.columns),
            k.contiguous(), log_scale, H, H // H_state, L, factor, num_warps=warps, **sizes,
        )  # fmt: skip
    grad_Z, grad_k = parts.sum(dim=0).split((H_state * r * d_v, H_state * r))
    return grad_Z.view_as(Z), grad_k.view_as(k)


def decode(query, key, value, Z, k, log_scale, index, W, attn_mask, constant, scale, factor):
    """out [B, H, L, d_v] of a short query that sees all keys, or those that the mask shows; one launch."""
    B, H, L, d = query.shape
    H_kv, S, d_v = key.shape[1], key.shape[2], value.shape[-1]
    H_state = Z.shape[-3]
    Z, k, log_scale, places = _state_arguments(Z, k, log_scale, index)
    out = empty_output(query, value)
    rows, keys = padded(H // H_kv * L), 64 if max(d, d_v) <= 128 else 32
    features = min(64, padded(d)) if W is None else 32
    splits = max(1, min(ceil_div(_multiprocessors(query), B * H_kv), ceil_div(S, 2 * keys), 64))
    keys_per_split = ceil_div(ceil_div(S, splits), keys) * keys
    splits = ceil_div(S, keys_per_split)
    partial, counter = out, out  # not looked at
    if splits > 1:
        partial = query.new_empty(B * H_kv * (splits + 1) * rows * (padded(d_v) + 2), dtype=torch.float32)
        counter = COUNTERS.take(query.device, B * H_kv)
    mask, mask_strides = _mask_arguments(attn_mask, query)
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    query = query if query.stride(-1) == 1 else query.contiguous()
    kernels.decode[splits + (splits > 1), B * H_kv](
        query, key, value, Z if W is None else W.contiguous(), Z, k, log_scale, places, mask, out, partial, counter,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *mask_strides, *out.stride()[:3],
        H_kv, H // H_kv, H // H_state, L, S, keys_per_split, scale, factor,
        RANDOM=W is not None, R=k.shape[-1] - constant, D=d, DV=d_v, CONSTANT=constant, MIXED=index is not None,
        MASKED=attn_mask is not None, SPLITS=splits, ROWS=rows, BN=keys, BD=padded(d), BDV=padded(d_v),
        BF=features, STAGES=3, num_warps=4,
    )  # fmt: skip
    return out


class Counters:
    """Zeroed integers in which the programs of one decoding launch count themselves; the kernel leaves zeros behind.

    Launches that may overlap must not share a counter. Launches of one stream follow one another, so a stream has one
    region. A captured launch can be replayed on any stream and gets a region for good: few, since graphs are few.
    """

    SIZE = 1 << 20

    def __init__(self) -> None:
        self.lock = threading.Lock()  # two threads must not cut the same region
        self.pools: dict[torch.device, Tensor] = {}
        self.used: dict[torch.device, int] = {}
        self.regions: dict[tuple[torch.device, int], Tensor] = {}

    def take(self, device: torch.device, size: int) -> Tensor:
        if device.type != "cuda":
            return torch.zeros(size, dtype=torch.int32)
        with self.lock:
            return self._take(device, size)

    def _take(self, device: torch.device, size: int) -> Tensor:
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


@cache
def _properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


def _multiprocessors(x: Tensor) -> int:
    return _properties(x.device).multi_processor_count if x.is_cuda else 4


def _descriptor(x: Tensor, rows: int, columns: int | None = None) -> "TensorDescriptor":
    """Blocks [..., rows, columns] of x [..., L, d]; x is copied only where the memory does not allow it."""
    x = _described(x)
    block = [1] * (x.dim() - 2) + [rows, columns or padded(x.shape[-1])]
    descriptor = object.__new__(TensorDescriptor)  # its constructor would check all this again, at every launch
    descriptor.__dict__.update(base=x, shape=x.shape, strides=x.stride(), block_shape=block)
    return descriptor


def _gluon_descriptor(x: Tensor, block: tuple[int, ...]) -> "forward_sm90.TensorDescriptor":
    """The same for Gluon, which wants to know how a block lies in shared memory."""
    x = _described(x)
    descriptor = object.__new__(forward_sm90.TensorDescriptor)
    descriptor.__dict__.update(
        base=x, shape=x.shape, strides=x.stride(), block_shape=list(block), layout=forward_sm90.shared_layout(block)
    )
    return descriptor


def _described(x: Tensor) -> Tensor:
    """x, or a copy where the memory of x does not allow a descriptor."""
    strides = x.stride()
    unit = 16 // x.element_size()
    if strides[-1] != 1 or x.data_ptr() % 16 or any(s % unit or not s for s in strides[:-1]):
        return x.new_empty(x.shape).copy_(x)
    return x


def _suits_hopper(query: Tensor, value: Tensor) -> bool:
    return (
        forward_sm90 is not None
        and query.is_cuda
        and _properties(query.device).major == 9
        and query.dtype == torch.bfloat16
        and query.shape[-1] == value.shape[-1]
        and query.shape[-1] in (64, 128)
    )


def _state_arguments(Z, k, log_scale, index):
    """The state as the kernels read it, the heads of a stack one after another, and what stands for Index."""
    Z, k, log_scale = Z.contiguous(), k.contiguous(), log_scale.contiguous()
    if index is None:
        return Z, k, log_scale, log_scale
    return Z.flatten(0, 1), k.flatten(0, 1), log_scale, index.contiguous()


def _mask_arguments(attn_mask: Tensor | None, query: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    if attn_mask is None:
        return query, (0, 0, 0, 0)
    return attn_mask.view(torch.uint8), attn_mask.stride()
