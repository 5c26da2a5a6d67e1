"""What a call of the operation must be; every refusal says what was given and what was expected."""

import math

import torch
from torch import Tensor

from .bundles import Tokens
from .rotation import Rotation
from .state import PrefixState, RowStates

BACKENDS = ("auto", "eager", "sdpa", "triton")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_arguments(tokens: Tokens, state: PrefixState | RowStates, enable_gqa: bool, backend: str) -> None:
    """Raise ValueError unless the arguments of `ntk_attention` fit each other; `check_inputs` comes before."""
    query, key, value, attn_mask, dropout_p, is_causal, scale = tokens
    B, H, L, d = query.shape
    _, H_kv, S, d_v = value.shape
    if H_kv != H and (not enable_gqa or H % H_kv):
        raise ValueError(
            f"query has {H} heads and key {H_kv}: equal numbers are expected, or enable_gqa=True and a multiple"
        )
    check_state_fits(state, num_heads=H, num_kv_heads=H_kv, head_dim=d, value_dim=d_v)
    if isinstance(state, RowStates) and len(state.index) != B:
        raise ValueError(f"the state has an index of {len(state.index)} rows for a batch of {B}: expected as many")
    if attn_mask is not None:
        if is_causal:
            raise ValueError("attn_mask and is_causal=True exclude each other: put causality into the mask")
        check_mask(attn_mask, (B, H, L, S))
    device = query.device
    for name, x in (("key", key), ("value", value), ("the state", state.Z), ("attn_mask", attn_mask)):
        if x is not None and x.device != device:
            raise ValueError(f"all tensors must be on one device, got query on {query.device} and {name} on {x.device}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be positive and finite, got {scale}: phi acts on sqrt(scale) * query")
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: expected one of {BACKENDS}")


def check_rotation(rotation: Rotation, query: Tensor) -> None:
    """Raise ValueError unless a rotation is one of these queries [B, H, L, d]."""
    B, _, L, d = query.shape
    table, width, start = rotation
    if table.dim() != 3 or table.shape[0] not in (1, B) or table.shape[1] != L or not table.is_contiguous():
        raise ValueError(
            f"the table of a rotation must be [1 or {B}, {L}, 2 P] for query {list(query.shape)}, contiguous as "
            f"Rotation.of makes it, got {list(table.shape)}"
        )
    rotated = table.shape[-1]
    if not rotated or start < 0 or start + rotated > d or width < 2 or width % 2 or rotated % width:
        raise ValueError(
            f"a rotation of {rotated} numbers from {start} on in runs of {width} does not fit head_dim {d}"
        )
    if not table.is_floating_point():
        raise ValueError(f"the table of a rotation must be floating point, got {table.dtype}")
    if table.device != query.device:
        raise ValueError(f"the table of a rotation is on {table.device}, the query on {query.device}")


def check_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise ValueError unless these are tensors of attention."""
    (q, k, v), dtype = (query.shape, key.shape, value.shape), query.dtype
    fits = (
        len(q) == len(k) == len(v) == 4
        and q[0] == k[0] == v[0]
        and k[1] == v[1]
        and k[2] == v[2]
        and q[3] == k[3]
        and q[1] > 0 < v[1]
        and q[3] > 0 < v[3]
        and key.dtype == dtype == value.dtype
        and dtype in DTYPES
    )
    if not fits:  # or in the dtypes that autocast makes
        _check_inputs_one_by_one(query, key, value)


def _check_inputs_one_by_one(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4:
            raise ValueError(f"{name} must be [B, H, L, d], got {list(x.shape)}")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}")
    B, d = query.shape[0], query.shape[3]
    if key.shape[0] != B or value.shape[0] != B or key.shape[3] != d or value.shape[1:3] != key.shape[1:3]:
        raise ValueError(
            f"key must be [{B}, H_kv, S, {d}] and value [{B}, H_kv, S, d_v] for query {list(query.shape)}, "
            f"got key {list(key.shape)} and value {list(value.shape)}"
        )
    same = query.dtype == key.dtype == value.dtype
    if torch.is_autocast_enabled(query.device.type):  # which makes all but float64 the same
        same = len({x.dtype == torch.float64 for x in (query, key, value)}) == 1
    if not same:
        raise ValueError(f"query, key and value must share a dtype, got {query.dtype}, {key.dtype}, {value.dtype}")
    for name, x in (("query", query), ("value", value)):
        if x.shape[1] == 0 or x.shape[3] == 0:
            raise ValueError(f"expected at least one head and a size of at least one, got {name} {list(x.shape)}")


def check_mask(attn_mask: Tensor, target: tuple[int, ...]) -> None:
    """Raise ValueError unless the mask broadcasts to [B, H, L, S]."""
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise ValueError(f"attn_mask must be bool or floating point, got {attn_mask.dtype}")
    sizes_fit = all(m == 1 or m == n for m, n in zip(reversed(attn_mask.shape), reversed(target), strict=False))
    if attn_mask.dim() > 4 or not sizes_fit:
        raise ValueError(f"attn_mask {list(attn_mask.shape)} does not broadcast to [B, H, L, S] = {list(target)}")


def check_state_fits(
    state: PrefixState | RowStates, *, num_heads: int, num_kv_heads: int, head_dim: int, value_dim: int
) -> None:
    """Raise ValueError unless the state has the heads, r and d_v that the attention needs."""
    *_, H, r, d_v = state.Z.shape
    if H not in (num_heads, num_kv_heads):
        raise ValueError(
            f"the state has {H} heads: expected {num_heads} (one per query head) or {num_kv_heads} (one per KV head)"
        )
    expected = state.feature_map.num_features(head_dim)
    if r != expected:
        raise ValueError(
            f"the state has r = {r} features, but {state.feature_map.name!r} makes r = {expected} of "
            f"head_dim {head_dim}"
        )
    if d_v != value_dim:
        raise ValueError(f"the state has values of size {d_v}, the attention has {value_dim}")
