"""NTK-Attention: an infinitely long trainable prefix for transformers, at the cost of none.

Importing the package registers the PEFT method NTK_ATTENTION.
"""

from .calibration import calibrate
from .config import NTKAttentionConfig
from .features import FEATURE_MAPS, FeatureMap, feature_map
from .operation import ntk_attention
from .state import PrefixState
from .tuner import NTKAttentionModel

__version__ = "0.1.0"
__all__ = [
    "FEATURE_MAPS",
    "FeatureMap",
    "NTKAttentionConfig",
    "NTKAttentionModel",
    "PrefixState",
    "calibrate",
    "feature_map",
    "ntk_attention",
]
