"""What launches give the kernels of a state, of queries and of masks, and the memory of decoding."""

import functools
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..bundles import StateTensors
from ..rotation import Rotation
from .launcher import Launcher, Options, aligned, ceil_div, contiguous, described, descriptor, padded, steps
from .support import forward_sm90, properties, triton

if triton is not None:
    from . import beside

    turn_kernel = Launcher(beside.turn_rows)


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


def order_of_pairs(head_dim: int, rotated: int, width: int, start: int, device: torch.device) -> Tensor | None:
    """The numbers of a head in pairs, int64 [d]: all first members, then all second ones, see pairs.py. None where that
    is their own order."""
    if rotated == 0 or width == rotated == head_dim:
        return None
    place = torch.arange(head_dim, device=device)
    inside = place[start : start + rotated].view(-1, 2, width // 2)
    outside = torch.cat([place[:start], place[start + rotated :]]).view(2, -1)
    return torch.cat([inside.transpose(0, 1).reshape(2, -1), outside], dim=1).flatten()


def gluon_descriptor(x: Tensor, block: tuple[int, ...]) -> "forward_sm90.TensorDescriptor":
    """Blocks of x for Gluon, which wants to know how a block lies in shared memory."""
    x = described(x)
    made = object.__new__(forward_sm90.TensorDescriptor)
    made.__dict__.update(base=x, shape=x.shape, strides=x.stride(), **described_block(block))
    return made


@functools.cache
def described_block(block: tuple[int, ...]) -> dict[str, Any]:
    return {"block_shape": list(block), "layout": forward_sm90.shared_layout(block)}


def mask_arguments(attn_mask: Tensor | None, query: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    if attn_mask is None:
        return query, (0, 0, 0, 0)
    return attn_mask.view(torch.uint8), attn_mask.stride()


def multiprocessors(x: Tensor) -> int:
    return properties(x.device).multi_processor_count if x.is_cuda else 4


class Workspaces:
    """Memory in which the programs of one decoding launch leave parts for one another and count themselves; a kernel
    leaves the counters at zero.

    Launches that may overlap must not share it. Launches of one stream follow one another, so a stream has its own. A
    captured launch can be replayed on any stream: it gets memory of the graph, and counters for good; few, since graphs
    are few.
    """

    POOL = 1 << 20

    def __init__(self) -> None:
        self.lock = threading.Lock()  # two threads must not make one for the same stream, or cut the same counters
        self.found: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.pools: dict[int, tuple[Tensor, int]] = {}  # zeros of a device, and how many of them are given away

    def take(self, like: Tensor, num_floats: int, num_counters: int) -> tuple[Tensor, Tensor]:
        """So many float32 at least, and so many zeroed integers, on the device of a tensor."""
        device = like.get_device()
        if device < 0:
            return like.new_empty(num_floats, dtype=torch.float32), like.new_zeros(num_counters, dtype=torch.int32)
        if torch.cuda.is_current_stream_capturing():
            with self.lock:
                return like.new_empty(num_floats, dtype=torch.float32), self.cut(like, device, num_counters)
        stream = (device, torch._C._cuda_getCurrentRawStream(device))
        found = self.found.get(stream)
        if found is None or len(found[0]) < num_floats or len(found[1]) < num_counters:
            with self.lock:
                if device not in self.pools:
                    self.pools[device] = like.new_zeros(self.POOL, dtype=torch.int32), 0
                    torch.cuda.synchronize(device)  # zero for every stream
                # Twice as much, since caches grow. What is replaced may still be in use: torch gives its memory to
                # later launches of the same stream only.
                floats = like.new_empty(2 * num_floats, dtype=torch.float32)
                found = self.found[stream] = floats, like.new_zeros(max(num_counters, 4096), dtype=torch.int32)
        return found

    def cut(self, like: Tensor, device: int, size: int) -> Tensor:
        """Zeros of the pool; where there are none, new ones, with which a graph has one more node for each launch."""
        pool, used = self.pools.get(device, (None, 0))
        if pool is None or used + size > len(pool):
            return like.new_zeros(size, dtype=torch.int32)
        self.pools[device] = pool, used + size
        return pool[used : used + size]


WORKSPACES = Workspaces()
