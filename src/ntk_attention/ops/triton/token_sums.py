"""The sums over a prefix for phi(x) = elu(x) + 1 in one Triton kernel, which reads keys and values once.

The features of a token live in registers only: building a state costs the time of reading its prefix. Products are
accumulated in float32 over `SPLIT` tokens, and over those in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..features import FeatureMap
from .support import INTERPRETED, triton

SPLIT = 8192  # tokens of one program
MAX_HEAD_DIM = 128

if triton is not None:
    from triton import language as tl

    @triton.jit(do_not_specialize=["m"])
    def elu_sums_kernel(
        keys, values, Z, k, m, factor, key_head, key_token, value_head, value_token,
        D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr,
    ):  # fmt: skip
        split, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
        features, columns = tl.arange(0, BD), tl.arange(0, BDV)
        keys += head * key_head + features[None, :]
        values += head * value_head + columns[None, :]
        sum_Z = tl.zeros([BD, BDV], tl.float32)
        sum_k = tl.zeros([BD], tl.float32)
        first = split.to(tl.int64) * SPLIT
        for start in range(0, SPLIT, BM):
            tokens = first + start + tl.arange(0, BM)[:, None]
            inside = tokens < m
            x = tl.load(keys + tokens * key_token, mask=inside & (features[None, :] < D), other=0.0).to(tl.float32)
            x *= factor
            phi = tl.where(inside, tl.where(x < 0, tl.exp(x), x + 1), 0.0)
            u = tl.load(values + tokens * value_token, mask=inside & (columns[None, :] < DV), other=0.0).to(tl.float32)
            sum_Z = tl.dot(tl.trans(phi), u, sum_Z, input_precision="tf32x3")
            sum_k += tl.sum(phi, axis=0)
        part = head * tl.num_programs(0) + split
        own = features < D
        tl.store(k + part * D + features, sum_k, mask=own)
        places = features[:, None] * DV + columns[None, :]
        tl.store(Z + part * D * DV + places, sum_Z, mask=own[:, None] & (columns[None, :] < DV))


def covers(keys: Tensor, values: Tensor, feature_map: FeatureMap) -> bool:
    """Whether the kernel runs for these keys and values and this map."""
    return (
        triton is not None
        and keys.is_cuda
        and feature_map.kernel == "elu"
        and not feature_map.constant
        and keys.dtype != torch.float64 != values.dtype
        and max(keys.shape[-1], values.shape[-1]) <= MAX_HEAD_DIM
    )


def elu_sums(keys: Tensor, values: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """sum_i phi(factor c_i) u_i^T [H, d, d_v] and sum_i phi(factor c_i) [H, d], in float64.

    Args:
        keys, values: c [H, m, d] and u [H, m, d_v] in float32, bfloat16 or float16, d and d_v up to 128.
    """
    (H, m, d), d_v = keys.shape, values.shape[-1]
    keys, values = (x.resolve_neg() if x.stride(-1) == 1 else x.contiguous().resolve_neg() for x in (keys, values))
    splits = triton.cdiv(m, SPLIT)
    Z = torch.empty(H, splits, d, d_v, dtype=torch.float32, device=keys.device)
    k = torch.empty(H, splits, d, dtype=torch.float32, device=keys.device)
    BD, BDV = (max(16, triton.next_power_of_2(size)) for size in (d, d_v))
    elu_sums_kernel[splits, H](
        keys, values, Z, k, m, factor, *keys.stride()[:2], *values.stride()[:2],
        D=d, DV=d_v, BD=BD, BDV=BDV, BM=512 if INTERPRETED else 64, SPLIT=SPLIT, num_warps=4, num_stages=3,
    )  # fmt: skip
    return Z.sum(dim=1, dtype=torch.float64), k.sum(dim=1, dtype=torch.float64)
