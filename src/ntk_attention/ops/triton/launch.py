"""Launches of the Triton kernels: block sizes, the order of the features, work space."""

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..bundles import StateTensors, Tokens
from ..rotation import Rotation
from ..sdpa import empty_output
from .launcher import Launcher, Options, aligned, ceil_div, contiguous, described, descriptor, padded, steps
from .support import forward_sm90, properties, triton

if triton is not None:
    from . import backward as backward_kernels
    from . import beside
    from . import decode as decode_kernels
    from . import forward as forward_kernels

    forward_kernel = Launcher(forward_kernels.fused_forward)
    merge_kernel = Launcher(forward_kernels.merge_prefix)
    decode_kernel = Launcher(decode_kernels.decode)
    backward_kernel = Launcher(backward_kernels.prefix_backward)
    random_backward_kernel = Launcher(backward_kernels.random_backward)
    random_query_kernel = Launcher(backward_kernels.random_grad_query)
    turn_kernel = Launcher(beside.turn_rows)
if forward_sm90 is not None:
    from . import forward_sm90_persistent

    sm90_kernels = [Launcher(forward_sm90.fused_forward), Launcher(forward_sm90_persistent.fused_forward)]


class Sizes(NamedTuple):
    """Sizes of a launch, by measurement on an H200."""

    rows: int  # of queries (BM)
    columns: int  # keys (BN) of the forward pass, features (BF) of the backward pass
    warps: int
    stages: int
    programs: int = 1  # per multiprocessor, where each goes through many rows
    registers: int | None = None  # at most, per thread

    @property
    def options(self) -> Options:
        return Options(self.warps, self.stages, self.registers)


def forward_sizes(head_dim: int, length: int, is_masked: bool) -> Sizes:
    if head_dim <= 64:
        return Sizes(rows=64, columns=64, warps=4, stages=2, registers=None if is_masked else 96)
    if head_dim <= 128:
        if length <= 512 and not is_masked:
            return Sizes(rows=64, columns=32, warps=4, stages=3, registers=168)
        return Sizes(rows=64, columns=64, warps=4, stages=3)
    return Sizes(rows=64, columns=32, warps=8, stages=2)


PERSISTENT_ROWS = 128


def sm90_sizes(head_dim: int, length: int) -> Sizes:
    if head_dim == 128 and length > 512:
        return Sizes(rows=PERSISTENT_ROWS, columns=128, warps=4, stages=2)
    return Sizes(rows=64, columns=64, warps=4, stages=2)


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


class KernelState(NamedTuple):
    """A state as the kernels read it; where there is none of a thing stands a tensor that is not looked at."""

    Z: Tensor  # [H_state, r, d_v], the heads of a stack one after another
    k: Tensor
    log_scale: Tensor
    W: Tensor  # [2, r, d / 2]
    rows: Tensor  # the place of each row's state in the stack

    @classmethod
    def of(cls, state: StateTensors, order: Tensor | None = None) -> "KernelState":
        """The numbers of W in an order, or in their own."""
        Z, k, log_scale, index, W, *_ = state
        if index is not None:
            Z, k, index = Z.flatten(0, 1), k.flatten(0, 1), index.contiguous()
        k = k.contiguous()
        if W is not None:
            W = W if order is None else W.index_select(1, order)
            W = W.unflatten(1, (2, -1)).transpose(0, 1).contiguous()
        return cls(contiguous(Z), k, log_scale.contiguous(), k if W is None else W, k if index is None else index)


class PhiQueries(NamedTuple):
    """The queries that phi sees, and what tiles still have to undo of their positions."""

    x: Tensor  # [B, H, L, d]
    table: Tensor | None  # [B or 1, L, d], of pairs in the halves of a head, in the dtype of x
    is_beside: bool = False  # whether x is not the query, but a copy without positions

    @classmethod
    def of(cls, query: Tensor, state: StateTensors) -> "PhiQueries":
        rotation = state.rotation
        if rotation is None:
            return cls(described(query), None)
        table = contiguous(rotation.table.to(query.dtype))
        if rotation.width == table.shape[-1] == query.shape[-1]:
            return cls(described(query), table)
        return cls(turn(query, rotation._replace(table=table)), None, True)

    @property
    def rotated(self) -> int:
        return 0 if self.table is None else self.table.shape[-1]

    @property
    def table_step(self) -> int:
        return 0 if self.table is None or self.table.shape[0] == 1 else 1

    def descriptors(self, rows: int, columns: int) -> list[Any]:
        """Of both, in blocks; without a table the queries stand for it, at which nobody looks."""
        x = descriptor(self.x, rows, columns)
        return [x, x if self.table is None else descriptor(self.table, rows, columns)]


def turn(x: Tensor, rotation: Rotation, forward: bool = False, add_to: Tensor | None = None) -> Tensor:
    """`rotation.turned` in one launch, in the dtype of x; or added to a tensor in place."""
    B, H, L, d = x.shape
    x = aligned(x)
    out = torch.empty_like(x) if add_to is None else add_to
    table, width, start = rotation
    turn_kernel(
        (ceil_div(L, 32), B * H, 1),
        (),
        (x, table, out),
        (*steps(x), *steps(out), 0 if table.shape[0] == 1 else table.stride(0), H, L),
        (d, table.shape[-1], width, start, forward, add_to is not None, 32, padded(d)),
        Options(4),
    )
    return out


def fused_forward(tokens: Tokens, state: StateTensors, sm90: bool) -> tuple[Tensor, Tensor]:
    """One kernel for tokens and prefix: out [B, H, L, d_v] and the lse of both [B, H, L]; `sm90`: that for Hopper."""
    query, key, value, attn_mask, _, is_causal, scale = tokens
    B, H, L, d = query.shape
    H_kv, S, d_v = value.shape[1:]
    own = KernelState.of(state)
    # In the dtype of matrix products, since every program reads it: tf32 next to fp16, whose exponents are too few.
    Z_product = own.Z.to(torch.bfloat16 if query.dtype == torch.bfloat16 else torch.float32)
    out = empty_output(query, value)
    lse = query.new_empty(B, H, L, dtype=torch.float32)
    heads = (H, H // H_kv, H // state.Z.shape[-3])
    constant, is_mixed = state.constant, state.rows is not None
    if sm90:
        table = None if state.table is None else contiguous(state.table.to(query.dtype))
        sm90_forward(tokens, state, own, Z_product, table, out, lse)
        return out, lse
    is_random = state.W is not None
    sizes = random_sizes() if is_random else forward_sizes(max(d, d_v), L, attn_mask is not None)
    BD, BDV, BH = padded(d), padded(d_v), padded(d // 2)
    features = sizes.columns if is_random else BH
    mask, mask_strides = mask_arguments(attn_mask, query)
    queries = PhiQueries.of(query, state)
    forward_kernel(
        (ceil_div(L, sizes.rows), B * H, 1),
        [
            descriptor(query, sizes.rows, BD), descriptor(key, sizes.columns, BD),
            descriptor(value, sizes.columns, BDV), *queries.descriptors(sizes.rows, BH),
            descriptor(Z_product, features, BDV), descriptor(out, sizes.rows, BDV),
        ],
        (own.Z, own.k, own.log_scale, own.W, own.rows, mask, lse),
        (*mask_strides, queries.table_step, *heads, L, S, 1, scale, state.factor),
        (
            is_random, state.k.shape[-1] - constant, d, d_v, constant, queries.rotated, is_mixed, is_causal,
            attn_mask is not None, sizes.rows, sizes.columns, BD, BH, BDV, features,
        ),
        sizes.options,
    )  # fmt: skip
    return out, lse


def sm90_forward(
    tokens: Tokens,
    state: StateTensors,
    own: KernelState,
    Z_product: Tensor,
    table: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    """The same for Hopper, into given memory: with a program for each tile of queries where these are few, and
    otherwise with programs that stay."""
    query, key, value, _, _, is_causal, scale = tokens
    B, H, L, d = query.shape
    heads = (H, H // key.shape[1], H // state.Z.shape[-3])
    sizes = sm90_sizes(d, L)
    x, y = (1, 1, sizes.rows, d), (1, 1, sizes.columns, d)
    tiles = ceil_div(L, sizes.rows) * B * H
    is_persistent = sizes.rows == PERSISTENT_ROWS
    if is_persistent:
        x, tiles = (1, 1, sizes.rows // 2, d), min(tiles, _multiprocessors(query))
    table = query if table is None else table[None]
    given = zip((query, key, value, Z_product[None], table, out), (x, y, y, y, x, x), strict=True)
    sm90_kernels[is_persistent](
        (tiles, 1, 1) if is_persistent else (ceil_div(L, sizes.rows), B * H, 1),
        [gluon_descriptor(tensor, block) for tensor, block in given],
        (own.Z, own.k, own.log_scale, own.rows, lse),
        (int(table.shape[1] > 1), B, *heads, L, key.shape[2], scale, state.factor),
        (
            d, state.constant, state.table is not None, state.rows is not None, is_causal,
            sizes.rows, sizes.columns, sizes.stages,
        ),
        sizes.options,
    )  # fmt: skip


def merge_prefix(query: Tensor, context: Tensor, lse: Tensor, state: StateTensors) -> tuple[Tensor, Tensor]:
    """See `fused_torch.merge_prefix`; context and lse are given up."""
    B, H, L, d = query.shape
    d_v = context.shape[-1]
    own, queries = KernelState.of(state), PhiQueries.of(query, state)
    context, lse = described(context), lse.contiguous()
    out = empty_output(query, context)
    if out.stride() == context.stride():
        out = context
    sizes = merge_sizes(max(d, d_v))
    groups = 1 if state.rows is None else B  # of rows that have the same state
    programs = max(1, sizes.programs * _multiprocessors(query) // (groups * H))
    BH, BDV = padded(d // 2), padded(d_v)
    merge_kernel(
        (groups * H, programs, 1),
        [
            *queries.descriptors(sizes.rows, BH),
            descriptor(context, sizes.rows, BDV),
            descriptor(out, sizes.rows, BDV),
        ],
        (own.Z, own.k, own.log_scale, own.rows, lse),
        (queries.table_step, B // groups, H, H // state.Z.shape[-3], L, state.factor),
        (d, d_v, state.constant, queries.rotated, state.rows is not None, sizes.rows, BH, BDV, sizes.stages),
        sizes.options,
    )
    return out, lse


def prefix_backward(
    grad_out: Tensor, query: Tensor, out: Tensor, lse: Tensor, grad_query: Tensor | None, state: StateTensors
) -> tuple[Tensor, Tensor]:
    """See `fused_torch.prefix_backward`."""
    B, H, L, d = query.shape
    d_v = out.shape[-1]
    own, queries = KernelState.of(state), PhiQueries.of(query, state)
    H_state, r = state.k.shape
    parts, cut = backward_work(query, d_v, own.k, state)
    part_Z, part_k = parts.split((H_state * r * d_v, H_state * r), dim=1)
    grad_x, half = gradient_of_x(queries, grad_query, cut.half)
    lse, BDV = lse.contiguous(), padded(d_v)
    whole = state.W is None and queries.rotated == 0 and d == 2 * cut.half
    columns = d if whole else cut.half
    tiles = [
        descriptor(grad_out, cut.sizes.rows, BDV),
        descriptor(out, cut.sizes.rows, BDV),
        *queries.descriptors(cut.sizes.rows, columns),
    ]
    grads = descriptor(grad_x, cut.sizes.rows, columns)
    grid = (cut.blocks, H_state, len(parts))
    numbers = (parts.stride(0), queries.table_step, B, H, H // H_state, L, state.factor)
    common: tuple[int, ...] = (d, d_v, state.constant, queries.rotated)
    adds = grad_query is not None
    if state.W is None:
        backward_kernel(
            grid, [*tiles, grads], (own.Z, own.k, own.log_scale, lse, part_Z, part_k), numbers,
            (*common, adds, half, whole, cut.sizes.rows, BDV, cut.half, cut.sizes.stages), cut.sizes.options,
        )  # fmt: skip
    else:
        common = (r - state.constant, *common)
        blocks = (cut.sizes.rows, cut.half, BDV, cut.sizes.columns)
        options = Options(8 if max(d, d_v) > 64 else 4)
        random_backward_kernel(
            grid, tiles, (own.W, own.log_scale, lse, part_Z, part_k), numbers, (*common, *blocks, 1), options
        )
        if adds:
            random_query_kernel(
                (ceil_div(L, cut.sizes.rows), B * H, 1), [*tiles, grads],
                (own.W, own.Z, own.k, own.log_scale, lse), (numbers[1], *numbers[3:]),
                (*common, half, *blocks), options,
            )  # fmt: skip
    if grad_query is not None and grad_x is not grad_query:
        add_gradient(grad_query, grad_x, half, queries, state)
    grad_Z, grad_k = parts.sum(dim=0).split((H_state * r * d_v, H_state * r))
    return grad_Z.view(H_state, r, d_v), grad_k.view(H_state, r)


def gradient_of_x(queries: PhiQueries, grad_query: Tensor | None, half: int) -> tuple[Tensor, int]:
    """What the kernels add the gradient of phi's input to, and how far the halves of a head are apart in it.

    That is the gradient of the query itself where it is an input, or where the kernels turn the one into the other;
    and not where memory or padding does not allow it.
    """
    B, H, L, d = queries.x.shape
    if grad_query is None:
        return queries.x, d // 2  # not looked at
    if (d // 2) % half:  # blocks of the one half would overwrite the other
        return grad_query.new_zeros(B, H, L, 2 * half), half
    is_beside = queries.is_beside
    return (torch.zeros_like(queries.x) if is_beside or described(grad_query) is not grad_query else grad_query), d // 2


def add_gradient(grad_query: Tensor, grad_x: Tensor, half: int, queries: PhiQueries, state: StateTensors) -> None:
    """Add a gradient of phi's input that was kept beside to that of the query."""
    d = grad_query.shape[-1]
    if half != d // 2:
        grad_x = torch.cat([grad_x[..., : d // 2], grad_x[..., half : half + d // 2]], dim=-1)
    if not queries.is_beside:
        grad_query.add_(grad_x)
        return
    assert state.rotation is not None
    writable = aligned(grad_query)
    turn(grad_x, state.rotation, forward=True, add_to=writable)
    if writable is not grad_query:
        grad_query.copy_(writable)


class Cut(NamedTuple):
    """How rows and features are cut in the backward pass."""

    sizes: Sizes
    half: int  # numbers of one half of a head in a block (BH)
    blocks: int  # of features


def backward_work(query: Tensor, d_v: int, k: Tensor, state: StateTensors) -> tuple[Tensor, Cut]:
    """Memory for the sums of each split of the rows, and the blocks."""
    B, H, L, d = query.shape
    H_state, r = k.shape
    half = padded(d // 2)
    if state.W is None:
        sizes = backward_sizes(max(d, d_v), query.dtype)
        half = min(sizes.columns // 2, half)
        blocks = ceil_div(d // 2, half)
    else:
        sizes = random_sizes()._replace(programs=2)
        blocks = ceil_div(r - state.constant, sizes.columns)
    programs = sizes.programs * _multiprocessors(query) // (H_state * blocks)
    splits = max(1, min(programs, ceil_div(L, sizes.rows) * B * H // H_state))
    parts = query.new_empty(splits, H_state * r * (d_v + 1), dtype=torch.float32)
    return parts, Cut(sizes, half, blocks)


def decode(tokens: Tokens, state: StateTensors) -> Tensor:
    """out [B, H, L, d_v] of a short query that sees all keys, or those that the mask shows; one launch."""
    query, key, value, attn_mask, _, _, scale = tokens
    B, H, L, d = query.shape
    H_kv, S, d_v = value.shape[1:]
    is_random, table, rotation, stride_t = state.W is not None, state.table, (0, 2, 0), 0
    if table is not None:
        rotation = (table.shape[-1], state.width, state.start)
        table = contiguous(table.to(query.dtype))
        stride_t = 0 if len(table) == 1 else table.stride(0)
    own = KernelState.of(state, order_of_pairs(d, *rotation, query.device) if is_random else None)
    out = empty_output(query, value)
    BDV = padded(d_v)
    rows, keys = padded(H // H_kv * L), 64 if max(d, d_v) <= 128 else 32
    splits = max(1, min(ceil_div(_multiprocessors(query), B * H_kv), ceil_div(S, 2 * keys), 64))
    keys_per_split = ceil_div(ceil_div(S, splits), keys) * keys
    splits = ceil_div(S, keys_per_split)
    partial, counter = own.k, own.k  # not looked at
    if splits > 1:
        partial = query.new_empty(B * H_kv * (splits + 1) * rows * (BDV + 2), dtype=torch.float32)
        counter = COUNTERS.take(query.device, B * H_kv)
    mask, mask_strides = mask_arguments(attn_mask, query)
    query, key, value = aligned(query), aligned(key), aligned(value)
    state_tensors = (own.W, own.Z, own.k, own.log_scale, own.rows, own.k if table is None else table)
    decode_kernel(
        (splits + (splits > 1), B * H_kv, 1),
        (),
        (query, key, value, *state_tensors, mask, out, partial, counter),
        (
            *steps(query), *steps(key), *steps(value), stride_t, *mask_strides, *steps(out),
            H_kv, H // H_kv, H // state.Z.shape[-3], L, S, keys_per_split, scale, state.factor,
        ),
        (
            is_random, state.k.shape[-1] - state.constant, d, d_v, state.constant, *rotation,
            state.rows is not None, attn_mask is not None, splits, rows, keys, padded(d),
            padded(d // 2) if is_random else min(64, padded(d // 2)), BDV, 32, 3,
        ),
        Options(4),
    )  # fmt: skip
    return out


def order_of_pairs(head_dim: int, rotated: int, width: int, start: int, device: torch.device) -> Tensor | None:
    """The numbers of a head in pairs, int64 [d]: all first members, then all second ones, see pairs.py. None where that
    is their own order."""
    if rotated == 0 or width == rotated == head_dim:
        return None
    place = torch.arange(head_dim, device=device)
    inside = place[start : start + rotated].view(-1, 2, width // 2)
    outside = torch.cat([place[:start], place[start + rotated :]]).view(2, -1)
    return torch.cat([inside.transpose(0, 1).reshape(2, -1), outside], dim=1).flatten()


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


def gluon_descriptor(x: Tensor, block: tuple[int, ...]) -> "forward_sm90.TensorDescriptor":
    """Blocks of x for Gluon, which wants to know how a block lies in shared memory."""
    x = described(x)
    made = object.__new__(forward_sm90.TensorDescriptor)
    made.__dict__.update(
        base=x, shape=x.shape, strides=x.stride(), block_shape=list(block), layout=forward_sm90.shared_layout(block)
    )
    return made


def mask_arguments(attn_mask: Tensor | None, query: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    if attn_mask is None:
        return query, (0, 0, 0, 0)
    return attn_mask.view(torch.uint8), attn_mask.stride()
