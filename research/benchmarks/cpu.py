"""Ours against plain attention on a CPU: scaled_dot_product_attention, causal, H = 8, d = 64, B = 2.

float32 and bfloat16, forward without gradients, and forward and backward with gradients to queries, keys, values and,
for ours, Z and k. The number of threads is part of the hardware's name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.nn.attention import SDPBackend

from .attention import MODES, make_inputs, ours, plain, prepare
from .runner import Case
from .timing import Prepared

LENGTHS = (256, 1024, 4096)


def cases(device: str, tiny: bool) -> list[Case]:
    out = []
    for dtype in ("float32", "bfloat16"):
        for L in (16, 32) if tiny else LENGTHS:
            for mode in MODES:
                sizes: dict[str, Any] = {"B": 2, "L": L, "H": 8, "H_kv": 8, "d": 64, "dtype": dtype, "mode": mode}
                methods: dict[str, Callable[[Any], Prepared]] = {
                    "plain": partial(prepare, partial(plain, kernel=SDPBackend.FLASH_ATTENTION)),
                    "ours": partial(prepare, partial(ours, backend="auto")),
                }
                shared = partial(make_inputs, sizes, "cpu", {})
                repetitions = 2 if tiny else 15
                out.append(Case(sizes, methods, shared, "wall", repetitions, budget_ms=5000))
    return out
