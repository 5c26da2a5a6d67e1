"""How a call is computed: decided here, once for each kind of call, and then run.

`plan_attention` reads off a call what the decision needs, `Facts`; `decide` is a function of these alone.
"""

import math
from enum import StrEnum
from typing import Any, NamedTuple

import torch

from .bundles import Prefixes, Tokens
from .sdpa import needs_grad, supports_sdpa
from .state import RowStates
from .triton import support


class Path(StrEnum):
    """The ways to compute a call, the slowest and most general first."""

    EAGER = "eager"  # every score written out, see reference.py
    SDPA = "sdpa"  # torch's kernel, its output merged with the prefix block, see sdpa.py
    MERGED_TORCH = "merged_torch"  # torch's kernel and the prefix in few operations of torch, see fused_torch.py
    MERGED = "merged"  # torch's kernel and one of ours that merges the prefix
    FUSED = "fused"  # one kernel of ours for everything
    FUSED_SM90 = "fused_sm90"  # the same for Hopper
    DECODE = "decode"  # a short query without gradients, one launch

    @property
    def is_fused(self) -> bool:
        """Whether fused.py runs it."""
        return self not in (Path.EAGER, Path.SDPA)


# From which query length on the library's kernel, whose products are faster, and one more of ours that merges the
# prefix take the place of our fused kernel, which reads everything once, where there is none for Hopper (on an H100,
# results/benchmarks).
MERGE_FROM = (  # the largest head_dim that the row is for, the length
    (64, 8192),
    (128, 2048),
    (256, math.inf),
)


class Facts(NamedTuple):
    """All that the decision depends on. Lengths of keys are left out: they change with every token that is written."""

    backend: str
    query_shape: tuple[int, ...]
    num_kv_heads: int
    value_dim: int
    is_empty: bool  # no query or no key
    dtype: torch.dtype
    device: torch.device
    mask: torch.dtype | None
    is_causal: bool
    covers_sdpa: bool
    is_plain: bool  # one state, no dropout, softcap, sink or prefix tokens
    feature_map: str | None  # by the name that kernels have for it
    num_features: int
    rows: int | None  # elements of Z where every row of the batch has its own state
    rotation: tuple[int, int, int] | None  # numbers that are rotated, in runs of which width, from where on
    needs_grad: bool


PATHS: dict[tuple[Any, ...], Path] = {}
MAX_PATHS = 4096  # of queries of as many lengths


def plan_attention(tokens: Tokens, prefixes: Prefixes, softcap: float | None = None, backend: str = "auto") -> Path:
    """How to compute a call whose arguments have been checked."""
    query, key, value, attn_mask, dropout_p, is_causal, _ = tokens
    state, rotation = prefixes.only_state, prefixes.rotation
    shape, (_, H_kv, S, _) = query.shape, key.shape
    facts = (  # in the order of `Facts`, which is made where the answer is not known yet
        backend,
        shape,
        H_kv,
        value.shape[-1],
        S == 0 or 0 in shape,
        query.dtype,
        query.device,
        None if attn_mask is None else attn_mask.dtype,
        is_causal,
        softcap is None and supports_sdpa(query, attn_mask, dropout_p),
        state is not None and dropout_p == 0 and softcap is None,
        None if state is None else state.feature_map.kernel,
        0 if state is None else state.num_features,
        state.Z.numel() if isinstance(state, RowStates) else None,
        None if rotation is None else (rotation.table.shape[-1], *rotation[1:]),
        state is not None and needs_grad(query, key, value, state.Z, state.k, state.log_scale),
    )
    if torch.compiler.is_compiling():  # sizes may be symbols, which are no keys
        return decide(Facts(*facts))
    path = PATHS.get(facts)
    if path is None:
        if len(PATHS) >= MAX_PATHS:
            PATHS.clear()
        path = PATHS[facts] = decide(Facts(*facts))
    return path


def decide(facts: Facts) -> Path:
    """The fastest path by measurement that covers the call and that the backend allows."""
    if facts.backend in ("auto", "triton") and facts.is_plain and not facts.is_empty:
        fused = fused_path(facts)
        if fused is not None:
            return fused
    return Path.SDPA if facts.covers_sdpa and facts.backend != "eager" else Path.EAGER


def fused_path(facts: Facts) -> Path | None:
    """The path through fused.py; None where it does not cover the call."""
    d, d_v = facts.query_shape[-1], facts.value_dim
    has_kernels = support.covers(facts.device, facts.dtype, d, d_v)
    if facts.mask not in (None, torch.bool):
        return None
    if facts.rows is not None and (facts.needs_grad or not has_kernels or facts.rows >= 2**31):
        return None
    if facts.feature_map is None:
        return None
    is_random = facts.feature_map == "positive_random"
    if is_random and not (has_kernels and support.covers_random(facts.device, facts.dtype, d, d_v, facts.num_features)):
        return None
    L = facts.query_shape[2]
    in_halves = facts.rotation in (None, (d, d, 0))  # the pairs, which is what tiles of many queries know
    if not has_kernels:
        # A call of one query decodes, which sdpa.py does better. "triton" falls back to it as well.
        return Path.MERGED_TORCH if facts.backend == "auto" and L > 1 else None
    rows_of_kv_head = facts.query_shape[1] // facts.num_kv_heads * L
    if not facts.needs_grad and rows_of_kv_head <= support.MAX_DECODE_ROWS and not facts.is_causal:
        return Path.DECODE
    if d % 16:  # tiles of many queries are loaded by halves of a head, and Triton wants these to begin at 16 bytes
        is_known = not is_random and facts.rows is None and facts.backend == "auto" and L > 1
        return Path.MERGED_TORCH if is_known else None
    is_simple = not is_random and facts.mask is None
    if is_simple and in_halves and support.covers_sm90(facts.device, facts.dtype, d, d_v):
        return Path.FUSED_SM90
    if is_random and not in_halves and L > 1:  # exponents must not have the rounding of queries that are turned beside
        return None
    merge_from = next(length for largest, length in MERGE_FROM if max(d, d_v) <= largest)
    return Path.MERGED if facts.backend == "auto" and is_simple and merge_from <= L else Path.FUSED
