"""NTK-Attention as a PEFT tuner."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

from peft.functional import delete_adapter
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from torch import nn

from .config import NTKAttentionConfig
from .layer import NTKAttentionLayer
from .registration import NAME
from .routing import CHILD, attach, check_implementation, check_routes, detach, geometry_of, routes, unrouted_attention


class NTKAttentionModel(BaseTuner):
    """Hangs a prefix state on every attention module of a frozen model; use it through `peft.get_peft_model`.

    Raises:
        ValueError: if the model, or a module that was named, does not route its attention.
    """

    # Not "ntk_attention_...": transformers' delete_adapter looks past modules whose name holds the method's name.
    prefix = CHILD
    tuner_layer_cls = NTKAttentionLayer

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # On a copy: what is filled in for this model must not bind the user's config to it.
        self.peft_config[adapter_name] = copy.copy(self.peft_config[adapter_name])
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: NTKAttentionConfig, model_config: dict) -> NTKAttentionConfig:
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
        names = [name for name, _ in self.model.named_modules() if name and CHILD not in name.split(".")]
        self._check_targets([n for n in names if self._check_target_module_exists(peft_config, n)], peft_config)
        return peft_config

    def _check_targets(self, names: list[str], peft_config: NTKAttentionConfig) -> None:
        """Everything that can be refused is refused here, before the model is touched."""
        sizes = set()
        for name in names:
            module = self.model.get_submodule(name)
            check_routes(module, name)
            check_implementation(module, name)
            sizes.add(tuple(asdict(geometry_of(module, name)).values()))
        geometry = {"num_modules": len(names), "sizes": [list(size) for size in sorted(sizes)]}
        if peft_config.geometry is not None and peft_config.geometry != geometry:
            raise ValueError(
                f"the adapter was made for a model with {describe(peft_config.geometry)}, this one has "
                f"{describe(geometry)}"
            )
        peft_config.geometry = geometry

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, **_: Any
    ) -> None:
        check_routes(target, current_key)
        layer = getattr(target, CHILD, None)
        if layer is None:
            layer = NTKAttentionLayer(target, geometry_of(target, current_key))
            layer.set_adapter(self.active_adapters)
            attach(target, layer)
        layer.add_adapter(adapter_name, peft_config)

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
    sizes = ", ".join(f"{h} heads, {kv} KV heads, head_dim {d}, value dim {v}" for h, kv, d, v in geometry["sizes"])
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
