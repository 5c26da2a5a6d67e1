"""One engine of vLLM: its model with places for states, and the adapters that are loaded into it."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.v1.core.kv_cache_utils import _gen_lora_extra_hash_keys

from ..tuner.feed_forward import FeedForward
from ..tuner.untrusted import AdapterError
from . import blocks, slots
from .attention import PrefixAttention
from .folder import Folder, local_folder, outline
from .slots import LayerStates, Share, Slots
from .step import RotaryTable
from .survey import Site, backend_of, refused_engine, sites_of

logger = logging.getLogger(__name__)

STATES, BLOCK = "ntk_states", "ntk_block"  # the ends of the names of our layers, which vLLM keeps among its own


class Engine:
    """What the plugin knows of one LoRA manager of vLLM.

    An engine that no prefix can be served in goes on without: the first adapter of ours that is loaded is told why.

    Args:
        manager: vLLM's `LoRAModelManager`, just made.
        config: vLLM's, of all.
    """

    def __init__(self, manager: Any, config: Any):
        self.manager = manager
        self.sites: dict[str, Site] = {}
        self.loaded: dict[str, str] = {}  # fingerprints, by what the prefix cache calls the adapter
        self.caches_prefixes = bool(config.cache_config.enable_prefix_caching)
        self.max_rank: int = manager.lora_config.max_lora_rank
        self.refused = refused_engine(manager.model, config)
        if self.refused is None:
            try:
                self.make_places(config)
            except Exception as error:  # of any model: the engine may be there for LoRA alone
                logger.exception("NTK-Attention cannot be served by this engine")
                self.refused = f"its model is not understood: {type(error).__name__}: {error}"

    def make_places(self, config: Any) -> None:
        """Give all layers that can have them places for adapters."""
        manager = self.manager
        self.outline = outline(config.model_config.hf_config)
        self.sites = sites_of(manager.model)
        self.served = [name for name, site in self.sites.items() if site.refused is None]
        self.dtype: torch.dtype = manager.lora_config.lora_dtype
        punica = manager._get_punica_wrapper(next(iter(self.sites), ""))
        self.slots = Slots(manager.lora_slots, punica, manager.device)
        tables: dict[int, RotaryTable] = {}
        for name in self.served:
            self.add_states(name, tables)
        self.blocks: dict[str, blocks.BlockFactors] = {}
        for name, (block, width) in blocks.blocks_of(manager.model, self.outline, self.served).items():
            self.blocks[name] = blocks.BlockFactors(self.slots, width, self.max_rank, self.dtype)
            manager.register_module(f"{name}.{BLOCK}", self.blocks[name])
            block.register_forward_hook(self.blocks[name].after_block, with_kwargs=True)

    def add_states(self, name: str, tables: dict[int, RotaryTable]) -> None:
        """Give an attention layer places for states; tables that undo rotary positions are shared between layers."""
        site = self.sites[name]
        attention = site.attention
        states = LayerStates(self.slots, attention.num_heads, attention.head_size, self.dtype)
        self.manager.register_module(f"{name}.{STATES}", states)
        if site.rotary is not None and id(site.rotary) not in tables:
            tables[id(site.rotary)] = RotaryTable(site.rotary)
        rotary = None if site.rotary is None else tables[id(site.rotary)]
        attention.impl = prefix_attention(backend_of(attention.impl)).of(attention.impl, states, rotary)

    def load(self, request: Any) -> LoRAModel:
        """An adapter of ours, as vLLM wants one.

        Raises:
            AdapterError: if the folder cannot be served here; the message says why.
        """
        if self.refused is not None:
            raise AdapterError(f"{request.lora_path} cannot be served by this engine: {self.refused}")
        folder = Folder(local_folder(request.lora_path), self.outline)
        self.check_sites(folder)
        self.check_prefix_cache(request, folder)
        layers: dict[str, LoRALayerWeights] = {}
        for name in folder.plan.sites:
            adapter = folder.adapter(name)
            own = f"{name}.{STATES}"
            layers[own] = slots.weights(own, adapter.state(), adapter.positions == "free", self.share(name))
            planned = folder.plan.sites[name].block
            for part in () if planned is None else planned.parts:
                own = part.layer or f"{name}.{BLOCK}"
                slices = self.manager.packed_modules.get(own, [own])  # vLLM wants those of a fused layer one by one
                layers |= blocks.weights(slices, adapter.parts[part.size.name])
        return LoRAModel(request.lora_int_id, self.max_rank, layers)

    def share(self, name: str) -> Share:
        """The heads of a layer that this process has."""
        count = self.sites[name].attention.num_heads
        return Share(get_tensor_model_parallel_rank() * count, count, get_tensor_model_parallel_world_size() * count)

    def check_sites(self, folder: Folder) -> None:
        """Raise AdapterError if a layer that the adapter has a state for cannot have one here."""
        is_free = folder.config.positions == "free"
        for name, planned in folder.plan.sites.items():
            site = self.sites.get(name)
            if site is None:
                raise AdapterError(
                    f"{folder.config_file}: the adapter has a state for {name}, where vLLM's "
                    f"{type(self.manager.model).__name__} has no attention"
                )
            reason = site.refused or (site.refused_free if is_free else None)
            if reason is not None:
                raise AdapterError(f"{folder.config_file}: {name} cannot be served: {reason}")
            if planned.block is not None:
                self.check_block(folder, name, planned.block)

    def check_block(self, folder: Folder, name: str, block: FeedForward) -> None:
        """Raise AdapterError if the feed-forward block beside this attention cannot have its prefix here."""
        layers = [part.layer for part in block.parts if part.layer]
        with_lora = {*self.manager.modules, *(x for own in self.manager.packed_modules.values() for x in own)}
        for layer in layers:
            if layer not in with_lora:
                raise AdapterError(
                    f"{folder.config_file}: {layer} cannot be served: vLLM's {type(self.manager.model).__name__} has "
                    "no LoRA in a layer of this name"
                )
        if not layers:
            factors = self.blocks.get(name)
            reason = "vLLM has no such module" if factors is None else factors.refused
            if reason is not None:
                raise AdapterError(
                    f"{folder.config_file}: the feed-forward block {block.names[0]} cannot be served: {reason}"
                )
        rank = folder.config.feed_forward_rank
        if not isinstance(rank, int) or rank > self.max_rank:
            raise AdapterError(
                f"{folder.config_file}: feed_forward_rank is {rank}, this engine has places for {self.max_rank}: "
                "start it with a larger --max-lora-rank"
            )

    def check_prefix_cache(self, request: Any, folder: Folder) -> None:
        """Raise AdapterError if other weights were loaded before that the prefix cache has by the same name.

        It would answer with their keys and values.
        """
        name = repr(_gen_lora_extra_hash_keys(SimpleNamespace(lora_request=request)))
        found = folder.fingerprint()
        if self.caches_prefixes and self.loaded.get(name, found) != found:
            raise AdapterError(
                f"{request.lora_path} holds other weights than when it was loaded as {request.lora_name!r} before, and "
                "the prefix cache would answer with those: expected another name or another folder"
            )
        self.loaded[name] = found


def prefix_attention(backend: str | None) -> type[PrefixAttention]:
    """The class that takes the place of a backend's."""
    if backend == "FLASH_ATTN":
        from .flash import FlashPrefixAttention, ask_for_lse

        ask_for_lse()
        return FlashPrefixAttention
    from .cpu import CPUPrefixAttention, mend_operators

    mend_operators()
    return CPUPrefixAttention
