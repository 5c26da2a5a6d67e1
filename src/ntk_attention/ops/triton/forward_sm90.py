"""The fused forward pass for Hopper, in Gluon, where the order of loads and products is ours.

The same function as `forward.fused_forward` for bf16, d = d_v in {64, 128}, no mask, and rotary positions whose pairs
lie in the two halves of a head. A program of 64 rows is short:
nine blocks of keys at L = 1,024. Triton waits for q, for Z and for the first keys one after another; here all are on
their way at once, and a block's softmax runs while the product of the one before it does.
"""

import functools

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .tiles import LOG2E, NOTHING, TINY, decorated

__all__ = ["TensorDescriptor", "fused_forward", "shared_layout"]

compiled = functools.partial(decorated, gluon.jit)
# Older names in Triton 3.6
synchronize = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@functools.cache
def shared_layout(block: tuple[int, ...]) -> gl.NVMMASharedLayout:
    """How a bf16 block lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for(list(block), gl.bfloat16)


@gluon.jit
def load_block(X, b, h, n, blocks, ready, i, exists):
    """Start to fill the buffer i with the rows n ... of one head, unless they do not exist."""
    block: gl.constexpr = X.block_type
    mbarrier.expect(ready.index(i), block.nbytes, pred=exists)
    load(X, [b, h, n, 0], ready.index(i), blocks.index(i), pred=exists)


@compiled
def fused_forward(
    Q, K, V, Z_blocks, Table, Out, Z, k_state, b_state, Index, Lse, table_step,
    B, H, heads_per_kv, heads_per_state, L, S, scale, factor,
    D: gl.constexpr, CONSTANT: gl.constexpr, ROTATED: gl.constexpr, MIXED: gl.constexpr, IS_CAUSAL: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Flash attention whose online softmax starts from the block of the prefix; arguments as in tiles.py.

    The blocks of keys go from the last, the only one that hides keys, to the first. Block t is in stage t % STAGES,
    its keys in the buffer 2 stage, its values behind them; Z, in blocks of BN rows, is in the last stage before it.
    """
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[BM // 16, 1], instr_shape=[16, BN, 16])
    mma_out: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[BM // 16, 1], instr_shape=[16, D, 16]
    )
    operand: gl.constexpr = gl.DotOperandLayout(0, mma_out, 2)
    row: gl.constexpr = gl.SliceLayout(1, mma)
    row_out: gl.constexpr = gl.SliceLayout(1, mma_out)
    dtype: gl.constexpr = Q.dtype
    i = gl.cdiv(L, BM) - 1 - gl.program_id(0)  # under causality the longest rows first
    bh = gl.program_id(1)
    b, h = bh // H, bh % H
    state, has_state = h // heads_per_state, True
    if MIXED:
        place = gl.load(Index + b)
        state, has_state = (gl.maximum(place, 0) * H + h) // heads_per_state, place >= 0
    h_kv = h // heads_per_kv
    end = S
    if IS_CAUSAL:
        end = gl.minimum((i + 1) * BM, S)
    blocks = gl.cdiv(end, BN)

    q = gl.allocate_shared_memory(dtype, [1, 1, 1, BM, D], Q.layout)
    kv = gl.allocate_shared_memory(dtype, [2 * STAGES, 1, 1, BN, D], K.layout)
    angles = q
    if ROTATED:
        angles = gl.allocate_shared_memory(dtype, [1, 1, 1, BM, D], Table.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    table_ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    z_ready = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready.index(0), count=1)
    mbarrier.init(table_ready.index(0), count=1)
    for s in gl.static_range(2 * STAGES):
        mbarrier.init(ready.index(s), count=1)
        mbarrier.init(z_ready.index(s), count=1)
    fence_async_shared()
    synchronize()
    LAST: gl.constexpr = 2 * STAGES - 2
    load_block(Q, b, h, i * BM, q, q_ready, 0, True)
    if ROTATED:
        load_block(Table, 0, b * table_step, i * BM, angles, table_ready, 0, True)
    for part in gl.static_range(D // BN):
        load_block(Z_blocks, 0, state, part * BN, kv, z_ready, LAST + part, True)
    for t in gl.static_range(STAGES - 1):
        load_block(K, b, h_kv, (blocks - 1 - t) * BN, kv, ready, 2 * t, t < blocks)
        load_block(V, b, h_kv, (blocks - 1 - t) * BN, kv, ready, 2 * t + 1, t < blocks)

    # The block of the prefix
    log_scale = gl.load(b_state + state).to(gl.float32) * LOG2E
    acc = gl.zeros([BM, D], gl.float32, mma_out)
    phi_k = gl.zeros([BM], gl.float32, row_out)
    if CONSTANT:
        constant = state * (D + 1) + D
        z_one = gl.load(Z + constant * D + gl.arange(0, D, gl.SliceLayout(0, mma_out)))
        acc += z_one.to(gl.float32)[None, :]
        phi_k += gl.load(k_state + constant).to(gl.float32)
    PART: gl.constexpr = D // 2 if ROTATED else BN  # of the features: those of a pair lie in the two halves
    columns = gl.arange(0, PART, gl.SliceLayout(0, operand))
    features = state * (D + CONSTANT) + columns
    q_block = q.index(0).reshape([BM, D])
    mbarrier.wait(q_ready.index(0), 0)
    if ROTATED:
        angle_block = angles.index(0).reshape([BM, D])
        mbarrier.wait(table_ready.index(0), 0)
        cos = angle_block.slice(0, PART, dim=1).load(operand).to(gl.float32)
        sin = angle_block.slice(PART, PART, dim=1).load(operand).to(gl.float32)
    for part in gl.static_range(D // PART):
        k = gl.load(k_state + part * PART + features).to(gl.float32)
        x = q_block.slice(part * PART, PART, dim=1).load(operand).to(gl.float32)
        if ROTATED:
            other = q_block.slice((1 - part) * PART, PART, dim=1).load(operand).to(gl.float32)
            x = cos * x + (sin if part == 0 else -sin) * other
        x *= factor
        phi = gl.where(x < 0, gl.exp2(x * LOG2E), x + 1)
        phi_k += gl.convert_layout(gl.sum(phi * k[None, :], 1), row_out)
        if part * PART % BN == 0:
            mbarrier.wait(z_ready.index(LAST + part * PART // BN), 0)
        z = kv.index(LAST + part * PART // BN).reshape([BN, D]).slice(part * PART % BN, PART, dim=0)
        acc = warpgroup_mma(phi.to(dtype), z, acc, is_async=True)
    # The logits of the first keys meanwhile
    no_logits = gl.zeros([BM, BN], gl.float32, mma)
    mbarrier.wait(ready.index(0), 0)
    keys = kv.index(0).reshape([BN, D]).permute((1, 0))
    s = warpgroup_mma(q_block, keys, no_logits, use_acc=False, is_async=True)
    acc = warpgroup_mma_wait(1, deps=[acc])
    has_weight = (phi_k > TINY) & has_state
    acc = acc * gl.where(has_weight, 1 / phi_k, 0.0)[:, None]
    peak = gl.convert_layout(gl.where(has_weight, gl.log2(phi_k) + log_scale, NOTHING), row)
    mass = gl.convert_layout(gl.where(has_weight, 1.0, 0.0), row)
    s = warpgroup_mma_wait(0, deps=[s])
    synchronize()  # nobody reads Z any more
    n = (blocks - STAGES) * BN
    load_block(K, b, h_kv, n, kv, ready, LAST, blocks >= STAGES)
    load_block(V, b, h_kv, n, kv, ready, LAST + 1, blocks >= STAGES)

    rows = i * BM + gl.arange(0, BM, row)
    columns = (blocks - 1) * BN + gl.arange(0, BN, gl.SliceLayout(0, mma))
    visible = (columns < S)[None, :]
    if IS_CAUSAL:
        visible = visible & (columns[None, :] <= rows[:, None])
    s = gl.where(visible, s, float("-inf"))
    qk_scale = scale * LOG2E
    acc = warpgroup_mma_init(acc)
    stage, phase = 0, 0
    for t in range(blocks):
        new_peak = gl.maximum(peak, gl.max(s, 1) * qk_scale)
        p = gl.exp2(s * qk_scale - new_peak[:, None])
        alpha = gl.exp2(peak - new_peak)
        mass = mass * alpha + gl.sum(p, 1)
        peak = new_peak
        acc = warpgroup_mma_wait(0, deps=[acc])
        synchronize()  # nobody reads the values of block t - 1 and the keys of block t any more
        before = gl.where(stage == 0, STAGES, stage) - 1
        is_needed = (t > 0) & (t - 1 + STAGES < blocks)
        load_block(V, b, h_kv, (blocks - t - STAGES) * BN, kv, ready, 2 * before + 1, is_needed)
        load_block(K, b, h_kv, (blocks - 1 - t - STAGES) * BN, kv, ready, 2 * stage, t + STAGES < blocks)
        acc = acc * gl.convert_layout(alpha, row_out)[:, None]
        next_stage, next_phase = stage + 1, phase
        if next_stage == STAGES:
            next_stage, next_phase = 0, phase ^ 1
        # The logits of block t + 1; behind the last block they are of old keys, and nobody looks at them.
        mbarrier.wait(ready.index(2 * next_stage), next_phase, pred=t + 1 < blocks)
        keys = kv.index(2 * next_stage).reshape([BN, D]).permute((1, 0))
        s = warpgroup_mma(q_block, keys, no_logits, use_acc=False, is_async=True)
        mbarrier.wait(ready.index(2 * stage + 1), phase)
        values = kv.index(2 * stage + 1).reshape([BN, D])
        acc = warpgroup_mma(gl.convert_layout(p.to(dtype), operand), values, acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        stage, phase = next_stage, next_phase
    acc = warpgroup_mma_wait(0, deps=[acc])
    gl.store(Lse + bh.to(gl.int64) * L + rows, (peak + gl.log2(mass)) / LOG2E, mask=rows < L)
    synchronize()  # nobody reads q any more
    q_block.store((acc * gl.convert_layout(1 / mass, row_out)[:, None]).to(dtype))
    fence_async_shared()
    store(Out, [b, h, i * BM, 0], q.index(0))
    tma.store_wait(0)
