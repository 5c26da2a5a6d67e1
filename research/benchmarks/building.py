"""Building the state of 2^20 and of 2^24 tokens in constant memory, H = 8, d = 64, against the bandwidth of a copy.

Keys and values come in parts of the same size, of which one is in memory: a longer prefix takes time and no memory. The
"copy" row reads and writes a part with one kernel; its bytes per second are the ceiling. Bytes of a method are those of
the keys and values, read once.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ntk_attention import PrefixState, feature_map

from .runner import Case
from .timing import Prepared

H, d = 8, 64
MAPS = {"elu": {}, "positive_random": {"num_features": d}}
PART = {"cuda": 2**20, "cpu": 2**17}  # tokens in memory


def cases(device: str, tiny: bool) -> list[Case]:
    out = []
    part = 2**8 if tiny else PART[device]
    for m in (2**8, 2**10) if tiny else (2**20, 2**24):
        for dtype in ("bfloat16", "float32"):
            is_long = device == "cpu" and m == 2**24  # minutes a call
            if is_long and dtype == "bfloat16":
                continue
            sizes: dict[str, Any] = {"m": m, "H": H, "d": d, "part": part, "dtype": dtype}
            methods = {"copy": partial(copy, m // part)}
            for name, options in list(MAPS.items())[: 1 if is_long else None]:
                methods[f"state {name}"] = partial(build, m // part, name, options)
            shared = partial(make_part, part, device, getattr(torch, dtype))
            out.append(
                Case(sizes, methods, shared, "wall", 1 if is_long else 3 if device == "cpu" else 10, budget_ms=20_000)
            )
    return out


def make_part(tokens: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    keys, values = (torch.randn(H, tokens, d, device=device, dtype=dtype) for _ in range(2))
    return keys, values


def copy(parts: int, tensors: tuple[Tensor, Tensor]) -> Prepared:
    targets = [torch.empty_like(x) for x in tensors]

    def run() -> None:
        for _ in range(parts):
            for target, x in zip(targets, tensors, strict=True):
                target.copy_(x)

    return Prepared(run, {"bytes": 2 * parts * size(tensors)})


def build(parts: int, name: str, options: dict[str, Any], tensors: tuple[Tensor, Tensor]) -> Prepared:
    def run() -> PrefixState:
        state = PrefixState.from_prefix(*tensors, feature_map(name, **options))
        for _ in range(parts - 1):
            state = state.update(*tensors)
        return state

    return Prepared(run, {"bytes": parts * size(tensors), "tokens": parts * tensors[0].shape[1]})


def size(tensors: tuple[Tensor, Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
