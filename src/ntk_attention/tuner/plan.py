"""What an adapter would be on a model: planned, and checked, before the model is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .adapter import parameter_shapes, settled_ranks
from .config import NTKAttentionConfig
from .coverage import Coverage, layers_without
from .distributed import SLICES, head_mesh, style_of
from .feed_forward import FeedForward, feed_forwards
from .geometry import Geometry, encodes, geometry_of
from .rotation import Rotary, rotary_of
from .routing import CHILD
from .saved_modules import check_modules_to_save, modules_to_save
from .targets import check_task, find_targets


@dataclass(frozen=True)
class Site:
    """Where an adapter goes: one attention module, and the feed-forward block that it looks after as well.

    Args:
        geometry: sizes of both.
        block: None where the adapter has no prefix for one.
        mesh: of the processes that hold a part of the heads each; None where each holds all.
        rotary: how the module rotates its queries, where phi is to see them unrotated.
    """

    geometry: Geometry
    block: FeedForward | None
    mesh: DeviceMesh | None
    rotary: Rotary | None = None


@dataclass(frozen=True)
class AdapterPlan:
    """All that one config means on one model.

    Args:
        sites: by name of the attention module.
        encodes: whether these are of an encoder that writes nothing.
        coverage: what has a prefix and what has none, for the user.
        settled: the config's fields that the model fills in, with their values.
    """

    sites: Mapping[str, Site]
    encodes: bool
    coverage: Coverage
    settled: Mapping[str, Any]


def plan_adapter(model: nn.Module, config: NTKAttentionConfig) -> AdapterPlan:
    """What an adapter of this config would be on this model; neither is changed.

    Args:
        model: of transformers, with adapters or without.
        config: as the user or a file gave it.

    Raises:
        ValueError: if no attention module is left for it, one that was named cannot have a prefix, or one has rotary
            positions that cannot be undone, and phi is to see none; or inside of torch.device("meta").
    """
    if torch.get_default_device().type == "meta":  # what is tried out here, and what adapters start with, has values
        raise ValueError(
            'the adapter is made inside of torch.device("meta"): expected the model alone to be, and for an adapter '
            "without weights low_cpu_mem_usage=True"
        )
    targets = find_targets(model, config)
    modules = [model.get_submodule(name) for name in targets.names]
    is_encoder = encodes(model, modules)
    has_blocks = not is_encoder if config.feed_forward_rank == "auto" else config.feed_forward_rank is not None
    blocks = feed_forwards(model, targets.names, config.feed_forward) if has_blocks else {}
    sites = {}
    for name, module in zip(targets.names, modules, strict=True):
        block = blocks.get(name)
        geometry = replace(geometry_of(module, name), feed_forward=() if block is None else block.sizes)
        rotary = rotary_of(module, name) if config.positions == "free" else None
        sites[name] = Site(geometry, block, head_mesh(model, name), rotary)
    geometries = [site.geometry for site in sites.values()]
    settled: dict[str, Any] = {**settled_ranks(config, geometries), "geometry": recorded_geometry(geometries)}
    if config.target_modules is None:
        settled["target_modules"] = targets.suffixes
    layers_of_blocks = {block.layer for block in blocks.values()}
    own_layers = [name for name, module in model.named_modules() if module in layers_of_blocks]
    coverage = Coverage(
        attention={name: type(module).__name__ for name, module in zip(targets.names, modules, strict=True)},
        blocks=list(blocks),
        without_block=layers_without(model, targets.names, blocks, own_layers) if has_blocks else {},
        left_out=targets.left_out,
    )
    return AdapterPlan(sites, is_encoder, coverage, settled)


def check_plan(plan: AdapterPlan, model: nn.Module, config: NTKAttentionConfig) -> None:
    """Raise ValueError if the model cannot have the adapter, or the config was made for another model."""
    check_task(model, config)
    planned = replace(config, **plan.settled)
    for name, site in plan.sites.items():
        parameter_shapes(planned, site.geometry)  # refuses states without end
        check_heads(name, site)
        check_slices(model, site)
    blocks = [name for site in plan.sites.values() if site.block is not None for name in set(site.block.names)]
    check_modules_to_save(model, planned, [*plan.sites, *blocks])
    given, own = config.geometry, plan.settled["geometry"]
    if given not in (None, own):
        raise ValueError(
            f"the adapter was made for a model with {geometry_in_words(given)}, this one has {geometry_in_words(own)}"
        )


def check_heads(name: str, site: Site) -> None:
    """Raise ValueError if a tensor-parallel model would cut a head apart."""
    geometry, mesh = site.geometry, site.mesh
    if mesh is not None and (geometry.num_heads % mesh.size() or geometry.num_kv_heads % mesh.size()):
        raise ValueError(
            f"{name} has {geometry.num_heads} heads and {geometry.num_kv_heads} KV heads: expected multiples of "
            f"tp_size = {mesh.size()}, since each process holds whole heads"
        )


def check_slices(model: Any, site: Site) -> None:
    """Raise ValueError if a tensor-parallel model cuts a layer of a block in a way that its part cannot follow."""
    if site.mesh is None or site.block is None:
        return
    for part in site.block.parts:
        if part.layer and (style := style_of(model, part.layer)) not in SLICES:
            raise ValueError(
                f"{part.layer} is spread over processes in the style {style!r}: expected one of "
                f'{sorted(filter(None, SLICES))}, or an adapter with feed_forward="beside"'
            )


def file_shapes(plan: AdapterPlan, model: nn.Module, config: NTKAttentionConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in the file of an adapter of this plan."""
    planned = replace(config, **plan.settled)
    shapes = {
        f"base_model.model.{name}.{CHILD}.{tensor}": shape
        for name, site in plan.sites.items()
        for tensor, shape in parameter_shapes(planned, site.geometry).items()
    }
    for name, module in modules_to_save(model, config).items():
        for tensor, value in module.state_dict().items():
            shapes[f"base_model.model.{name}.{tensor}"] = tuple(value.shape)
    return shapes


def recorded_geometry(geometries: Sequence[Geometry]) -> dict[str, Any]:
    """What `geometry` of a config holds: the number of attention modules, and each of their sizes once, in order."""
    sizes = {(g.num_heads, g.num_kv_heads, g.head_dim, g.value_dim, g.width) for g in geometries}
    return {"num_modules": len(geometries), "sizes": [list(size) for size in sorted(sizes)]}


def geometry_in_words(geometry: dict[str, Any]) -> str:
    """What `geometry` of a config says, for a message."""
    sizes = ", ".join(
        f"{h} heads, {kv} KV heads, head_dim {d}, value dim {v}{f', feed-forward width {D}' if D else ''}"
        for h, kv, d, v, D in geometry["sizes"]
    )
    return f"{geometry['num_modules']} attention modules ({sizes})"
