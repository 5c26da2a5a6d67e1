"""A short query over a long cache, in one launch.

The arguments are explained in tiles.py.
"""

import triton.language as tl

from .pairs import UNIT, head_of
from .tiles import (
    LOG2E,
    NOTHING,
    TINY,
    attend_cache,
    compiled,
    merged,
    prefix_part,
    stacked_head,
    stored_part,
)


@compiled
def decode(
    Q, K, V, W, Z, k_state, b_state, Index, Table, Mask, Out, Partial, Counter,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_t, stride_mb, stride_mh, stride_ml, stride_ms, stride_ob, stride_oh, stride_ol,
    H_kv, heads_per_kv, heads_per_state, L, S, keys_per_split, scale, factor,
    RANDOM: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CONSTANT: tl.constexpr,
    ROTATED: tl.constexpr, WIDTH: tl.constexpr, START: tl.constexpr,
    MIXED: tl.constexpr, MASKED: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, BDV: tl.constexpr, BF: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A short query against a long cache: the query heads of one KV head are the rows, its keys are split.

    The prefix is one more split. The one that finishes last puts all parts together, so that it takes one launch; it
    leaves the counter at zero for the next one. Partial holds the outputs of all parts, then their peaks, then their
    masses.
    """
    split = tl.program_id(0)
    bh = tl.program_id(1)
    b, h_kv = bh // H_kv, bh % H_kv
    b = b.to(tl.int64)
    row = tl.arange(0, ROWS)
    head = row // L  # within the group of the KV head
    h = h_kv * heads_per_kv + head
    wide_h, wide_h_kv = h.to(tl.int64)[:, None], h_kv.to(tl.int64)  # products with strides pass 2^31
    state_kv, has_state = stacked_head(Index, b, h_kv, H_kv, MIXED)
    state_h = state_kv * heads_per_kv + head
    in_rows = row < heads_per_kv * L
    d = tl.arange(0, BD)
    v = tl.arange(0, BDV)
    Q = head_of(Q, b, wide_h, stride_qb, stride_qh) + (row % L)[:, None] * (stride_ql * UNIT)
    Table += b * stride_t
    q = tl.load(Q + d[None, :], mask=in_rows[:, None] & (d < D)[None, :], other=0.0)

    acc, peak, mass = attend_cache(
        q, head_of(K, b, wide_h_kv, stride_kb, stride_kh), head_of(V, b, wide_h_kv, stride_vb, stride_vh),
        Mask + b * stride_mb + wide_h * stride_mh + (row % L)[:, None] * stride_ml,
        stride_ks * UNIT, stride_vs * UNIT, stride_ms,
        in_rows, split * keys_per_split, tl.minimum((split + 1) * keys_per_split, S), scale * LOG2E,
        D, DV, MASKED, ROWS, BN, BD, BDV, STAGES,
    )  # fmt: skip
    is_last = True
    part = bh.to(tl.int64) * (SPLITS + 1) * ROWS + row
    parts = tl.num_programs(1).to(tl.int64) * (SPLITS + 1) * ROWS
    Partial_peak = Partial + parts * BDV
    Partial_mass = Partial_peak + parts
    if SPLITS > 1:
        if split == SPLITS:
            acc, peak, mass = prefix_part(
                Q, Table, row % L, W, Z, k_state, b_state, in_rows, state_h, state_kv, heads_per_kv,
                heads_per_state, factor, RANDOM, R, D, DV, CONSTANT, ROTATED, WIDTH, START, ROWS, BH, BDV, BF,
            )  # fmt: skip
        tl.store(Partial_peak + part + split * ROWS, peak)
        tl.store(Partial_mass + part + split * ROWS, mass)
        tl.store(Partial + (part + split * ROWS)[:, None] * BDV + v[None, :], acc)
        tl.debug_barrier()  # the stores of all threads come before the count
        is_last = tl.atomic_add(Counter + bh, 1, sem="acq_rel") == SPLITS
    if is_last:
        if SPLITS > 1:
            tl.store(Counter + bh, 0)
            acc = tl.zeros([ROWS, BDV], tl.float32)
            mass = tl.zeros([ROWS], tl.float32)
            peak = tl.zeros([ROWS], tl.float32) + NOTHING
            for other in tl.range(0, SPLITS, num_stages=3):
                acc, peak, mass = merged(acc, peak, mass, *stored_part(
                    Partial, Partial_peak, Partial_mass, part + other * ROWS, BDV,
                ))  # fmt: skip
            phi_Z, log_scale, phi_k = stored_part(Partial, Partial_peak, Partial_mass, part + SPLITS * ROWS, BDV)
        else:
            phi_Z, log_scale, phi_k = prefix_part(
                Q, Table, row % L, W, Z, k_state, b_state, in_rows, state_h, state_kv, heads_per_kv,
                heads_per_state, factor, RANDOM, R, D, DV, CONSTANT, ROTATED, WIDTH, START, ROWS, BH, BDV, BF,
            )  # fmt: skip
        sees_prefix = (peak > NOTHING) & (phi_k > TINY) & has_state  # not where it sees no key
        log_scale = tl.where(sees_prefix, log_scale, NOTHING)
        phi_k = tl.where(sees_prefix, phi_k, 0.0)
        acc, peak, mass = merged(acc, peak, mass, tl.where(sees_prefix[:, None], phi_Z, 0.0), log_scale, phi_k)
        out = acc / tl.where(mass > 0, mass, 1.0)[:, None]
        out_rows = head_of(Out, b, wide_h, stride_ob, stride_oh) + (row % L)[:, None] * (stride_ol * UNIT)
        tl.store(out_rows + v[None, :], out.to(q.dtype), mask=in_rows[:, None] & (v < DV)[None, :])
