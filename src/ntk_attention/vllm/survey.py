"""Where prefixes can go in a model of vLLM, and where not, and why."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.model_executor.models import supports_multimodal
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backend import AttentionType

from ..ops.triton import support

BACKENDS = {  # what stands for an attention implementation of vLLM, by its module and name
    ("vllm.v1.attention.backends.cpu_attn", "CPUAttentionBackendImpl"): "CPU_ATTN",
    ("vllm.v1.attention.backends.flash_attn", "FlashAttentionImpl"): "FLASH_ATTN",
}
# The method of a module that rotates its queries and gives them to attention as they are. Granite's rotates them if it
# was told to; Mistral's multiplies them in between if it was told to.
ROTATES_LAST = re.compile(
    r"^(    if self\.(?P<only>\w+):\n    )?    q, k = self\.rotary_emb\(\w+, q, k\)\n"
    r"(    if self\.(?P<unless>do_llama_4_scaling):\n(        .*\n)+)?"
    r"    \w+ = self\.attn\(q, k, v\)$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Site:
    """One attention module of a model.

    Args:
        attention: vLLM's layer in it.
        rotary: what rotates its queries, where phi can see them without; None where nothing rotates them.
        refused: why it can have no prefix, a sentence's end; None if it can.
        refused_free: likewise, why it can have none that sees queries without positions.
    """

    attention: Attention | MLAAttention
    rotary: RotaryEmbedding | None
    refused: str | None
    refused_free: str | None


def sites_of(model: nn.Module) -> dict[str, Site]:
    """The attention modules of a model, by the names that transformers has for them."""
    sites = {}
    for name, module in model.named_modules():
        if isinstance(module, Attention | MLAAttention):
            own = name.rpartition(".")[0]
            try:
                rotary, refused_free = rotary_of(model.get_submodule(own)), None
            except ValueError as error:
                rotary, refused_free = None, str(error)
            sites[own] = Site(module, rotary, reason_against(module), refused_free)
    return sites


def refused_engine(model: nn.Module, config: Any) -> str | None:
    """Why no layer of an engine can have a prefix, a sentence's end; None if some can."""
    parallel = config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        return f"pipeline_parallel_size is {parallel.pipeline_parallel_size}, expected 1"
    if parallel.use_ubatching:
        return "batches are computed in parts (enable_dbo), expected whole ones"
    if not config.model_config.disable_cascade_attn:
        return "cascade attention is on, expected disable_cascade_attn"
    if supports_multimodal(model):
        return f"{type(model).__name__} takes pictures or sound, expected a model of text"
    return None


def reason_against(attention: Any) -> str | None:
    """Why a layer of vLLM can have no prefix, a sentence's end; None if it can."""
    if type(attention) is not Attention:
        return f"it is a {type(attention).__name__}, expected plain attention"
    impl = attention.impl
    if attention.attn_type != AttentionType.DECODER:
        return f"it is {AttentionType(attention.attn_type).value} attention, expected that of a decoder"
    if backend_of(impl) is None:
        expected = " or ".join(BACKENDS.values())
        return f"its attention backend is {attention.attn_backend.get_name()}, expected {expected}"
    checks: list[tuple[Callable[[], Any], str]] = [
        (lambda: getattr(impl, "sinks", None) is not None, "it has sinks, expected none"),
        (
            lambda: is_quantized_kv_cache(impl.kv_cache_dtype),
            f"its KV cache is in {impl.kv_cache_dtype}, expected auto",
        ),
        (lambda: attention.query_quant is not None, "its queries are quantised, expected the model's dtype"),
        (lambda: impl.alibi_slopes is not None, "it has ALiBi slopes, expected none"),
        (lambda: attention.kv_sharing_target_layer_name is not None, "it has the KV cache of another layer"),
        (lambda: attention.use_mm_prefix, "tokens of pictures see later ones, expected causal attention"),
        (lambda: impl.total_cp_world_size > 1, "context parallelism spreads its keys over processes"),
        (lambda: attention.head_size_v != attention.head_size, "its values have another size than its keys"),
    ]
    found = next((reason for holds, reason in checks if holds()), None)
    return found or kernel_against(attention)


def kernel_against(attention: Attention) -> str | None:
    """Why no kernel merges a prefix there; on a CPU it needs none."""
    if backend_of(attention.impl) == "CPU_ATTN":
        return None
    device, d = next(attention.buffers()).device, attention.head_size
    if support.covers(device, attention.dtype, d, d):
        return None
    return f"there is no kernel for heads of {d} numbers in {attention.dtype} on {device.type}"


def backend_of(impl: Any) -> str | None:
    """The name of an attention implementation that a prefix can be merged into; None for others."""
    return BACKENDS.get((type(impl).__module__, type(impl).__qualname__))


def rotary_of(module: nn.Module) -> RotaryEmbedding | None:
    """What rotates the queries of an attention module; None where nothing does.

    Raises:
        ValueError: if something does that cannot be undone, or that is not understood; a sentence's end.
    """
    source = textwrap.dedent(inspect.getsource(type(module).forward))
    if not re.search(r"rot|rope", source, re.IGNORECASE):
        return None
    found = ROTATES_LAST.search(source)
    if found is None or (found["unless"] and getattr(module, found["unless"])):
        raise ValueError(f"{type(module).__name__} does not give its queries to attention as rotary_emb made them")
    if found["only"] and not getattr(module, found["only"]):
        return None
    embedding = module.rotary_emb
    methods = ("forward_native", "forward_cpu", "forward_cuda")
    is_plain = isinstance(embedding, RotaryEmbedding) and all(
        getattr(type(embedding), name) is getattr(RotaryEmbedding, name) for name in methods
    )
    if not is_plain:
        raise ValueError(f"its rotary embedding is a {type(embedding).__name__}, which is not known how to undo")
    return embedding
