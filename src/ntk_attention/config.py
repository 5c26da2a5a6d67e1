"""The PEFT configuration of NTK-Attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from peft.config import PeftConfig

from .features import FeatureMap, feature_map
from .registration import PEFT_TYPE


@dataclass
class NTKAttentionConfig(PeftConfig):
    """How a model gets its prefix states, one per attention layer; use it like any other PEFT config.

    Args:
        target_modules: names (or a regex) of attention modules; by default every one that routes through the
            attention interface of transformers.
        exclude_modules: names (or a regex) of attention modules to leave alone.
        layers_to_transform: layer index or indices to adapt; all by default.
        layers_pattern: name of the module list that the layer index counts in, where it is not the first one.
        modules_to_save: other modules to train and save, such as a classification head.
        feature_map: name of the feature map, see `ntk_attention.FEATURE_MAPS`.
        feature_map_options: its options, e.g. ``{"degree": 4}`` or ``{"num_features": 256, "seed": 0}``.
        constant_feature: append the feature 1 to the map; needed by `calibrate`.
        rank: of Z = Z_A Z_B; full by default.
        state_heads: one state per "query" head, or per "kv" head (shared by the query heads of its group).
        init_weights: True starts as one neutral token with value zero; False starts at random, with visible output
            (for tests); "published" as the published demo does: Z and k at zero, so that k does not train.
        geometry: filled when attached: number of attention modules and their sizes. An adapter is refused by a model
            with another geometry.
    """

    target_modules: list[str] | set[str] | str | None = field(default=None)
    exclude_modules: list[str] | set[str] | str | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    feature_map: str = field(default="elu")
    feature_map_options: dict[str, Any] = field(default_factory=dict)
    constant_feature: bool = field(default=True)
    rank: int | None = field(default=None)
    state_heads: Literal["query", "kv"] = field(default="query")
    init_weights: bool | Literal["published"] = field(default=True)
    geometry: dict[str, Any] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if isinstance(self.feature_map, FeatureMap):  # keep what JSON can hold
            self.feature_map_options = {**self.feature_map.options, **self.feature_map_options}
            self.constant_feature = self.constant_feature or self.feature_map.constant
            self.feature_map = self.feature_map.name
        self.make_feature_map()  # raises ValueError for unknown names and options
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise ValueError(f"rank must be a positive integer or None, got {self.rank!r}")
        if self.state_heads not in ("query", "kv"):
            raise ValueError(f"state_heads must be 'query' or 'kv', got {self.state_heads!r}")
        if self.init_weights not in (True, False, "published"):
            raise ValueError(f"init_weights must be True, False or 'published', got {self.init_weights!r}")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform needs target_modules as a list or None, got a regex")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_pattern was given without layers_to_transform")

    def make_feature_map(self) -> FeatureMap:
        return feature_map(self.feature_map, **{"constant": self.constant_feature, **self.feature_map_options})
