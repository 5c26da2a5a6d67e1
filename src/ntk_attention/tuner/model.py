"""NTK-Attention as a PEFT tuner."""

from __future__ import annotations

import logging
import math
import operator
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, reduce
from numbers import Real
from typing import Any, NamedTuple

import torch
from peft.functional import delete_adapter
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, register_peft_method
from torch import nn

from .arguments import own_attention
from .calls import during_calls
from .checkpointing import let_inputs_have_gradients, stop
from .config import NTKAttentionConfig
from .coordinates import Coordinated
from .coverage import Coverage
from .distributed import is_partitioned, whole
from .kept import keeping
from .layer import NTKAttentionLayer, check_same_positions
from .mixed import NO_ADAPTER, MixedBatch, check_rows_stay, check_signals, copies_of_rows, hook_heads, names_of_rows
from .plan import AdapterPlan, check_plan, file_shapes, plan_adapter
from .registration import NAME
from .routing import CHILD, attach, check_routes, detach
from .saved_modules import HEADS, embedding_shapes, embeddings_of
from .targets import check_adapter_name, is_target
from .untrusted import CONFIG, AdapterError, check_state_dict, check_weights

logger = logging.getLogger(__name__)

INPUTS = ("input_ids", "inputs_embeds", "inputs", "input_features", "pixel_values", "input_values")


class MadeAdapter(NamedTuple):
    """What the model remembers of an adapter that it has."""

    settled: dict[str, Any]  # the fields of its config that the model filled in; another model may fill in others
    coverage: Coverage


class NTKAttentionModel(BaseTuner):
    """Hangs a prefix state on every attention module of a frozen model; use it through `peft.get_peft_model`.

    Raises:
        ValueError: if the model, or a module that was named, does not route its attention.
    """

    # Not "ntk_attention_...": transformers' delete_adapter looks past modules whose name holds the method's name.
    prefix = CHILD
    tuner_layer_cls = NTKAttentionLayer

    def __init__(self, *args: Any, **kwargs: Any):
        self.made: dict[str, MadeAdapter] = {}  # by name
        self._plan: AdapterPlan | None = None  # of the adapter that is being made, between the steps of PEFT
        self.targets: set[str] = set()  # names of all attention modules that have adapters
        super().__init__(*args, **kwargs)
        hook = partial(let_inputs_have_gradients, self.targets)
        self._model_hooks = [
            self.model.register_forward_pre_hook(hook),
            self.model.register_forward_pre_hook(check_signals, with_kwargs=True),
        ]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT does it: plan the adapter, check the plan, then change the model; what has a prefix is reported.

        Raises:
            ValueError: if the model cannot have the adapter, see `plan`; the model is as it was then.
            AdapterError: likewise, and if weights do not fit, where the adapter is loaded from a folder.
        """
        check_adapter_name(model, adapter_name)
        peft_config = self.peft_config[adapter_name]
        peft_config.unsettle()  # an earlier model may have filled it in
        if peft_config.task_type in HEADS and peft_config.modules_to_save is None:
            peft_config.settle(modules_to_save=list(HEADS[peft_config.task_type]))
        is_first = not self.made
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            coverage = self._planned().coverage
        finally:
            self._plan = None
        if is_first:  # what other methods have put into the model is a part of it, and frozen as all of it is
            for module in model.modules():
                if isinstance(module, BaseTunerLayer) and not isinstance(module, NTKAttentionLayer):
                    module.requires_grad_(False)
        self.targets |= coverage.attention.keys()
        settled = {name: getattr(peft_config, name) for name in peft_config.asked}
        self.made[adapter_name] = MadeAdapter(settled, coverage)
        report = warnings.warn if coverage.is_partial() else logger.info
        report(str(coverage))

    def _planned(self) -> AdapterPlan:
        assert self._plan is not None  # PEFT prepares the config of an adapter before it makes it
        return self._plan

    def ntk_summary(self, adapter_name: str | None = None) -> str:
        """How many attention modules and feed-forward blocks have a prefix, which kinds have none, and why.

        Args:
            adapter_name: of the adapter; by default the active one.

        Raises:
            ValueError: if there is no such adapter.
        """
        name = self.active_adapters[0] if adapter_name is None else adapter_name
        if name not in self.made:
            raise ValueError(f"there is no adapter {name!r}: expected one of {sorted(self.made)}")
        return str(self.made[name].coverage)

    def _prepare_adapter_config(self, peft_config: NTKAttentionConfig, model_config: Any) -> NTKAttentionConfig:
        """Everything that can be refused is refused here, before the model or the config is touched."""
        weights = peft_config.weights
        try:
            plan = plan_adapter(self.model, peft_config)
            check_plan(plan, self.model, peft_config)
        except ValueError as error:
            if weights is None:
                raise
            raise AdapterError(f"{weights.with_name(CONFIG)}: {error}") from None
        if weights is not None:
            check_weights(weights, file_shapes(plan, self.model, peft_config), embedding_shapes(self.model))
        peft_config.settle(**plan.settled)
        self._plan = plan
        return peft_config

    def _check_tied_modules(self, model: nn.Module, peft_config: NTKAttentionConfig) -> None:
        """Nothing: attention modules share no weights with embeddings, which some models refuse to name."""

    @staticmethod
    def _check_target_module_exists(peft_config: NTKAttentionConfig, key: str) -> Any:
        return is_target(peft_config, key)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """In a file no name holds the adapter's, nor those of tensors that lie deeper (the buffers of a feature map),
        nor of embeddings that train and that PEFT adds once more."""
        key = key.replace(f".{CHILD}.{adapter_name}.", f".{CHILD}.")
        return key.replace(f".modules_to_save.{adapter_name}.", ".")

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: NTKAttentionConfig, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """As PEFT does it; whole where a process holds a part of the heads (PEFT 0.21.0 would save the parts), and in
        plain coordinates also where ZeRO-3 made the state dict."""
        tuner = getattr(model, "base_model", None)
        if isinstance(tuner, cls):  # another model may have filled the same config in since
            config.settle(**tuner.made[adapter_name].settled)
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        own = f".{CHILD}.{adapter_name}."  # PEFT gives those of other methods, too
        tensors = {name: whole(x) for name, x in tensors.items() if own in f".{name}"}
        for name, module in model.named_modules():
            if isinstance(module, Coordinated) and own in f".{name}." and is_partitioned(module.scaled):
                module.make_plain(tensors, f"{name}.")
        return tensors

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: NTKAttentionConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """As PEFT does it; a state dict that does not fit is refused as a whole, before one tensor is set."""
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        inside = (f"{CHILD}.{adapter_name}.", f"modules_to_save.{adapter_name}.")
        expected = {n: tuple(x.shape) for n, x in model.state_dict().items() if any(part in n for part in inside)}
        names = {f"{name}.{tensor}" for name, layer in embeddings_of(model) for tensor in layer.state_dict()}
        embeddings = {name: tuple(x.shape) for name, x in model.state_dict().items() if name in names}
        check_state_dict(state_dict, expected, embeddings)
        return state_dict

    def _create_and_replace(
        self,
        peft_config: NTKAttentionConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        check_routes(target, current_key)
        plan = self._planned()
        site = plan.sites[current_key]
        layer = getattr(target, CHILD, None)
        if layer is None:
            layer = NTKAttentionLayer(target, site.geometry, own_attention(target), site.mesh, encodes=plan.encodes)
            BaseTunerLayer.set_adapter(layer, self.active_adapters)
            attach(target, layer)
        layer.add_adapter(adapter_name, peft_config, site.block, site.rotary)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """The last step of making and of loading an adapter, after which PEFT may have offloaded it."""
        for module in self.model.modules():
            if isinstance(module, NTKAttentionLayer):
                module.in_memory(list(module.keys()))
                if not autocast_adapter_dtype:
                    module.cast(adapter_name)
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Around one call of forward or generate: rows that use different adapters, `adapter_names` of PEFT, or what
        adapters make of their parameters, kept."""
        if kwargs.get("adapter_names") is None:
            with keeping():
                yield
            return
        names = names_of_rows(kwargs["adapter_names"])
        check_rows_stay(self.model, names, kwargs)
        inputs = [*args, *(kwargs.get(name) for name in INPUTS)]
        size = next((len(x) for x in inputs if isinstance(x, torch.Tensor) and x.dim() > 0), len(names))
        if size != len(names):
            raise ValueError(f"adapter_names has {len(names)} names for a batch of {size}: expected as many")
        with self.mixed_batch(names, copies=copies_of_rows(self.model, args, kwargs)):
            yield

    @contextmanager
    def mixed_batch(
        self, adapter_names: Sequence[str], adapters: Sequence[str] | None = None, *, copies: Iterable[int] = (1,)
    ) -> Iterator[MixedBatch]:
        """Give each row of the batch its own adapter, in every forward pass of this thread while this lasts; without
        gradients.

        The states are copied into one stack in each layer, now; a pass reads there what its rows need.

        Args:
            adapter_names: one for each row; "__base__" is a row without an adapter.
            adapters: all that rows can have while this lasts; by default those in adapter_names.
            copies: how many neighbouring rows `generate` may make of each, for beams or several answers.

        Yields:
            What changes rows and states, see `MixedBatch`.

        Raises:
            ValueError: if the model is in training mode, a name is unknown, or two adapters on one module differ in
                feature map, state heads or positions.
        """
        if not len(adapter_names):
            raise ValueError("adapter_names is empty: expected one name for each row of the batch")
        if self.training:
            raise ValueError("adapter_names is for inference: call model.eval() first")
        adapters = [name for name in dict.fromkeys(adapters or adapter_names) if name != NO_ADAPTER]
        if unknown := sorted(set(adapters) - set(self.peft_config)):
            raise ValueError(f"adapter_names holds {unknown}, expected names of {sorted(self.peft_config)}")
        layers = self._layers()
        hook_heads(self.model, self.peft_config)
        batch = MixedBatch(layers, adapters, adapter_names, frozenset(copies))
        with during_calls(mixed=batch):
            yield batch

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Add an adapter whose states are sums: Z = sum_i w_i Z_i, k = sum_i w_i k_i.

        A state stands for a set of prefix tokens, so this is the prefix of all adapters with every token of adapter i
        counted w_i times: T = (A V + sum_i w_i phi Z_i) / (A 1 + sum_i w_i phi k_i). Weights of 1 are all adapters
        active at once. It is no average of outputs: equal weights that sum to 1 halve (for two) the share of each.
        What feed-forward blocks get adds in the same way: sum_i w_i x^T Z_i in each of their linear layers.

        Args:
            adapters: names of adapters on the same modules, with one feature map and as many state heads.
            weights: as many, none negative (a normaliser would be), not all zero.
            adapter_name: of the new adapter, whose Z has full rank; it is not activated.

        Raises:
            ValueError: if names are unknown or taken, or adapters or weights do not fit.
        """
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter with name {adapter_name!r} already exists")
        self._check_sum(adapters, weights)
        layers = self._layers()
        parts = [(name, math.log(w)) for name, w in zip(adapters, weights, strict=True) if w > 0]
        with torch.no_grad():
            sums = {
                layer: reduce(operator.add, (layer[name].state().weighted(log_w) for name, log_w in parts))
                for layer in layers
                if adapters[0] in layer
            }
            blocks = {
                layer: {
                    place: [(layer[name].parts[place], math.exp(w)) for name, w in parts if place in layer[name].parts]
                    for place in dict.fromkeys(place for name, _ in parts for place in layer[name].parts)
                }
                for layer in sums
            }
            ranks = [sum(part.rank for part, _ in found) for own in blocks.values() for found in own.values()]
            self.peft_config[adapter_name] = replace(
                self.peft_config[adapters[0]],
                rank=None,
                feed_forward_rank=max(ranks, default=None),
                feed_forward=next(iter(self._placings(adapters)), "inside"),
                geometry=None,
                init_weights=True,
                inference_mode=True,
            )
            self.inject_adapter(self.model, adapter_name)
            for layer, state in sums.items():
                layer.load_state(adapter_name, state)
                for place, part in layer[adapter_name].parts.items():
                    part.become_sum(blocks[layer][place])

    def _check_sum(self, adapters: Sequence[str], weights: Sequence[float]) -> None:
        """Raise ValueError unless `add_weighted_adapter` can add these."""
        if isinstance(adapters, str) or not isinstance(weights, Sequence) or isinstance(weights, str):
            raise ValueError(f"expected lists of adapters and of their weights, got {adapters!r} and {weights!r}")
        if unknown := [name for name in adapters if name not in self.peft_config]:
            raise ValueError(f"adapters holds {unknown}, expected names of {sorted(self.peft_config)}")
        if not all(isinstance(w, Real) for w in weights):
            raise ValueError(f"weights must be numbers, got {list(weights)}")
        if len(weights) != len(adapters) or not all(0 <= w < math.inf for w in weights) or not any(weights):
            raise ValueError(
                f"weights must be {len(adapters)} finite numbers, none negative (k is a normaliser) and not all zero, "
                f"got {list(weights)}"
            )
        check_same_positions({name: self.peft_config[name].positions for name in adapters})
        if len(self._placings(adapters)) > 1:
            raise ValueError(
                f"the adapters {list(adapters)} have prefixes inside of feed-forward blocks and beside them: expected "
                "the same feed_forward, or feed_forward_rank=None"
            )
        layers = self._layers()
        if any(any(name in layer for name in adapters) != all(name in layer for name in adapters) for layer in layers):
            raise ValueError(f"the adapters {list(adapters)} sit on different modules: expected the same")
        if heads := sorted(
            name
            for name, module in self.model.named_modules()
            if isinstance(module, ModulesToSaveWrapper)
            and any(adapter in module.modules_to_save for adapter in adapters)
        ):
            raise ValueError(
                f"the adapters {list(adapters)} have modules of their own in {heads} (modules_to_save), which a sum of "
                "prefixes does not hold: expected adapters without"
            )

    def _placings(self, adapters: Sequence[str]) -> set[str]:
        """Where these adapters have prefixes of feed-forward blocks."""
        configs = [self.peft_config[name] for name in adapters]
        return {config.feed_forward for config in configs if config.feed_forward_rank is not None}

    def delete_adapter(self, adapter_name: str) -> None:
        """As every tuner does it, which would look past modules whose name holds the prefix, and so past ours."""
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        if any(adapter_name in layer.merged_adapters for layer in self._layers()):
            self.unmerge_adapter()
        del self.peft_config[adapter_name]
        self.made.pop(adapter_name, None)
        inside = f"{CHILD}."
        self.active_adapter = delete_adapter(self.model, adapter_name, inside, NTKAttentionLayer) or []

    def _layers(self) -> list[NTKAttentionLayer]:
        return [module for module in self.model.modules() if isinstance(module, NTKAttentionLayer)]

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Put the parts of feed-forward blocks into the weights of their linear layers, where they cost nothing.

        The states stay beside: what they add depends on the query. So does the adapter, which is saved as before. The
        weights that were there are kept on the CPU, and `unmerge_adapter` brings them back to the last bit. Until then
        a call that asks for anything else is refused: training, other adapters, rows of several, `disable_adapter`.
        Changes of the parameters are noticed, unless they go through `.data`, as PEFT's hotswapping does.

        Args:
            adapter_names: whose parts; None for those of the active adapters.
            safe_merge: whether a sum that is not finite is refused, with all weights as they were.

        Raises:
            ValueError: if there are no such parts, some are merged already, or a weight cannot take one: quantised,
                spread over processes or offloaded ones, and experts, whose prefix is beside the block.
        """
        names = list(adapter_names or self.active_adapters)
        for name in names:
            if name not in self.peft_config:
                raise ValueError(f"there is no adapter {name!r}: expected some of {list(self.peft_config)}")
        layers = self._layers()
        if not any([layer.check_mergeable(names) for layer in layers]):
            raise ValueError(f"the adapters {names} have no prefix in a feed-forward block: states are not merged")
        try:
            for layer in layers:
                layer.merge(safe_merge, names)
        except ValueError:
            self.unmerge_adapter()
            raise

    def unmerge_adapter(self) -> None:
        """Take the parts of feed-forward blocks out of the weights again; nothing where none is there."""
        for layer in self._layers():
            layer.unmerge()

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "NTK-Attention cannot be merged into the base weights: its output depends on the query through "
            "phi(q), which no projection matrix can hold. Keep the adapter, or call unload() to remove it."
        )

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if merge:
            self._check_merge_allowed()
        self.unmerge_adapter()
        for hook in self._model_hooks:
            hook.remove()
        stop(self.targets, self.model)
        for name, module in list(self.model.named_modules()):
            if hasattr(module, CHILD):
                detach(module)
            # Not PEFT's way, which takes a wrapped module for one with a weight, and takes other methods away as well.
            elif isinstance(module, ModulesToSaveWrapper) and any(
                adapter in module.modules_to_save for adapter in self.made
            ):
                parent, _, child = name.rpartition(".")
                trained = module.unload_and_optionally_merge_module(False, False, None)
                setattr(self.model.get_submodule(parent), child, trained)
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model


register_peft_method(
    name=NAME.lower(), config_cls=NTKAttentionConfig, model_cls=NTKAttentionModel, prefix=NTKAttentionModel.prefix
)
