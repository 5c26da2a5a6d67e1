"""Given prefixes, caches and documents as adapters."""

from .anchors import anchor
from .distillation import distill
from .error_bound import choose_degree, taylor_error_bound
from .fitting import fit
from .prefixes import (
    adapter_from_prefix,
    by_layer,
    prefix_of_adapter,
    prefix_of_cache,
    prefix_of_text,
    save_cache,
)

__all__ = [
    "adapter_from_prefix",
    "anchor",
    "by_layer",
    "choose_degree",
    "distill",
    "fit",
    "prefix_of_adapter",
    "prefix_of_cache",
    "prefix_of_text",
    "save_cache",
    "taylor_error_bound",
]
