"""The PEFT configuration of NTK-Attention."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import hf_hub_download
from peft.config import PeftConfig

from ..ops.features import FeatureMap, feature_map
from .geometry import Geometry
from .registration import PEFT_TYPE
from .untrusted import CONFIG, FORMAT_VERSION, WEIGHTS, AdapterError, read_config, shown, weights_file

NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)  # of a module, dotted
MAX_CHARACTERS = 1000  # of a string
MAX_ENTRIES = 10_000  # of a list
MAX_REPEATS = 4  # of a regex: matching takes at most the length of a module's name to this power
MAX_RANK = 2**16


@dataclass
class NTKAttentionConfig(PeftConfig):
    """How a model gets its prefix states, one per attention layer; use it like any other PEFT config.

    Args:
        target_modules: names (or a regex) of attention modules; by default every one that routes through the
            attention interface of transformers.
        exclude_modules: names of attention modules, or of modules around them, to leave alone; or a regex that whole
            names of attention modules must match.
        layers_to_transform: layer index or indices to adapt; all by default.
        layers_pattern: name of the module list that the layer index counts in, where it is not the first one.
        modules_to_save: other modules to train and save, such as a classification head.
        feature_map: name of the feature map, see `ntk_attention.feature_map`.
        feature_map_options: its options, e.g. ``{"degree": 4}`` or ``{"num_features": 256, "seed": 0}``.
        constant_feature: append the feature 1 to the map; needed by `calibrate`.
        rank: of Z = Z_A Z_B, or None for a full Z. "auto", the default, is about a quarter of head_dim, and None where
            no feed-forward block has a prefix.
        feed_forward_rank: of each part of the prefix of the feed-forward block in the same layer. "auto", the default,
            gives it as many parameters as the low rank of Z saves: with both defaults an adapter is about as large as
            with a full Z in attention alone. None leaves the blocks alone, and those that are not found stay so; "auto"
            leaves those of encoders alone too (BERT, ViT and their like): from few examples texts were learned better
            then, pictures no worse.
        feed_forward: where the prefix of a feed-forward block goes. "inside", the default: to each of its linear
            layers, whose keys and values it moves, or beside it where it has others (experts). "beside": to the block
            as a whole.
        state_heads: one state per "query" head, or per "kv" head (shared by the query heads of its group).
        init_weights: True starts as one neutral token with value zero; False starts at random, with visible output
            (for tests); "published" as the published demo does: Z and k at zero, so that k does not train.
        positions: what phi sees of a query of a model with rotary positions. "free", the default, the query before it
            is rotated, since a prefix that is trained stands at no position; "rotary" the query as attention has it,
            whose features then change with its position. Without rotary positions both are the same.
        geometry: filled when attached: number of attention modules and their sizes. An adapter is refused by a model
            with another geometry.
        format_version: of the files of an adapter, always the one that this version of the library writes.
    """

    target_modules: list[str] | set[str] | str | None = field(default=None)
    exclude_modules: list[str] | set[str] | str | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    feature_map: str = field(default="elu")
    feature_map_options: dict[str, Any] = field(default_factory=dict)
    constant_feature: bool = field(default=True)
    rank: int | Literal["auto"] | None = field(default="auto")
    feed_forward_rank: int | Literal["auto"] | None = field(default="auto")
    feed_forward: Literal["inside", "beside"] = field(default="inside")
    state_heads: Literal["query", "kv"] = field(default="query")
    init_weights: bool | Literal["published"] = field(default=True)
    positions: Literal["free", "rotary"] = field(default="free")
    geometry: dict[str, Any] | None = field(default=None)
    format_version: int = field(default=FORMAT_VERSION)

    def __post_init__(self) -> None:
        # The safetensors file that belongs to a config that was read from a folder.
        self.weights: Path | None = None
        self.asked: dict[str, Any] = {}  # what stood in the fields that a model has filled in since
        check_fields(self)
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list | tuple):
                setattr(self, name, set(getattr(self, name)))
        if isinstance(self.feature_map, FeatureMap):  # keep what JSON can hold
            self.feature_map_options = {**self.feature_map.options, **self.feature_map_options}
            self.constant_feature = self.constant_feature or self.feature_map.constant
            self.feature_map = self.feature_map.name
        self.make_feature_map()  # raises ValueError for unknown names and options
        for name in ("rank", "feed_forward_rank"):
            rank = getattr(self, name)
            if rank not in (None, "auto") and (type(rank) is not int or not 0 < rank <= MAX_RANK):
                raise ValueError(
                    f"{name} must be a positive integer up to {MAX_RANK}, 'auto' or None, got {shown(rank)}"
                )
        if self.feed_forward not in ("inside", "beside"):
            raise ValueError(f"feed_forward must be 'inside' or 'beside', got {shown(self.feed_forward)}")
        if self.state_heads not in ("query", "kv"):
            raise ValueError(f"state_heads must be 'query' or 'kv', got {shown(self.state_heads)}")
        if self.init_weights not in (True, False, "published"):
            raise ValueError(f"init_weights must be True, False or 'published', got {shown(self.init_weights)}")
        if self.positions not in ("free", "rotary"):
            raise ValueError(f"positions must be 'free' or 'rotary', got {shown(self.positions)}")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform needs target_modules as a list or None, got a regex")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_pattern was given without layers_to_transform")

    def settle(self, **values: Any) -> None:
        """Put what one model makes of this config into its fields: the file that is saved must not depend on more."""
        for name, value in values.items():
            self.asked.setdefault(name, getattr(self, name))
            setattr(self, name, value)

    def unsettle(self) -> None:
        """Ask for the same as at first, of another model."""
        for name, value in self.asked.items():
            setattr(self, name, value)
        self.asked.clear()

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        return read_config(Path(path_json_file), {f.name for f in fields(cls)})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> NTKAttentionConfig:
        """The config of a saved adapter, in a folder or on the hub, whose weights are compared with the model later.

        Raises:
            AdapterError: if the folder lacks a file or holds a pickle instead, or a field is not what it may be; the
                message names file and field.
        """
        name = str(pretrained_model_name_or_path)
        folder = Path(name, subfolder or "")
        if (folder / CONFIG).exists():
            weights = weights_file(folder)
        else:
            hub_options, _, _ = cls._split_kwargs(kwargs)
            weights = Path(hf_hub_download(name, WEIGHTS, subfolder=subfolder, **hub_options))
        try:
            config = super().from_pretrained(name, subfolder=subfolder, **kwargs)
        except AdapterError:
            raise
        except (ValueError, TypeError) as error:
            raise AdapterError(f"{folder / CONFIG}: {error}") from None
        config.weights = weights
        return config

    def kind(self) -> str:
        """The same for adapters that have parameters of the same kinds: on one module these are of the same shapes, and
        mean the same."""
        names = ["feature_map", "feature_map_options", "constant_feature", "rank", "feed_forward_rank", "state_heads"]
        names += ["positions", "feed_forward"]
        return json.dumps({name: getattr(self, name) for name in names}, sort_keys=True)

    def for_given_prefix(self) -> NTKAttentionConfig:
        """A copy for a prefix that exists: its tokens have positions, its sums need a full Z, and feed-forward blocks
        are left alone by default."""
        ranks: dict[str, Any] = {name: None for name in ("rank", "feed_forward_rank") if getattr(self, name) == "auto"}
        return replace(self, positions="rotary", **ranks)

    def ranks_for(self, geometry: Geometry, num_states: int) -> tuple[int | None, int | None]:
        """Of Z and of each part of the prefix of the feed-forward block; None for a full Z, and for no such prefix.

        By default both together have as many numbers as a full Z, about half of them each.

        Args:
            geometry: of the attention module, with the parts of the block.
            num_states: H, how many heads have a state of their own.
        """
        d, d_v, numbers = geometry.head_dim, geometry.value_dim, geometry.part_numbers
        full = num_states * d * d_v
        rank, in_block = self.rank, self.feed_forward_rank if numbers else None
        if in_block == "auto":
            in_block = max(1, round(full / (2 * numbers)))
        if rank == "auto":
            rank = max(1, d // 4)
            if self.feed_forward_rank == "auto" and in_block is not None:  # the ranks of blocks come in large steps
                rank = max(1, min(rank + d // 8, round((full - in_block * numbers) / (num_states * (d + d_v)))))
        return rank, in_block

    def make_feature_map(self) -> FeatureMap:
        return feature_map(self.feature_map, **{"constant": self.constant_feature, **self.feature_map_options})


def check_fields(config: NTKAttentionConfig) -> None:
    """Types and ranges of all fields, since a config may come from a stranger's file.

    Raises:
        ValueError: if one is not what it may be; the message names the field.
    """
    if type(config.format_version) is not int or config.format_version != FORMAT_VERSION:
        raise ValueError(f"format_version must be {FORMAT_VERSION}, got {shown(config.format_version)}")
    for name in ("base_model_name_or_path", "revision", "task_type", "peft_version"):
        if getattr(config, name) is not None:
            check_text(name, getattr(config, name))
    for name in ("inference_mode", "constant_feature"):
        if not isinstance(getattr(config, name), bool):
            raise ValueError(f"{name} must be True or False, got {shown(getattr(config, name))}")
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        check_regex(name, value) if isinstance(value, str) else check_module_names(name, value)
    check_module_names("modules_to_save", config.modules_to_save)
    pattern = config.layers_pattern
    check_module_names("layers_pattern", [pattern] if isinstance(pattern, str) else pattern)
    check_layers(config.layers_to_transform)
    if not isinstance(config.feature_map, FeatureMap):
        check_text("feature_map", config.feature_map)
    check_options(config.feature_map_options)
    check_geometry(config.geometry)
    check_auto_mapping(config.auto_mapping)


def check_text(name: str, value: Any) -> None:
    if not isinstance(value, str) or len(value) > MAX_CHARACTERS:
        raise ValueError(f"{name} must be a string of at most {MAX_CHARACTERS} characters, got {shown(value)}")


def check_module_names(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, list | tuple | set) or len(value) > MAX_ENTRIES:
        raise ValueError(f"{name} must be a list of at most {MAX_ENTRIES} module names or None, got {shown(value)}")
    for entry in value:
        if not isinstance(entry, str) or len(entry) > MAX_CHARACTERS or not NAME.fullmatch(entry):
            raise ValueError(f"{name} holds {shown(entry)}, expected the name of a module")


def check_regex(name: str, value: str) -> None:
    """A regex is matched against every module name: one that could take for ever is refused."""
    check_text(name, value)
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{name} is not a regex: {shown(str(error))}") from None
    repeats = len(re.findall(r"[*+?{]", value.replace("(?:", "(")))
    if repeats > MAX_REPEATS or re.search(r"\)[*+{]", value):
        raise ValueError(
            f"{name} {shown(value)} may take very long to match: at most {MAX_REPEATS} repeats and none of a group are "
            "expected, or a list of names"
        )


def check_layers(value: Any) -> None:
    values = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if len(values) > MAX_ENTRIES or not all(type(index) is int and abs(index) < 2**31 for index in values):
        raise ValueError(f"layers_to_transform must be a layer index, a list of them or None, got {shown(value)}")


def check_options(value: Any) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"feature_map_options must be a dict, got {shown(value)}")
    for option, entry in value.items():
        check_text("a name in feature_map_options", option)
        if entry is not None and (type(entry) not in (int, bool) or not 0 <= entry < 2**63):
            raise ValueError(f"feature_map_options: {shown(option)} is {shown(entry)}, expected an integer")


def check_geometry(value: Any) -> None:
    def is_count(x: Any) -> bool:
        return type(x) is int and 0 <= x < 2**31

    if value is None:
        return
    if not isinstance(value, dict) or set(value) != {"num_modules", "sizes"} or not is_count(value["num_modules"]):
        raise ValueError(f"geometry must hold num_modules, a number, and sizes, got {shown(value)}")
    sizes = value["sizes"]
    if not isinstance(sizes, list) or len(sizes) > MAX_ENTRIES:
        raise ValueError(f"geometry: sizes must be a list, got {shown(sizes)}")
    for size in sizes:
        if not isinstance(size, list) or len(size) != 5 or not all(map(is_count, size)):
            raise ValueError(
                f"geometry: sizes holds {shown(size)}, expected lists of five numbers: heads, KV heads, "
                "head_dim, value dim and the width of the feed-forward block"
            )


def check_auto_mapping(value: Any) -> None:
    """PEFT imports the library that this names: a file may only name one that is there already, or transformers."""
    if value is None:
        return
    if not isinstance(value, dict) or len(value) > MAX_ENTRIES:
        raise ValueError(f"auto_mapping must be a dict or None, got {shown(value)}")
    for name, entry in value.items():
        check_text("a name in auto_mapping", name)
        if entry is not None:
            check_text(f"auto_mapping: {shown(name)}", entry)
    library = value.get("parent_library")
    if library is not None and library not in sys.modules and not library.startswith("transformers.models."):
        raise ValueError(f"auto_mapping: parent_library is {shown(library)}, expected a module of transformers")
