"""NTK-Attention: an infinitely long trainable prefix for transformers, at the cost of none.

Importing the package registers the PEFT method NTK_ATTENTION.
"""

from .accuracy import choose_degree, taylor_error_bound
from .anchors import anchor
from .calibration import calibrate
from .config import NTKAttentionConfig
from .conversion import (
    adapter_from_prefix,
    by_layer,
    prefix_of_adapter,
    prefix_of_cache,
    prefix_of_text,
    save_cache,
)
from .distillation import distill
from .exact import LayerPrefix
from .features import FEATURE_MAPS, FeatureMap, feature_map
from .fitting import fit
from .operation import ntk_attention
from .state import PrefixState, RowStates
from .tuner import NTKAttentionModel

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
