"""The error of a state that is the sum over a random prefix, beside the bound that needs no prefix at all."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ntk_attention import FeatureMap, PrefixState, feature_map
from ntk_attention.convert import taylor_error_bound
from ntk_attention.ops.attention import context_block, exact_block
from ntk_attention.ops.bundles import Tokens
from ntk_attention.ops.exact import LayerPrefix
from ntk_attention.ops.reference import merge, prefix_block

from .rows import Rows

CHUNK_BYTES = 2**28
# Names of maps: what they are at head_dim d
MAPS = {
    **{f"taylor {g}": lambda d, g=g: feature_map("taylor", degree=g) for g in (2, 4, 6, 8)},
    **{f"random {n}d": lambda d, n=n: feature_map("positive_random", num_features=n * d) for n in (1, 4, 16)},
}


def settings(largest: int, budget: float) -> Iterator[dict[str, Any]]:
    """Around d = 64, L = 128 and entries up to 0.5: each of d, entry bound and L in its turn, all maps that fit.

    Args:
        largest: m goes to 2 to this power.
        budget: multiplications that one map may cost.
    """
    seen = set()
    for d, bound, L in [
        *((d, bound, 128) for d in (8, 16, 32, 64) for bound in (0.25, 0.5, 1.0, 2.0)),
        *((64, 0.5, L) for L in (1, 16, 1024)),
    ]:
        for name, make in MAPS.items():
            r = make(d).num_features(d)
            key = (d, bound, L, name)
            if 2.0**largest * r * d <= budget and r * d * 8 <= 2**31 and key not in seen:
                seen.add(key)
                yield {"d": d, "entry_bound": bound, "L": L, "map": name}


def run(out: Path, *, largest: int, seed: int, budget: float) -> None:
    written = Rows(out / "accuracy.jsonl")
    for setting in settings(largest, budget):
        if not written.has({**setting, "m": 2**largest, "seed": seed}):
            for row in measure(**setting, largest=largest, seed=seed):
                written.add({**setting, **row, "seed": seed})


def measure(d: int, entry_bound: float, L: int, map: str, largest: int, seed: int) -> Iterator[dict[str, Any]]:
    """Rows for m = 2, 4, 8, ...: T - PrefixAttn for L real tokens, causal, entries even in [-bound, bound]."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> Tensor:
        x = 2 * torch.rand(1, n, d, dtype=torch.float64, generator=generator) - 1
        return (entry_bound * x).to(device)

    query, key, value = (draw(L)[None] for _ in range(3))
    keys, values = draw(2**largest), draw(2**largest)
    phi: FeatureMap = MAPS[map](d).bind(d).to(device, torch.float64)
    chunk = max(16, CHUNK_BYTES // (8 * phi.num_features(d)))
    scale = d**-0.5
    context = context_block(Tokens(query, key, value, is_causal=True, scale=scale))
    degree = int(map.split()[1]) if map.startswith("taylor") else None
    bound = taylor_error_bound(entry_bound, degree, d) if degree else None
    prefix_state = PrefixState.from_prefix(keys[:, :1], values[:, :1], phi, chunk_size=chunk)
    for power in range(1, largest + 1):
        new = slice(2 ** (power - 1), 2**power)
        prefix_state = prefix_state.update(keys[:, new], values[:, new], chunk_size=chunk)
        m = 2**power
        exact = exact_in_parts(query, keys[:, :m], values[:, :m], scale)
        with_prefix = merge(context, exact).out
        difference = merge(context, prefix_block(query, prefix_state, math.sqrt(scale))).out - with_prefix
        yield {
            "m": m,
            "r": phi.num_features(d),
            "max_error": difference.abs().max().item(),
            "frobenius_error": difference.norm().item(),
            "frobenius_norm": with_prefix.norm().item(),
            "bound": bound,
            "frobenius_bound": bound * math.sqrt(L * d) if bound else None,
        }


def exact_in_parts(query: Tensor, keys: Tensor, values: Tensor, scale: float, size: int = 2**14) -> Any:
    blocks = [exact_block(query, LayerPrefix(k, v), scale) for k, v in
              zip(keys.split(size, dim=1), values.split(size, dim=1), strict=True)]  # fmt: skip
    whole = blocks[0]
    for block in blocks[1:]:
        whole = merge(whole, block)
    return whole
