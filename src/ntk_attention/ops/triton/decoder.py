"""Launches of the kernel for a short query over a long cache."""

import functools
from typing import Any, NamedTuple

from torch import Tensor

from ..bundles import StateTensors, Tokens
from .arguments import WORKSPACES, KernelState, mask_arguments, multiprocessors, order_of_pairs
from .launcher import UNIT, Launcher, Options, aligned, ceil_div, contiguous, padded, steps
from .support import triton

if triton is not None:
    from . import decode as kernels

    decode_kernel = Launcher(kernels.decode)

OPTIONS = Options(4)


class DecodeKind(NamedTuple):
    """What launches have in common, whatever the tensors and the number of keys."""

    rows: int  # of a program: the query heads of a KV head, and the query's length
    keys: int  # in a block
    max_splits: int  # of the keys
    partial: int  # numbers that the programs of one KV head leave for one another, for each part
    heads: tuple[int, int, int]
    out_shape: tuple[int, int, int, int]  # [B, L, H, d_v]
    out_steps: tuple[int, int, int]  # its strides of b, h and l, in UNITs
    constants: tuple[Any, ...]  # before SPLITS
    blocks: tuple[int, ...]  # behind it


@functools.lru_cache(maxsize=4096)  # of queries of as many shapes
def decode_kind(
    shape: tuple[int, ...], num_kv_heads: int, value_dim: int, state_shape: tuple[int, ...], processors: int,
    options: tuple[Any, ...],
) -> DecodeKind:  # fmt: skip
    """Of a query [B, H, L, d] and Z [..., H_state, r, d_v]; options: is_random, constant, rotation, mixed, masked."""
    (B, H, L, d), d_v = shape, value_dim
    is_random, constant, rotation, is_mixed, is_masked = options
    group, BDV, BH = H // num_kv_heads, padded(d_v), padded(d // 2)
    rows, keys = padded(group * L), 64 if max(d, d_v) <= 128 else 32
    return DecodeKind(
        rows,
        keys,
        max(1, min(ceil_div(processors, B * num_kv_heads), 64)),
        rows * (BDV + 2),
        (num_kv_heads, group, H // state_shape[-3]),
        (B, L, H, d_v),
        (L * H * d_v // UNIT, d_v // UNIT, H * d_v // UNIT),
        (is_random, state_shape[-2] - constant, d, d_v, constant, *rotation, is_mixed, is_masked),
        (rows, keys, padded(d), BH if is_random else min(64, BH), BDV, 32, 3),
    )


class Decoder:
    """A call of a short query that sees all keys, or those that a mask shows, with all that stays the same from one
    token to the next.

    Args:
        tokens: of the first call; later ones have its shapes, but for the number of keys, its dtype and scale, and a
            mask if it has one.
        state: what all calls see. Of the rotation the place of its pairs counts, not the table.
    """

    def __init__(self, tokens: Tokens, state: StateTensors):
        query, _, value, attn_mask, *_ = tokens
        is_random = state.W is not None
        rotation = (0, 2, 0) if state.table is None else (state.table.shape[-1], state.width, state.start)
        options = (is_random, state.constant, rotation, state.rows is not None, attn_mask is not None)
        H_kv, d_v, processors = value.shape[1], value.shape[3], multiprocessors(query)
        self.kind = decode_kind(query.shape, H_kv, d_v, state.Z.shape, processors, options)
        order = order_of_pairs(query.shape[-1], *rotation, query.device) if is_random else None
        self.state = KernelState.of(state, order)
        self.length, self.scale, self.factor = query.shape[2], tokens.scale, state.factor

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, table: Tensor | None
    ) -> Tensor:
        """out [B, L, H, d_v], in one launch.

        Args:
            table: of the rotation.
        """
        kind, own, S = self.kind, self.state, value.shape[2]
        splits = min(kind.max_splits, ceil_div(S, 2 * kind.keys))
        keys_per_split = ceil_div(ceil_div(S, splits), kind.keys) * kind.keys
        splits = ceil_div(S, keys_per_split)
        stride_t, partial, counter = 0, own.k, own.k  # the tensors are not looked at
        if table is None:
            table = own.k
        else:
            table = contiguous(table.to(query.dtype))
            stride_t = 0 if table.shape[0] == 1 else table.stride(0)
        groups = kind.out_shape[0] * kind.heads[0]
        if splits > 1:
            partial, counter = WORKSPACES.take(query, groups * (splits + 1) * kind.partial, groups)
        mask, mask_strides = mask_arguments(attn_mask, query)
        query, key, value = aligned(query), aligned(key), aligned(value)
        out = query.new_empty(kind.out_shape)
        decode_kernel(
            (splits + (splits > 1), groups, 1),
            (),
            (query, key, value, own.W, own.Z, own.k, own.log_scale, own.rows, table, mask, out, partial, counter),
            (
                *steps(query), *steps(key), *steps(value), stride_t, *mask_strides, *kind.out_steps,
                *kind.heads, self.length, S, keys_per_split, self.scale, self.factor,
            ),
            (*kind.constants, splits, *kind.blocks),
            OPTIONS,
        )  # fmt: skip
        return out


def decode(tokens: Tokens, state: StateTensors) -> Tensor:
    """out [B, H, L, d_v] of one call, laid out as [B, L, H, d_v]."""
    return Decoder(tokens, state)(*tokens[:4], state.table).transpose(1, 2)
