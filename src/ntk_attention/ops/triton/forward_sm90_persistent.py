"""The fused forward pass for Hopper, in Gluon: one warp loads, two groups of four warps compute.

The same function as `forward.fused_forward` for bf16, d = d_v in {64, 128}, no mask, and rotary positions whose pairs
lie in the two halves of a head. A program stays on its multiprocessor and goes through many tiles of 128 queries, 64 of
each group. The loading warp is ahead of the groups, also from one tile to the next; these wait for data, never for
each other, so that the softmax of the one runs beside the products of the other. The prefix is the first block: its
weights are phi, its values Z.
"""

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

from .forward_sm90 import compiled, load, store, synchronize
from .tiles import LOG2E, NOTHING, TINY

__all__ = ["fused_forward"]


@gluon.jit
def tile_of(t, tiles, IS_CAUSAL: gl.constexpr):
    """The head and the tile of queries of the work item t. Every second head goes backwards, so that programs get
    long and short tiles in turn."""
    bh, i = t // tiles, t % tiles
    if IS_CAUSAL:
        i = gl.where(bh % 2 == 0, tiles - 1 - i, i)
    return bh, i


@gluon.jit
def blocks_of(i, S, IS_CAUSAL: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr):
    """How many blocks of keys a tile of queries sees."""
    end = S
    if IS_CAUSAL:
        end = gl.minimum((i + 1) * BM, S)
    return gl.cdiv(end, BN)


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    stage += 1
    if stage == STAGES:
        stage, phase = 0, phase ^ 1
    return stage, phase


@gluon.jit
def fill(X, b, h, n, buffer, ready):
    """Start to fill a buffer with the rows n ... of one head."""
    block: gl.constexpr = X.block_type
    mbarrier.expect(ready, block.nbytes)
    load(X, [b, h, n, 0], ready, buffer)


@gluon.jit
def load_tiles(
    Q, K, V, Z_blocks, Table, Index, q, angles, k, v, q_ready, q_free, k_ready, k_free, v_ready, v_free,
    items, tiles, table_step, H, heads_per_kv, heads_per_state, S,
    ROTATED: gl.constexpr, MIXED: gl.constexpr, IS_CAUSAL: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """All loads of a program, in the order in which the groups ask for them."""
    HALF: gl.constexpr = BM // 2
    BYTES: gl.constexpr = Q.block_type.nbytes + (Table.block_type.nbytes if ROTATED else 0)
    k_stage, k_phase, v_stage, v_phase, q_phase = 0, 1, 0, 1, 1  # a buffer that was never filled is free
    for t in range(gl.program_id(0), items, gl.num_programs(0)):
        bh, i = tile_of(t, tiles, IS_CAUSAL)
        b, h = bh // H, bh % H
        state = h // heads_per_state
        if MIXED:
            state = (gl.maximum(gl.load(Index + b), 0) * H + h) // heads_per_state
        blocks = blocks_of(i, S, IS_CAUSAL, BM, BN)
        for group in gl.static_range(2):
            mbarrier.wait(q_free.index(group), q_phase)
            mbarrier.expect(q_ready.index(group), BYTES)
            start = i * BM + group * HALF
            load(Q, [b, h, start, 0], q_ready.index(group), q.index(group))
            if ROTATED:
                load(Table, [0, b * table_step, start, 0], q_ready.index(group), angles.index(group))
        q_phase ^= 1
        mbarrier.wait(v_free.index(v_stage), v_phase)
        fill(Z_blocks, 0, state, 0, v.index(v_stage), v_ready.index(v_stage))
        v_stage, v_phase = next_stage(v_stage, v_phase, STAGES)
        for j in range(blocks):
            n = (blocks - 1 - j) * BN  # the last, the only one that hides keys, first
            mbarrier.wait(k_free.index(k_stage), k_phase)
            fill(K, b, h // heads_per_kv, n, k.index(k_stage), k_ready.index(k_stage))
            k_stage, k_phase = next_stage(k_stage, k_phase, STAGES)
            mbarrier.wait(v_free.index(v_stage), v_phase)
            fill(V, b, h // heads_per_kv, n, v.index(v_stage), v_ready.index(v_stage))
            v_stage, v_phase = next_stage(v_stage, v_phase, STAGES)


@gluon.jit
def attend_tiles(
    group: gl.constexpr, Out, Z, k_state, b_state, Index, Lse,
    q, angles, out, k, v, q_ready, q_free, k_ready, k_free, v_ready, v_free,
    items, tiles, H, heads_per_state, L, S, scale, factor,
    D: gl.constexpr, CONSTANT: gl.constexpr, ROTATED: gl.constexpr, MIXED: gl.constexpr, IS_CAUSAL: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The queries of one group: flash attention whose online softmax starts from the block of the prefix."""
    dtype: gl.constexpr = gl.bfloat16
    ROWS: gl.constexpr = BM // 2
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    mma_out: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma_out, 2)
    row: gl.constexpr = gl.SliceLayout(1, mma)
    row_out: gl.constexpr = gl.SliceLayout(1, mma_out)
    qk_scale = scale * LOG2E
    no_logits = gl.zeros([ROWS, BN], gl.float32, mma)
    k_stage, k_phase, v_stage, v_phase, q_phase = 0, 0, 0, 0, 0
    q_block = q.index(group).reshape([ROWS, D])
    angle_block = angles.index(group).reshape([ROWS, D])
    for t in range(gl.program_id(0), items, gl.num_programs(0)):
        bh, i = tile_of(t, tiles, IS_CAUSAL)
        b, h = bh // H, bh % H
        state, has_state = h // heads_per_state, True
        if MIXED:
            place = gl.load(Index + b)
            state, has_state = (gl.maximum(place, 0) * H + h) // heads_per_state, place >= 0
        start = i * BM + group * ROWS
        blocks = blocks_of(i, S, IS_CAUSAL, BM, BN)

        # The block of the prefix, in the halves of a head, in which the numbers of a pair lie
        HALF: gl.constexpr = D // 2
        columns = gl.arange(0, HALF, gl.SliceLayout(0, operand))
        k1 = gl.load(k_state + state * (D + CONSTANT) + columns).to(gl.float32)
        k2 = gl.load(k_state + state * (D + CONSTANT) + HALF + columns).to(gl.float32)
        log_scale = gl.load(b_state + state).to(gl.float32) * LOG2E
        acc = gl.zeros([ROWS, D], gl.float32, mma_out)
        phi_k = gl.zeros([ROWS], gl.float32, row_out)
        if CONSTANT:
            constant = state * (D + 1) + D
            acc += gl.load(Z + constant * D + gl.arange(0, D, gl.SliceLayout(0, mma_out))).to(gl.float32)[None, :]
            phi_k += gl.load(k_state + constant).to(gl.float32)
        mbarrier.wait(q_ready.index(group), q_phase)
        q_phase ^= 1
        q1 = q_block.slice(0, HALF, dim=1).load(operand).to(gl.float32)
        q2 = q_block.slice(HALF, HALF, dim=1).load(operand).to(gl.float32)
        if ROTATED:
            cos = angle_block.slice(0, HALF, dim=1).load(operand).to(gl.float32)
            sin = angle_block.slice(HALF, HALF, dim=1).load(operand).to(gl.float32)
            q1, q2 = cos * q1 + sin * q2, cos * q2 - sin * q1
        x1, x2 = q1 * factor, q2 * factor
        phi1 = gl.where(x1 < 0, gl.exp2(x1 * LOG2E), x1 + 1)
        phi2 = gl.where(x2 < 0, gl.exp2(x2 * LOG2E), x2 + 1)
        phi_k += gl.convert_layout(gl.sum(phi1 * k1[None, :], 1) + gl.sum(phi2 * k2[None, :], 1), row_out)
        mbarrier.wait(v_ready.index(v_stage), v_phase)
        z = v.index(v_stage).reshape([BN, D])
        acc = warpgroup_mma(phi1.to(dtype), z.slice(0, HALF, dim=0), acc, is_async=True)
        acc = warpgroup_mma(phi2.to(dtype), z.slice(HALF, HALF, dim=0), acc, is_async=True)
        # The logits of the first keys meanwhile
        mbarrier.wait(k_ready.index(k_stage), k_phase)
        keys = k.index(k_stage).reshape([BN, D]).permute((1, 0))
        s = warpgroup_mma(q_block, keys, no_logits, use_acc=False, is_async=True)
        has_weight = (phi_k > TINY) & has_state
        peak = gl.convert_layout(gl.where(has_weight, log_scale, NOTHING), row)
        mass = gl.convert_layout(gl.where(has_weight, phi_k, 0.0), row)
        acc = warpgroup_mma_wait(1, deps=[acc])
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(v_free.index(v_stage))
        v_stage, v_phase = next_stage(v_stage, v_phase, STAGES)
        mbarrier.arrive(k_free.index(k_stage))
        k_stage, k_phase = next_stage(k_stage, k_phase, STAGES)

        rows = start + gl.arange(0, ROWS, row)
        seen = (blocks - 1) * BN + gl.arange(0, BN, gl.SliceLayout(0, mma))
        visible = (seen < S)[None, :]
        if IS_CAUSAL:
            visible = visible & (seen[None, :] <= rows[:, None])
        s = gl.where(visible, s, float("-inf"))
        acc = warpgroup_mma_init(acc)
        for block in range(blocks):
            new_peak = gl.maximum(peak, gl.max(s, 1) * qk_scale)
            p = gl.exp2(s * qk_scale - new_peak[:, None])
            alpha = gl.exp2(peak - new_peak)
            mass = mass * alpha + gl.sum(p, 1)
            peak = new_peak
            acc = warpgroup_mma_wait(0, deps=[acc])
            if block > 0:
                mbarrier.arrive(v_free.index(v_stage))
                v_stage, v_phase = next_stage(v_stage, v_phase, STAGES)
            acc = acc * gl.convert_layout(alpha, row_out)[:, None]
            # The logits of the next block; behind the last one they are of old keys, and nobody looks at them.
            mbarrier.wait(k_ready.index(k_stage), k_phase, pred=block < blocks - 1)
            keys = k.index(k_stage).reshape([BN, D]).permute((1, 0))
            s = warpgroup_mma(q_block, keys, no_logits, use_acc=False, is_async=True)
            mbarrier.wait(v_ready.index(v_stage), v_phase)
            values = v.index(v_stage).reshape([BN, D])
            acc = warpgroup_mma(gl.convert_layout(p.to(dtype), operand), values, acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s])
            if block < blocks - 1:
                mbarrier.arrive(k_free.index(k_stage))
                k_stage, k_phase = next_stage(k_stage, k_phase, STAGES)
        mbarrier.arrive(q_free.index(group))
        gl.store(Lse + bh.to(gl.int64) * L + rows, (peak + gl.log2(mass)) / LOG2E, mask=rows < L)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_free.index(v_stage))
        v_stage, v_phase = next_stage(v_stage, v_phase, STAGES)
        tma.store_wait(0)  # of the tile before
        synchronize()
        out.index(group).reshape([ROWS, D]).store((acc * gl.convert_layout(1 / mass, row_out)[:, None]).to(dtype))
        fence_async_shared()
        store(Out, [b, h, start, 0], out.index(group))
    tma.store_wait(0)


@compiled
def fused_forward(
    Q, K, V, Z_blocks, Table, Out, Z, k_state, b_state, Index, Lse,
    table_step, B, H, heads_per_kv, heads_per_state, L, S, scale, factor,
    D: gl.constexpr, CONSTANT: gl.constexpr, ROTATED: gl.constexpr, MIXED: gl.constexpr, IS_CAUSAL: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Arguments as in tiles.py."""
    q = gl.allocate_shared_memory(gl.bfloat16, [2, 1, 1, BM // 2, D], Q.layout)
    out = gl.allocate_shared_memory(gl.bfloat16, [2, 1, 1, BM // 2, D], Out.layout)
    angles = q
    if ROTATED:
        angles = gl.allocate_shared_memory(gl.bfloat16, [2, 1, 1, BM // 2, D], Table.layout)
    k = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, 1, BN, D], K.layout)
    v = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, 1, BN, D], V.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for group in gl.static_range(2):
        mbarrier.init(q_ready.index(group), count=1)
        mbarrier.init(q_free.index(group), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(v_ready.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=2)  # both groups
        mbarrier.init(v_free.index(stage), count=2)
    fence_async_shared()
    synchronize()
    tiles = gl.cdiv(L, BM)
    items = B * H * tiles
    # Written out in the call: in a variable, constants would become numbers.
    gl.warp_specialize(
        [
            (attend_tiles, (
                0, Out, Z, k_state, b_state, Index, Lse, q, angles, out, k, v, q_ready, q_free, k_ready, k_free,
                v_ready, v_free, items, tiles, H, heads_per_state, L, S, scale, factor,
                D, CONSTANT, ROTATED, MIXED, IS_CAUSAL, BM, BN, STAGES,
            )),
            (attend_tiles, (
                1, Out, Z, k_state, b_state, Index, Lse, q, angles, out, k, v, q_ready, q_free, k_ready, k_free,
                v_ready, v_free, items, tiles, H, heads_per_state, L, S, scale, factor,
                D, CONSTANT, ROTATED, MIXED, IS_CAUSAL, BM, BN, STAGES,
            )),
            (load_tiles, (
                Q, K, V, Z_blocks, Table, Index, q, angles, k, v, q_ready, q_free, k_ready, k_free, v_ready, v_free,
                items, tiles, table_step, H, heads_per_kv, heads_per_state, S,
                ROTATED, MIXED, IS_CAUSAL, BM, BN, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],  # registers of a thread; the group that is not asked gets what is left
    )  # fmt: skip
