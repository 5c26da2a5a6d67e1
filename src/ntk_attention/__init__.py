"""NTK-Attention: trainable prefixes of any length for the attention of transformers, in two tensors of fixed size.

Importing the package registers the PEFT method NTK_ATTENTION. Prefixes, caches and texts that exist become adapters in
`ntk_attention.convert`.
"""

from .calibration import calibrate
from .ops.attention import ntk_attention
from .ops.exact import LayerPrefix
from .ops.features import FeatureMap, feature_map
from .ops.rotation import Rotation
from .ops.state import PrefixState, RowStates
from .tuner.config import NTKAttentionConfig
from .tuner.model import NTKAttentionModel
from .tuner.untrusted import AdapterError

__version__ = "0.2.0"
__all__ = [
    "AdapterError",
    "FeatureMap",
    "LayerPrefix",
    "NTKAttentionConfig",
    "NTKAttentionModel",
    "PrefixState",
    "Rotation",
    "RowStates",
    "calibrate",
    "feature_map",
    "ntk_attention",
]
