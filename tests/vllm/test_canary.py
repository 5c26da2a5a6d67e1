"""What the plugin takes from vLLM that no version promises: names, and the arguments they are called with."""

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadata
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl, FlashAttentionMetadata

TESTED = ("0.32.0",)

# The arguments that are passed, by the name of what gets them; what has more has defaults for the rest.
CALLED: dict[str, list[str]] = {
    "vllm.lora.model_manager.LoRAModelManager.__init__": ["self", "model", "vllm_config"],
    "vllm.lora.model_manager.LoRAModelManager.register_module": ["self", "module_name", "module"],
    "vllm.lora.model_manager.LoRAModelManager._get_punica_wrapper": ["self", "module_name"],
    "vllm.lora.worker_manager.WorkerLoRAManager._load_adapter": ["self", "lora_request"],
    "vllm.lora.lora_model.LoRAModel.__init__": ["self", "lora_model_id", "rank", "loras"],
    "vllm.lora.lora_weights.LoRALayerWeights.__init__": [
        *("self", "module_name", "rank", "lora_alpha", "lora_a", "lora_b", "scaling"),
    ],
    "vllm.lora.layers.base.BaseLayerWithLoRA.set_lora": ["self", "index", "lora_a", "lora_b"],
    "vllm.lora.layers.base.BaseLayerWithLoRA.reset_lora": ["self", "index"],
    "vllm.lora.utils.get_adapter_absolute_path": ["lora_path"],
    "vllm.lora.punica_wrapper.punica_base.PunicaWrapperBase.add_lora_linear": [
        *("self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices"),
    ],
    "vllm.lora.ops.torch_ops.lora_ops.bgmv_expand": [
        "inputs",
        "lora_b_weights",
        "output_tensor",
        "lora_indices_tensor",
    ],
    "vllm.lora.ops.torch_ops.lora_ops.bgmv_expand_slice": [
        *("inputs", "lora_b_weights", "output_tensor", "lora_indices_tensor"),
    ],
    "vllm.v1.core.kv_cache_utils._gen_lora_extra_hash_keys": ["request"],
    "vllm._custom_ops.cpu_attn_reshape_and_cache": [
        *("key", "value", "key_cache", "value_cache", "slot_mapping", "isa"),
    ],
    "vllm.utils.torch_utils.is_quantized_kv_cache": ["kv_cache_dtype"],
    "vllm.model_executor.models.supports_multimodal": ["model"],
}
FORWARD = ["self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"]
MANAGER = ["model", "modules", "device", "lora_config"]


def found(path: str) -> Any:
    """What a dotted path names: a module's function, or a method of its class."""
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            thing: Any = import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            thing = getattr(thing, part)
        return thing
    raise AssertionError(f"{path} is not there")


def names(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_version() -> None:
    import vllm

    assert vllm.__version__.startswith(TESTED), "a new version: run all of tests/vllm with it, then list it"


@pytest.mark.parametrize(("path", "arguments"), CALLED.items(), ids=CALLED)
def test_arguments(path: str, arguments: list[str]) -> None:
    """In this order where they are passed by place; those of the LoRA manager are looked up by name."""
    own = names(found(path))
    assert [name for name in own if name in arguments] == arguments


@pytest.mark.parametrize("implementation", [CPUAttentionBackendImpl, FlashAttentionImpl])
def test_attention(implementation: type) -> None:
    own = names(implementation.forward)  # type: ignore[attr-defined]
    assert own[: len(FORWARD)] == FORWARD


@pytest.mark.parametrize("metadata", [CPUAttentionMetadata, FlashAttentionMetadata])
def test_metadata(metadata: type) -> None:
    """It takes attributes, and has what a step is read off."""
    fields = set(metadata.__dataclass_fields__)  # type: ignore[attr-defined]
    assert {"num_actual_tokens", "query_start_loc", "seq_lens", "block_table", "causal"} <= fields
    assert not hasattr(metadata, "__slots__")


def test_flash_function_is_looked_up_in_its_module() -> None:
    """Ours takes its place there; on a GPU machine vLLM imports it under this name."""
    from vllm.v1.attention.backends import flash_attn

    source = inspect.getsource(flash_attn)
    assert "        flash_attn_varlen_func,\n" in source
    assert "flash_attn_varlen_func(" in source


def test_punica() -> None:
    """How the slots of tokens are known, on a CPU and on a GPU."""
    from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
    from vllm.lora.punica_wrapper import punica_gpu

    wrapper = PunicaWrapperBase.__init__.__code__.co_names
    assert {"_token_lora_indices", "no_lora"} <= set(wrapper)
    assert "self._token_lora_indices[" in inspect.getsource(PunicaWrapperBase._update_base_metadata)
    assert "no_lora_flag_cpu" in LoRAKernelMeta.__dataclass_fields__
    assert "self.token_mapping_meta = LoRAKernelMeta.make(" in inspect.getsource(punica_gpu)


def test_rotary_embedding() -> None:
    with set_current_vllm_config(VllmConfig()):
        embedding = RotaryEmbedding(32, 16, 64, 10000.0, True, torch.float32)
    assert embedding.cos_sin_cache.shape == (64, 16)
    assert embedding.is_neox_style is True
    for method in ("forward_native", "forward_cpu", "forward_cuda"):
        assert callable(getattr(RotaryEmbedding, method))


def test_plugin_is_found() -> None:
    from importlib.metadata import entry_points

    (own,) = entry_points(group="vllm.general_plugins", name="ntk_attention")
    from ntk_attention.vllm.plugin import register

    assert own.load() is register
