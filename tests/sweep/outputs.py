"""What a model gives for its inputs, as named tensors, and how far two such outputs are apart."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

Outputs = dict[str, Tensor]


def run(model: nn.Module, values: Mapping[str, Any]) -> Outputs:
    """All tensors of one forward pass without a cache; what a model draws at random it draws alike each time."""
    forward = getattr(model, "get_base_model", lambda: model)().forward
    options = {"use_cache": False} if "use_cache" in inspect.signature(forward).parameters else {}
    torch.manual_seed(0)
    return flatten(model(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in values.items()}, **options))


def flatten(output: Any, name: str = "output") -> Outputs:
    """Tensors inside mappings, sequences and objects of outputs; caches are left out."""
    if isinstance(output, Tensor):
        return {name: output}
    if isinstance(output, Cache):
        return {}
    if isinstance(output, Mapping):
        parts = {f"{name}.{key}": value for key, value in output.items()}
    elif isinstance(output, list | tuple):
        parts = {f"{name}.{i}": value for i, value in enumerate(output)}
    else:
        return {}
    return {inner: x for key, value in parts.items() for inner, x in flatten(value, key).items()}


def floats(outputs: Outputs) -> Outputs:
    return {name: x for name, x in outputs.items() if x.is_floating_point() and x.numel()}


def of_tokens(outputs: Outputs, batch: int, length: int) -> Outputs:
    """Those with one row for each token of a text; where places of a signal come before it, without their rows."""
    rows = {n: x for n, x in floats(outputs).items() if x.dim() >= 2 and x.shape[0] == batch}
    exact = {n: x for n, x in rows.items() if x.shape[1] == length}
    return exact or {n: x[:, -length:] for n, x in rows.items() if x.dim() == 3 and x.shape[1] > length}


def are_equal(a: Outputs, b: Outputs) -> bool:
    """Bit by bit; NaN equals NaN."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(torch.nan_to_num(a[n]), torch.nan_to_num(b[n])) for n in a
    )


def difference(expected: Outputs, actual: Outputs) -> float:
    """The largest deviation of any tensor, relative to its largest entry; infinite where shapes or names differ."""
    expected, actual = floats(expected), floats(actual)
    if expected.keys() != actual.keys() or not expected:
        return float("inf")
    return max(deviation(expected[name], actual[name]) for name in expected)


def deviation(expected: Tensor, actual: Tensor) -> float:
    if expected.shape != actual.shape:
        return float("inf")
    same = (expected == actual) | (expected.isnan() & actual.isnan())
    if bool(same.all()):
        return 0.0
    finite = expected[expected.isfinite() & (expected.abs() < 1e30)]  # logits of what is forbidden are huge
    scale = finite.abs().max().item() if finite.numel() else 0.0
    apart = torch.where(same, 0.0, (expected - actual).abs()).max().item()
    return apart / scale if scale > 0 and apart == apart else float("inf")


def are_finite(outputs: Outputs) -> bool:
    """No NaN; infinities are what some heads give for what is forbidden."""
    return not any(bool(x.isnan().any()) for x in floats(outputs).values())
