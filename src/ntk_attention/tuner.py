"""NTK-Attention as a PEFT tuner."""

from __future__ import annotations

import copy
import math
import operator
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import reduce
from typing import Any

import torch
from peft.functional import delete_adapter
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper, register_peft_method
from torch import nn

from .adapter_folder import CONFIG, AdapterError, check_state_dict, check_weights
from .config import NTKAttentionConfig
from .coordinates import Coordinated
from .feed_forward import FeedForward, FeedForwardRows, feed_forwards
from .layer import NTKAttentionLayer, parameter_shapes, settle_ranks
from .registration import NAME
from .routing import (
    CHILD,
    Geometry,
    attach,
    check_implementation,
    check_routes,
    detach,
    geometry_of,
    is_encoder,
    routes,
    unrouted_attention,
)
from .sharding import head_mesh, is_partitioned, whole
from .state import RowStates

NO_ADAPTER = "__base__"  # PEFT's name for a row that no adapter is for
GENERATING = ("CAUSAL_LM", "SEQ_2_SEQ_LM")  # task types whose PEFT model needs a model that generates
# What PEFT adds to modules_to_save, whether the model has it or not; for these task types only after it injected.
HEADS = {"TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}


class MixedBatch:
    """The rows of a batch and the states of its adapters, made by `NTKAttentionModel.mixed_batch`.

    Both change in place: the next forward pass sees it, and so does the next replay of one that is in a CUDA graph.
    """

    @torch.no_grad()
    def __init__(self, layers: Sequence[NTKAttentionLayer], adapters: Sequence[str], adapter_names: Sequence[str]):
        self.adapters = list(adapters)
        index = self._index(adapter_names)
        self.indices: dict[torch.device, torch.Tensor] = {}  # one for all layers of a device
        self.rows: dict[NTKAttentionLayer, RowStates] = {}
        self.feed_forward_rows: dict[NTKAttentionLayer, FeedForwardRows] = {}
        for layer in layers:
            states = layer.stack(self.adapters)
            if states:
                device = states[0].Z.device
                on_device = self.indices.setdefault(device, index.to(device))
                self.rows[layer] = RowStates.stack(states, on_device)
                blocks = [layer[name].feed_forward if name in layer else None for name in self.adapters]
                if any(block is not None for block in blocks):
                    self.feed_forward_rows[layer] = FeedForwardRows.stack(blocks, on_device)

    def assign(self, adapter_names: Sequence[str]) -> None:
        """Give the rows other adapters, out of those whose states are here.

        Raises:
            ValueError: if there are more or fewer names than rows, or others.
        """
        index = self._index(adapter_names)
        for on_device in self.indices.values():
            if len(on_device) != len(index):
                raise ValueError(f"adapter_names has {len(index)} names for {len(on_device)} rows: expected as many")
            on_device.copy_(index)

    @torch.no_grad()
    def update(self, adapter_name: str) -> None:
        """Copy the state of an adapter again, after its weights have changed.

        Raises:
            ValueError: if its state is not here.
        """
        place = int(self._index([adapter_name])[0])
        for layer, rows in self.rows.items():
            if place >= 0 and adapter_name in layer:
                state = layer[adapter_name].state()
                for name in ("Z", "k", "log_scale"):
                    getattr(rows, name)[place].copy_(getattr(state, name))
                block = layer[adapter_name].feed_forward
                if block is not None:
                    self.feed_forward_rows[layer].put(place, block)

    def _index(self, adapter_names: Sequence[str]) -> torch.Tensor:
        places = {NO_ADAPTER: -1} | {name: i for i, name in enumerate(self.adapters)}
        if unknown := sorted(set(adapter_names) - set(places)):
            raise ValueError(f"adapter_names holds {unknown}, expected names of {self.adapters} or {NO_ADAPTER!r}")
        return torch.tensor([places[name] for name in adapter_names], dtype=torch.int32)


class NTKAttentionModel(BaseTuner):
    """Hangs a prefix state on every attention module of a frozen model; use it through `peft.get_peft_model`.

    Raises:
        ValueError: if the model, or a module that was named, does not route its attention.
    """

    # Not "ntk_attention_...": transformers' delete_adapter looks past modules whose name holds the method's name.
    prefix = CHILD
    tuner_layer_cls = NTKAttentionLayer

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if not re.fullmatch(r"[^./\\]+", adapter_name):
            raise ValueError(
                f"an adapter is saved in a folder of its name: expected no . / or \\, got {adapter_name!r}"
            )
        # On a copy: what is filled in for this model must not bind the user's config to it.
        peft_config = self.peft_config[adapter_name] = copy.copy(self.peft_config[adapter_name])
        if peft_config.task_type in HEADS and peft_config.modules_to_save is None:
            peft_config.modules_to_save = list(HEADS[peft_config.task_type])
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: NTKAttentionConfig, model_config: dict) -> NTKAttentionConfig:
        if peft_config.weights is None:
            return self._prepare(peft_config)
        try:
            prepared = self._prepare(peft_config)
        except ValueError as error:
            raise AdapterError(f"{peft_config.weights.with_name(CONFIG)}: {error}") from None
        check_weights(peft_config.weights, self._saved_shapes(peft_config))
        return prepared

    def _prepare(self, peft_config: NTKAttentionConfig) -> NTKAttentionConfig:
        routed = [name for name, module in self.model.named_modules() if name and routes(module)]
        if not routed:
            attention = unrouted_attention(self.model)
            raise ValueError(
                f"{type(self.model).__name__} has no module that routes through the attention interface of "
                f"transformers; found: {', '.join(attention[:3]) or 'no attention module'}"
            )
        if peft_config.target_modules is None:
            others = [name for name, module in self.model.named_modules() if name and not routes(module)]
            peft_config.target_modules = shortest_suffixes(routed, others)
        self._check_targets(self._target_names(peft_config), peft_config)
        return peft_config

    def _target_names(self, peft_config: NTKAttentionConfig) -> list[str]:
        names = [name for name, _ in self.model.named_modules() if name and CHILD not in name.split(".")]
        return [name for name in names if self._check_target_module_exists(peft_config, name)]

    def _check_targets(self, names: list[str], peft_config: NTKAttentionConfig) -> None:
        """Everything that can be refused is refused here, before the model is touched."""
        if not names:
            raise ValueError(
                "what target_modules, exclude_modules, modules_to_save and layers_to_transform leave was not found in "
                f"{type(self.model).__name__}: expected at least one attention module"
            )
        if peft_config.task_type in GENERATING and not hasattr(self.model, "prepare_inputs_for_generation"):
            raise ValueError(f"task_type is {peft_config.task_type!r}, but {type(self.model).__name__} cannot generate")
        for name in names:
            module = self.model.get_submodule(name)
            check_routes(module, name)
            check_implementation(module, name)
        sites = self._sites(names, peft_config)
        settle_ranks(peft_config, [found for found, _ in sites.values()])
        for name, (found, _) in sites.items():
            parameter_shapes(peft_config, found)  # refuses states without end
            self._check_mesh(name, found)
        blocks = [name for _, block in sites.values() if block is not None for name in set(block.names)]
        self._check_modules_to_save([*names, *blocks], peft_config)
        sizes = sorted({tuple(asdict(found).values()) for found, _ in sites.values()})
        geometry = {"num_modules": len(names), "sizes": [list(size) for size in sizes]}
        given = peft_config.geometry
        if given is not None:  # files from before feed-forward blocks had prefixes hold four numbers
            given = {**given, "sizes": [[*size, 0][:5] for size in given["sizes"]]}
        if given not in (None, geometry):
            raise ValueError(
                f"the adapter was made for a model with {describe(given)}, this one has {describe(geometry)}"
            )
        peft_config.geometry = geometry
        self.sites = sites  # of the adapter that is being made

    def _sites(
        self, names: Sequence[str], peft_config: NTKAttentionConfig
    ) -> dict[str, tuple[Geometry, FeedForward | None]]:
        """Where adapters go: attention modules by name, and the feed-forward block that each looks after as well."""
        modules = [self.model.get_submodule(name) for name in names]
        wanted = peft_config.feed_forward_rank
        has_blocks = not all(map(is_encoder, modules)) if wanted == "auto" else wanted is not None
        blocks = feed_forwards(self.model, names) if has_blocks else {}
        sites = {}
        for name, module in zip(names, modules, strict=True):
            found, block = geometry_of(module, name), blocks.get(name)
            sites[name] = (replace(found, feed_forward=0 if block is None else block.width), block)
        return sites

    def _check_mesh(self, name: str, geometry: Geometry) -> None:
        mesh = head_mesh(self.model, name)
        if mesh is not None and (geometry.num_heads % mesh.size() or geometry.num_kv_heads % mesh.size()):
            raise ValueError(
                f"{name} has {geometry.num_heads} heads and {geometry.num_kv_heads} KV heads: expected multiples of "
                f"tp_size = {mesh.size()}, since each process holds whole heads"
            )

    def _modules_to_save(self, peft_config: NTKAttentionConfig) -> dict[str, nn.Module]:
        """Modules that PEFT will train and save besides the states, by its rule: their names end like this."""
        ends = tuple(peft_config.modules_to_save or ())
        wrappers = [n for n, m in self.model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
        return {
            name: module.original_module if name in wrappers else module
            for name, module in self.model.named_modules(remove_duplicate=False)
            if ends and name.endswith(ends) and not any(name.startswith(f"{wrapper}.") for wrapper in wrappers)
        }

    def _check_modules_to_save(self, targets: list[str], peft_config: NTKAttentionConfig) -> None:
        modules = self._modules_to_save(peft_config)
        for name in peft_config.modules_to_save or ():
            is_added = any(name in heads for heads in HEADS.values())
            if not is_added and not any(found.endswith(name) for found in modules):
                raise ValueError(f"modules_to_save holds {name!r}, but {type(self.model).__name__} has no such module")
        for name, module in modules.items():
            if isinstance(module, nn.ModuleList | nn.ModuleDict):
                raise ValueError(f"modules_to_save means {name}, a {type(module).__name__}, which PEFT cannot copy")
            for other in (*targets, *(other for other in modules if other != name)):
                if f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}."):
                    raise ValueError(f"modules_to_save means {name}, which overlaps {other}: expected modules apart")

    def _saved_shapes(self, peft_config: NTKAttentionConfig) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors in the file of an adapter of this model."""
        shapes = {}
        for name, (geometry, _) in self._sites(self._target_names(peft_config), peft_config).items():
            for tensor, shape in parameter_shapes(peft_config, geometry).items():
                shapes[f"base_model.model.{name}.{CHILD}.{tensor}"] = shape
        for name, module in self._modules_to_save(peft_config).items():
            for tensor, value in module.state_dict().items():
                shapes[f"base_model.model.{name}.{tensor}"] = tuple(value.shape)
        return shapes

    @classmethod
    def _remove_adapter_name_from_key(cls, key, adapter_name):
        """In a file no name holds the adapter's, nor those of tensors that lie deeper (the directions of a map)."""
        return key.replace(f".{CHILD}.{adapter_name}.", f".{CHILD}.")

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """As PEFT does it; whole where a process holds a part of the heads (PEFT 0.21.0 would save the parts), and in
        plain coordinates also where ZeRO-3 made the state dict."""
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        tensors = {name: whole(x) for name, x in tensors.items()}
        for name, module in model.named_modules():
            own = isinstance(module, Coordinated) and f".{CHILD}.{adapter_name}." in f"{name}."
            if own and is_partitioned(getattr(module, module.scaled)):
                module.make_plain(tensors, f"{name}.")
        return tensors

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """As PEFT does it; a state dict that does not fit is refused as a whole, before one tensor is set."""
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        inside = (f"{CHILD}.{adapter_name}.", f"modules_to_save.{adapter_name}.")
        expected = {n: tuple(x.shape) for n, x in model.state_dict().items() if any(part in n for part in inside)}
        check_state_dict(state_dict, expected)
        return state_dict

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, **_: Any
    ) -> None:
        check_routes(target, current_key)
        geometry, block = self.sites[current_key]
        layer = getattr(target, CHILD, None)
        if layer is None:
            layer = NTKAttentionLayer(target, geometry, head_mesh(self.model, current_key))
            layer.set_adapter(self.active_adapters)
            attach(target, layer)
        layer.add_adapter(adapter_name, peft_config, block)

    def _cast_adapter_dtype(self, *args: Any, **kwargs: Any) -> None:
        """The last step of making and of loading an adapter, after which PEFT may have offloaded it."""
        for module in self.model.modules():
            if isinstance(module, NTKAttentionLayer):
                module.in_memory(list(module.keys()))
        super()._cast_adapter_dtype(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """A batch whose rows use different adapters, `adapter_names` of PEFT, for one call."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        beams = kwargs.get("num_beams") or 1
        with self.mixed_batch([name for name in names for _ in range(beams)]):
            yield

    @contextmanager
    def mixed_batch(self, adapter_names: Sequence[str], adapters: Sequence[str] | None = None) -> Iterator[MixedBatch]:
        """Give each row of the batch its own adapter, in every forward pass while this lasts; without gradients.

        The states are copied into one stack in each layer, now; a pass reads there what its rows need.

        Args:
            adapter_names: one for each row; "__base__" is a row without an adapter.
            adapters: all that rows can have while this lasts; by default those in adapter_names.

        Yields:
            What changes rows and states, see `MixedBatch`.

        Raises:
            ValueError: if the model is in training mode, a name is unknown, or two adapters on one module differ in
                feature map or state heads.
        """
        if self.training:
            raise ValueError("adapter_names is for inference: call model.eval() first")
        adapters = [name for name in dict.fromkeys(adapters or adapter_names) if name != NO_ADAPTER]
        if unknown := sorted(set(adapters) - set(self.peft_config)):
            raise ValueError(f"adapter_names holds {unknown}, expected names of {sorted(self.peft_config)}")
        layers = [module for module in self.model.modules() if isinstance(module, NTKAttentionLayer)]
        batch = MixedBatch(layers, adapters, adapter_names)
        before = [(layer.rows, layer.feed_forward_rows) for layer in layers]
        try:
            with ExitStack() as stack:
                for layer in layers:
                    layer.rows, layer.feed_forward_rows = batch.rows.get(layer), batch.feed_forward_rows.get(layer)
                    if layer.rows is None:  # none of the adapters is here
                        stack.enter_context(layer.resting())
                yield batch
        finally:
            for layer, rows in zip(layers, before, strict=True):
                layer.rows, layer.feed_forward_rows = rows

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Add an adapter whose states are sums: Z = sum_i w_i Z_i, k = sum_i w_i k_i.

        A state stands for a set of prefix tokens, so this is the prefix of all adapters with every token of adapter i
        counted w_i times: T = (A V + sum_i w_i phi Z_i) / (A 1 + sum_i w_i phi k_i). Weights of 1 are all adapters
        active at once. It is no average of outputs: equal weights that sum to 1 halve (for two) the share of each.
        What feed-forward blocks get adds in the same way: sum_i w_i x^T Z_i.

        Args:
            adapters: names of adapters on the same modules, with one feature map and as many state heads.
            weights: as many, none negative (a normaliser would be), not all zero.
            adapter_name: of the new adapter, whose Z has full rank; it is not activated.

        Raises:
            ValueError: if names are unknown or taken, or adapters or weights do not fit.
        """
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter with name {adapter_name!r} already exists")
        if unknown := [name for name in adapters if name not in self.peft_config]:
            raise ValueError(f"adapters holds {unknown}, expected names of {sorted(self.peft_config)}")
        if len(weights) != len(adapters) or not all(0 <= w < math.inf for w in weights) or not any(weights):
            raise ValueError(
                f"weights must be {len(adapters)} finite numbers, none negative (k is a normaliser) and not all zero, "
                f"got {list(weights)}"
            )
        layers = [module for module in self.model.modules() if isinstance(module, NTKAttentionLayer)]
        if any(any(name in layer for name in adapters) != all(name in layer for name in adapters) for layer in layers):
            raise ValueError(f"the adapters {list(adapters)} sit on different modules: expected the same")
        parts = [(name, math.log(w)) for name, w in zip(adapters, weights, strict=True) if w > 0]
        with torch.no_grad():
            sums = {
                layer: reduce(operator.add, (layer[name].state().weighted(log_w) for name, log_w in parts))
                for layer in layers
                if adapters[0] in layer
            }
            blocks = {
                layer: [(block, math.exp(w)) for name, w in parts if (block := layer[name].feed_forward) is not None]
                for layer in sums
            }
            ranks = (sum(block.rank for block, _ in found) for found in blocks.values())
            self.peft_config[adapter_name] = replace(
                self.peft_config[adapters[0]],
                rank=None,
                feed_forward_rank=max(ranks) or None,
                geometry=None,
                init_weights=True,
                inference_mode=True,
            )
            self.inject_adapter(self.model, adapter_name)
            for layer, state in sums.items():
                layer[adapter_name].load_state(state)
                block = layer[adapter_name].feed_forward
                if block is not None:
                    block.become_sum(blocks[layer])

    def delete_adapter(self, adapter_name: str) -> None:
        """As every tuner does it, which would look past modules whose name holds the prefix, and so past ours."""
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        del self.peft_config[adapter_name]
        inside = f"{CHILD}."
        self.active_adapter = delete_adapter(self.model, adapter_name, inside, NTKAttentionLayer) or []

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "NTK-Attention cannot be merged into the base weights: its output depends on the query through "
            "phi(q), which no projection matrix can hold. Keep the adapter, or call unload() to remove it."
        )

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if merge:
            self._check_merge_allowed()
        for module in list(self.model.modules()):
            if hasattr(module, CHILD):
                detach(module)
        return super()._unload_and_optionally_merge(merge, *args, **kwargs)


def describe(geometry: dict[str, Any]) -> str:
    sizes = ", ".join(
        f"{h} heads, {kv} KV heads, head_dim {d}, value dim {v}{f', feed-forward width {D}' if D else ''}"
        for h, kv, d, v, D in geometry["sizes"]
    )
    return f"{geometry['num_modules']} attention modules ({sizes})"


def shortest_suffixes(wanted: list[str], others: list[str]) -> set[str]:
    """The shortest dotted suffixes that match all wanted module names and none of the others."""
    suffixes = set()
    for name in wanted:
        parts = name.split(".")
        candidates = (".".join(parts[i:]) for i in reversed(range(len(parts))))
        suffixes.add(next(s for s in candidates if not any(o == s or o.endswith("." + s) for o in others)))
    return suffixes


register_peft_method(
    name=NAME.lower(), config_cls=NTKAttentionConfig, model_cls=NTKAttentionModel, prefix=NTKAttentionModel.prefix
)
