"""Launches of the Triton kernels: block sizes, descriptors, work space."""

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from ..bundles import StateTensors, Tokens
from ..rotation import turned, unrotated
from ..sdpa import empty_output
from .support import forward_sm90, properties, triton

if triton is not None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    from .backward import prefix_backward as prefix_backward_kernel
    from .backward import random_backward, random_grad_query
    from .decode import decode as decode_kernel
    from .forward import fused_forward as forward_kernel
    from .forward import merge_prefix as merge_kernel


class Sizes(NamedTuple):
    """Sizes of a launch, by measurement on an H100."""

    rows: int  # of queries (BM)
    columns: int  # keys (BN) of the forward pass, features (BF) of the backward pass
    warps: int
    stages: int
    programs: int = 1  # per multiprocessor, where each goes through many rows
    registers: int | None = None  # at most, per thread


def forward_sizes(head_dim: int, length: int, is_masked: bool) -> Sizes:
    if head_dim <= 64:
        return Sizes(rows=64, columns=64, warps=4, stages=2, registers=None if is_masked else 96)
    if head_dim <= 128:
        if length <= 512 and not is_masked:
            return Sizes(rows=64, columns=32, warps=4, stages=3, registers=168)
        return Sizes(rows=64, columns=64, warps=4, stages=3)
    return Sizes(rows=64, columns=32, warps=8, stages=2)


def sm90_sizes(head_dim: int, length: int) -> Sizes:
    return Sizes(rows=64, columns=64, warps=4, stages=3 if head_dim == 128 and length > 1024 else 2)


def random_sizes() -> Sizes:
    return Sizes(rows=64, columns=64, warps=4, stages=2)


def merge_sizes(head_dim: int) -> Sizes:
    if head_dim <= 64:
        return Sizes(rows=64, columns=64, warps=4, stages=3, programs=2)
    return Sizes(rows=64, columns=128, warps=8, stages=4)


def backward_sizes(head_dim: int, dtype: torch.dtype) -> Sizes:
    if head_dim <= 64:
        return Sizes(rows=32, columns=64, warps=4, stages=3, programs=2)
    if head_dim <= 128:
        is_bf16 = dtype == torch.bfloat16  # beside fp16, Z takes twice the memory
        return Sizes(rows=64 if is_bf16 else 32, columns=128, warps=8, stages=3 if is_bf16 else 2)
    return Sizes(rows=64, columns=64, warps=8, stages=2)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up. triton.cdiv serves kernels too, and is much slower for that."""
    return -(-a // b)


def padded(size: int) -> int:
    """A power of two that a matrix unit takes."""
    return max(16, 1 << (size - 1).bit_length())


def fused_forward(tokens: Tokens, state: StateTensors, sm90: bool) -> tuple[Tensor, Tensor]:
    """One kernel for tokens and prefix: out [B, H, L, d_v] and the lse of both [B, H, L]; `sm90`: that for Hopper."""
    query, key, value, attn_mask, _, is_causal, scale = tokens
    W, index, constant, factor = state.W, state.rows, state.constant, state.factor
    B, H, L, d = query.shape
    d_v = value.shape[-1]
    H_state = state.Z.shape[-3]
    Z, k, log_scale, places = _state_arguments(state)
    table, stride_t, rotation = _rotation_arguments(state, query)
    # In the dtype of matrix products, since every program reads it: tf32 next to fp16, whose exponents are too few.
    Z_product = Z.to(torch.bfloat16 if query.dtype == torch.bfloat16 else torch.float32)
    out = empty_output(query, value)
    lse = query.new_empty(B, H, L, dtype=torch.float32)
    if sm90:
        sizes = sm90_sizes(d, L)
        x, y = (1, 1, sizes.rows, d), (1, 1, sizes.columns, d)
        forward_sm90.fused_forward[ceil_div(L, sizes.rows), B * H](
            _gluon_descriptor(query, x), _gluon_descriptor(key, y), _gluon_descriptor(value, y),
            _gluon_descriptor(Z_product[None], y), Z, k, log_scale, places, table, _gluon_descriptor(out, x),
            lse, stride_t, H, H // key.shape[1], H // H_state, L, key.shape[2], scale, factor,
            D=d, CONSTANT=constant, ROTATED=rotation["ROTATED"] > 0, MIXED=index is not None, IS_CAUSAL=is_causal,
            BM=sizes.rows, BN=sizes.columns, STAGES=sizes.stages, num_warps=sizes.warps,
        )  # fmt: skip
        return out, lse
    is_random = W is not None
    sizes = random_sizes() if is_random else forward_sizes(max(d, d_v), L, attn_mask is not None)
    features = sizes.columns if is_random else padded(d)
    mask, mask_strides = _mask_arguments(attn_mask, query)
    forward_kernel[ceil_div(L, sizes.rows), B * H](
        _descriptor(query, sizes.rows), _descriptor(key, sizes.columns), _descriptor(value, sizes.columns),
        Z if W is None else _descriptor(W, features), _descriptor(Z_product, features), Z, k, log_scale, places,
        table, mask, _descriptor(out, sizes.rows), lse, stride_t, *mask_strides,
        H, H // key.shape[1], H // H_state, L, key.shape[2], d, scale, factor,
        RANDOM=is_random, R=k.shape[-1] - constant, D=d, DV=d_v, CONSTANT=constant, MIXED=index is not None,
        **rotation, IS_CAUSAL=is_causal, MASKED=attn_mask is not None,
        BM=sizes.rows, BN=sizes.columns, BD=padded(d), BDV=padded(d_v), BF=features,
        num_warps=sizes.warps, num_stages=sizes.stages, maxnreg=sizes.registers,
    )  # fmt: skip
    return out, lse


def merge_prefix(query: Tensor, context: Tensor, lse: Tensor, state: StateTensors) -> tuple[Tensor, Tensor]:
    """See `fused_torch.merge_prefix`; context and lse are given up."""
    index, constant, factor = state.rows, state.constant, state.factor
    B, H, L, d = query.shape
    d_v = context.shape[-1]
    H_state = state.Z.shape[-3]
    Z, k, log_scale, places = _state_arguments(state)
    table, stride_t, rotation = _rotation_arguments(state, query)
    lse = lse.contiguous()
    out = empty_output(query, context)
    if out.stride() == context.stride():
        out = context
    sizes = merge_sizes(max(d, d_v))
    groups = 1 if index is None else B  # of rows that have the same state
    programs = max(1, sizes.programs * _multiprocessors(query) // (groups * H))
    merge_kernel[groups * H, programs](
        _descriptor(query, sizes.rows), _descriptor(context, sizes.rows), _descriptor(Z, padded(d)),
        Z, k, log_scale, places, table, _descriptor(out, sizes.rows), lse, stride_t, B // groups, H, H // H_state, L,
        factor, D=d, DV=d_v, CONSTANT=constant, **rotation, MIXED=index is not None,
        BM=sizes.rows, BD=padded(d), BDV=padded(d_v), STAGES=sizes.stages,
        num_warps=sizes.warps, maxnreg=sizes.registers,
    )  # fmt: skip
    return out, lse


def prefix_backward(
    grad_out: Tensor, query: Tensor, out: Tensor, lse: Tensor, grad_query: Tensor | None, state: StateTensors
) -> tuple[Tensor, Tensor]:
    """See `fused_torch.prefix_backward`."""
    state, lse = state._replace(log_scale=state.log_scale.contiguous()), lse.contiguous()
    if grad_query is not None:
        described = _described(grad_query)
        if described is not grad_query:  # the kernels add to a copy
            grads = prefix_backward(grad_out, query, out, lse, described, state)
            grad_query.copy_(described)
            return grads
    if state.table is not None and state.W is None and padded(query.shape[-1]) > 128:
        return _backward_beside_rotation(grad_out, query, out, lse, grad_query, state)
    if state.W is not None:
        return _random_backward(grad_out, query, out, lse, grad_query, state)
    Z, k, log_scale, constant, factor = state.Z, state.k, state.log_scale, state.constant, state.factor
    table, stride_t, rotation = _rotation_arguments(state, query)
    B, H, L, d = query.shape
    d_v = out.shape[-1]
    H_state, r = k.shape
    sizes = backward_sizes(max(d, d_v), query.dtype)
    features = min(sizes.columns, padded(d))
    feature_blocks = ceil_div(d, features)
    programs = sizes.programs * _multiprocessors(query) // (H_state * feature_blocks)
    splits = max(1, min(programs, ceil_div(L, sizes.rows) * B * H // H_state))
    parts = query.new_empty(splits, H_state * r * (d_v + 1), dtype=torch.float32)
    part_Z, part_k = parts.split((H_state * r * d_v, H_state * r), dim=1)
    adds = grad_query is not None
    prefix_backward_kernel[feature_blocks, H_state, splits](
        _descriptor(grad_out, sizes.rows), _descriptor(query, sizes.rows, features), _descriptor(out, sizes.rows),
        lse, _descriptor(query if grad_query is None else grad_query, sizes.rows, features),
        _descriptor(Z.contiguous(), features), k.contiguous(), log_scale, table, part_Z, part_k, stride_t,
        parts.stride(0), B, H, H // H_state, L, factor, D=d, DV=d_v, CONSTANT=constant, **rotation, ADD_TO_GRAD_Q=adds,
        BM=sizes.rows, BDV=padded(d_v), BF=features,
        STAGES=sizes.stages, num_warps=sizes.warps, maxnreg=sizes.registers,
    )  # fmt: skip
    grad_Z, grad_k = parts.sum(dim=0).split((H_state * r * d_v, H_state * r))
    return grad_Z.view_as(Z), grad_k.view_as(k)


def _backward_beside_rotation(
    grad_out: Tensor, query: Tensor, out: Tensor, lse: Tensor, grad_query: Tensor | None, state: StateTensors
) -> tuple[Tensor, Tensor]:
    """The same for large heads, whose pairs are not in one block of the kernel: positions are undone beside it."""
    rotation = state.rotation
    assert rotation is not None
    state = state._replace(table=None)
    grad_x = None if grad_query is None else torch.zeros_like(query)
    grads = prefix_backward(grad_out, unrotated(query, rotation).to(query.dtype), out, lse, grad_x, state)
    if grad_query is not None and grad_x is not None:
        grad_query.add_(turned(grad_x, rotation, forward=True))
    return grads


def _random_backward(
    grad_out: Tensor, query: Tensor, out: Tensor, lse: Tensor, grad_query: Tensor | None, state: StateTensors
) -> tuple[Tensor, Tensor]:
    Z, k, log_scale, _, W, _, constant, factor, *_ = state
    assert W is not None
    table, stride_t, rotation = _rotation_arguments(state, query)
    B, H, L, d = query.shape
    d_v = out.shape[-1]
    H_state, r = k.shape
    R = r - constant
    sizes = random_sizes()
    warps = 8 if max(d, d_v) > 64 else 4
    feature_blocks = ceil_div(R, sizes.columns)
    programs = 2 * _multiprocessors(query) // (H_state * feature_blocks)
    splits = max(1, min(programs, ceil_div(L, sizes.rows) * B * H // H_state))
    parts = query.new_empty(splits, H_state * r * (d_v + 1), dtype=torch.float32)
    part_Z, part_k = parts.split((H_state * r * d_v, H_state * r), dim=1)
    rows = tuple(_descriptor(x, sizes.rows) for x in (grad_out, query, out))
    directions = _descriptor(W, sizes.columns)
    constants = {
        "R": R,
        "CONSTANT": constant,
        "BM": sizes.rows,
        "BD": padded(d),
        "BDV": padded(d_v),
        "BF": sizes.columns,
        **rotation,
    }
    random_backward[feature_blocks, H_state, splits](
        *rows, lse, directions, log_scale, table, part_Z, part_k, stride_t, parts.stride(0), B, H, H // H_state, L,
        factor, DV=d_v, STAGES=1, num_warps=warps, **constants,
    )  # fmt: skip
    if grad_query is not None:
        random_grad_query[ceil_div(L, sizes.rows), B * H](
            *rows, lse, _descriptor(grad_query, sizes.rows), directions, _descriptor(Z.contiguous(), sizes.columns),
            k.contiguous(), log_scale, table, stride_t, H, H // H_state, L, factor, num_warps=warps, **constants,
        )  # fmt: skip
    grad_Z, grad_k = parts.sum(dim=0).split((H_state * r * d_v, H_state * r))
    return grad_Z.view_as(Z), grad_k.view_as(k)


def decode(tokens: Tokens, state: StateTensors) -> Tensor:
    """out [B, H, L, d_v] of a short query that sees all keys, or those that the mask shows; one launch."""
    query, key, value, attn_mask, _, _, scale = tokens
    W, index, constant, factor = state.W, state.rows, state.constant, state.factor
    B, H, L, d = query.shape
    H_kv, S, d_v = key.shape[1], key.shape[2], value.shape[-1]
    H_state = state.Z.shape[-3]
    Z, k, log_scale, places = _state_arguments(state)
    table, stride_t, rotation = _rotation_arguments(state, query)
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
    decode_kernel[splits + (splits > 1), B * H_kv](
        query, key, value, Z if W is None else W.contiguous(), Z, k, log_scale, places, table, mask, out, partial,
        counter, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], stride_t, *mask_strides,
        *out.stride()[:3], H_kv, H // H_kv, H // H_state, L, S, keys_per_split, scale, factor,
        RANDOM=W is not None, R=k.shape[-1] - constant, D=d, DV=d_v, CONSTANT=constant, **rotation,
        MIXED=index is not None, MASKED=attn_mask is not None, SPLITS=splits,
        ROWS=rows, BN=keys, BD=padded(d), BDV=padded(d_v), BF=features, STAGES=3, num_warps=4,
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


def _multiprocessors(x: Tensor) -> int:
    return properties(x.device).multi_processor_count if x.is_cuda else 4


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


def _state_arguments(state: StateTensors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The state as the kernels read it, the heads of a stack one after another, and what stands for Index."""
    Z, k, log_scale = (x.contiguous() for x in state[:3])
    if state.rows is None:
        return Z, k, log_scale, log_scale
    return Z.flatten(0, 1), k.flatten(0, 1), log_scale, state.rows.contiguous()


def _rotation_arguments(state: StateTensors, query: Tensor) -> tuple[Tensor, int, dict[str, int]]:
    """The table of the positions to undo, from one row of the batch to the next in it, and its constants."""
    if state.table is None:
        return query, 0, {"ROTATED": 0, "WIDTH": 2, "START": 0}  # a table that is not looked at
    shared = state.table.shape[0] == 1
    constants = {"ROTATED": state.table.shape[-1], "WIDTH": state.width, "START": state.start}
    return state.table, 0 if shared else state.table.stride(0), constants


def _mask_arguments(attn_mask: Tensor | None, query: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    if attn_mask is None:
        return query, (0, 0, 0, 0)
    return attn_mask.view(torch.uint8), attn_mask.stride()
