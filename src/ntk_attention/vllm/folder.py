"""The folder of an adapter: whose it is, and what it holds for the layers of one model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from vllm.lora.utils import get_adapter_absolute_path

from ..tuner.adapter import PrefixAdapter
from ..tuner.config import NTKAttentionConfig
from ..tuner.plan import AdapterPlan, check_plan, file_shapes, plan_adapter
from ..tuner.routing import CHILD
from ..tuner.saved_modules import embedding_shapes
from ..tuner.untrusted import CONFIG, MAX_CONFIG_BYTES, AdapterError, check_weights, shown

SERVED_MAP = "elu"  # the feature map that slots are made for


def local_folder(path: str) -> Path:
    """Where an adapter lies, which may be named as vLLM allows: a folder, or a name on the hub."""
    return Path(get_adapter_absolute_path(path))


def method_of(folder: Path) -> str | None:
    """The method of PEFT that the configuration in a folder names; None where none can be read."""
    try:
        with open(folder / CONFIG, "rb") as file:
            found = json.loads(file.read(MAX_CONFIG_BYTES + 1))
    except (OSError, ValueError, RecursionError):
        return None
    method = found.get("peft_type") if isinstance(found, dict) else None
    return method if isinstance(method, str) else None


def outline(hf_config: Any) -> nn.Module:
    """The model of transformers that adapters are trained on, without weights: what folders are checked against."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(hf_config, attn_implementation="sdpa")


class Folder:
    """A saved adapter, checked against a model and read.

    Args:
        path: of the folder.
        model: see `outline`.

    Raises:
        AdapterError: if the folder is damaged, was made for another model, or holds what vLLM cannot serve; the message
            names file and field.
    """

    def __init__(self, path: Path, model: nn.Module):
        config = NTKAttentionConfig.from_pretrained(path)
        assert config.weights is not None
        self.config_file, self.weights_file = config.weights.with_name(CONFIG), config.weights
        self._check_served(config)
        try:
            self.plan: AdapterPlan = plan_adapter(model, config)
            check_plan(self.plan, model, config)
        except ValueError as error:
            raise AdapterError(f"{self.config_file}: {error}") from None
        embeddings = embedding_shapes(model)
        expected = file_shapes(self.plan, model, config)
        check_weights(self.weights_file, expected, embeddings)
        self.tensors = load_file(self.weights_file)
        if trained := sorted(set(self.tensors) & (set(embeddings) - set(expected))):
            raise AdapterError(
                f"{self.weights_file} holds {trained[0]}: embeddings of its own cannot be served by vLLM"
            )
        self.config = replace(config, **self.plan.settled)

    def _check_served(self, config: NTKAttentionConfig) -> None:
        if config.feature_map != SERVED_MAP:
            raise AdapterError(
                f"{self.config_file}: feature_map is {shown(config.feature_map)}, vLLM can serve {SERVED_MAP!r}"
            )
        if config.modules_to_save:
            raise AdapterError(
                f"{self.config_file}: modules_to_save holds {shown(config.modules_to_save[0])}, expected none: vLLM "
                "can serve states, not whole modules"
            )

    @torch.no_grad()
    def adapter(self, name: str) -> PrefixAdapter:
        """What the folder holds for an attention module of this name, and for the block beside it."""
        adapter = PrefixAdapter(self.config, self.plan.sites[name].geometry)
        start = f"base_model.model.{name}.{CHILD}."
        own = {key.removeprefix(start): x.float() for key, x in self.tensors.items() if key.startswith(start)}
        adapter.load_state_dict(own)
        return adapter

    def fingerprint(self) -> str:
        """The same for folders that hold the same."""
        digest = hashlib.sha256()
        for file in (self.config_file, self.weights_file):
            digest.update(file.read_bytes())
        return digest.hexdigest()
