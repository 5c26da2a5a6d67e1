"""What vLLM calls in each of its processes: from here on its LoRA manager knows our adapters, too.

Two hooks. After a LoRA manager is made, its model's attention layers get places for states; before it loads an adapter,
a folder of ours is recognised. Everything else of adapters is vLLM's own: names over HTTP, which of them are in memory,
which request has which, and the keys of the prefix cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from ..tuner.registration import NAME

MARK = "ntk_attention_hook"
Method = Callable[..., Any]


def register() -> None:
    """Set the hooks, once; vLLM may call this many times."""
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.worker_manager import WorkerLoRAManager

    hook(LoRAModelManager, "__init__", with_places)
    hook(WorkerLoRAManager, "_load_adapter", with_our_adapters)


def hook(cls: type, name: str, wrap: Callable[[Method], Method]) -> None:
    """Put a function around a method of a class of vLLM, unless ours is there already."""
    original = getattr(cls, name)
    if not hasattr(original, MARK):
        wrapped = wrap(original)
        setattr(wrapped, MARK, True)
        setattr(cls, name, wrapped)


def with_places(original: Method) -> Method:
    """`LoRAModelManager.__init__`, and then places for states in the layers of its model."""
    signature = inspect.signature(original)

    @wraps(original)
    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        from .engine import Engine

        original(self, *args, **kwargs)
        vllm_config = signature.bind(self, *args, **kwargs).arguments["vllm_config"]
        self.ntk_attention = Engine(self, vllm_config)

    return made


def with_our_adapters(original: Method) -> Method:
    """`WorkerLoRAManager._load_adapter`, for folders of ours as well."""

    @wraps(original)
    def load(self: Any, lora_request: Any) -> Any:
        from .folder import local_folder, method_of

        method = method_of(local_folder(lora_request.lora_path))
        if method == NAME:
            return self._adapter_manager.ntk_attention.load(lora_request)
        if method == "PREFIX_TUNING":
            raise ValueError(
                f"{lora_request.lora_path} holds the tokens of a prefix, which vLLM cannot serve: expected an adapter "
                f"of {NAME} or LoRA"
            )
        return original(self, lora_request)

    return load
