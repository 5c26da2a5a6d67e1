"""Launches of the Triton kernels for many queries, and the sizes of their blocks; for few see decoder.py."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..bundles import StateTensors, Tokens
from ..sdpa import empty_output
from .arguments import KernelState, PhiQueries, gluon_descriptor, mask_arguments, multiprocessors, turn
from .launcher import Launcher, Options, aligned, ceil_div, contiguous, described, descriptor, padded
from .support import forward_sm90, triton

if triton is not None:
    from . import backward as backward_kernels
    from . import forward as forward_kernels

    forward_kernel = Launcher(forward_kernels.fused_forward)
    merge_kernel = Launcher(forward_kernels.merge_prefix)
    backward_kernel = Launcher(backward_kernels.prefix_backward)
    random_backward_kernel = Launcher(backward_kernels.random_backward)
    random_query_kernel = Launcher(backward_kernels.random_grad_query)
if forward_sm90 is not None:
    from . import forward_sm90_persistent

    sm90_kernels = [Launcher(forward_sm90.fused_forward), Launcher(forward_sm90_persistent.fused_forward)]


class Sizes(NamedTuple):
    """Sizes of a launch, by measurement on an H200; those of Triton's forward passes on an H100."""

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
    if head_dim <= 128:
        return Sizes(rows=64, columns=128, warps=4, stages=3)
    return Sizes(rows=32, columns=256, warps=8, stages=2)


def backward_sizes(head_dim: int, dtype: torch.dtype) -> Sizes:
    if head_dim <= 64:
        is_bf16 = dtype == torch.bfloat16  # beside fp16, Z takes twice the memory
        return Sizes(rows=64 if is_bf16 else 32, columns=64, warps=4, stages=3, programs=2)
    if head_dim <= 128:
        return Sizes(rows=64 if dtype == torch.bfloat16 else 32, columns=128, warps=8, stages=2)
    return Sizes(rows=64, columns=64, warps=8, stages=2)


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
        x, tiles = (1, 1, sizes.rows // 2, d), min(tiles, multiprocessors(query))
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
    programs = max(1, sizes.programs * multiprocessors(query) // (groups * H))
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
    part_Z, part_k = parts, parts[:, H_state * r * d_v :]  # one behind the other, in each split
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
    total = parts[0] if len(parts) == 1 else parts.sum(dim=0)
    grad_Z = total.as_strided((H_state, r, d_v), (r * d_v, d_v, 1))
    return grad_Z, total.as_strided((H_state, r), (r, 1), H_state * r * d_v)


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
    programs = sizes.programs * multiprocessors(query) // (H_state * blocks)
    splits = max(1, min(programs, ceil_div(L, sizes.rows) * B * H // H_state))
    parts = query.new_empty(splits, H_state * r * (d_v + 1), dtype=torch.float32)
    return parts, Cut(sizes, half, blocks)
