"""NTK-Attention: an infinitely long trainable prefix for transformers, at the cost of none.

Importing the package registers the PEFT method NTK_ATTENTION.
"""

from .calibration import calibrate
from .convert.anchors import anchor
from .convert.distillation import distill
from .convert.error_bound import choose_degree, taylor_error_bound
from .convert.fitting import fit
from .convert.prefixes import (
    adapter_from_prefix,
    by_layer,
    prefix_of_adapter,
    prefix_of_cache,
    prefix_of_text,
    save_cache,
)
from .ops.attention import ntk_attention
from .ops.exact import LayerPrefix
from .ops.features import FEATURE_MAPS, FeatureMap, feature_map
from .ops.state import PrefixState, RowStates
from .tuner.config import NTKAttentionConfig
from .tuner.model import NTKAttentionModel

__version__ = "0.1.0"
__all__ = [
    "FEATURE_MAPS",
    "FeatureMap",
    "LayerPrefix",
    "NTKAttentionConfig",
    "NTKAttentionModel",
    "PrefixState",
    "RowStates",
    "adapter_from_prefix",
    "anchor",
    "by_layer",
    "calibrate",
    "choose_degree",
    "distill",
    "feature_map",
    "fit",
    "ntk_attention",
    "prefix_of_adapter",
    "prefix_of_cache",
    "prefix_of_text",
    "save_cache",
    "taylor_error_bound",
]
