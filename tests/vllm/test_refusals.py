"""What cannot be served is refused with a sentence that names it, and the engine goes on."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.rotary_embedding import MRotaryEmbedding
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

from ntk_attention import AdapterError
from ntk_attention.vllm.engine import Engine
from ntk_attention.vllm.survey import reason_against, refused_engine, rotary_of, sites_of

from .serve import OPTIONS
from .subject import make_model, save_adapter, save_lora


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(model: Path) -> LLM:
    return LLM(model=str(model), **{**OPTIONS, "max_lora_rank": 8})


@pytest.fixture(scope="module")
def manager(llm: LLM) -> Any:
    """vLLM's LoRA manager in the engine."""
    return llm.collective_rpc(lambda worker: worker.model_runner.lora_manager._adapter_manager)[0]


@pytest.fixture
def attention(manager: Any) -> Iterator[Attention]:
    """An attention layer of the engine, which a test may change."""
    layer = manager.model.model.layers[0].self_attn.attn
    kept, impl = dict(vars(layer)), layer.impl
    changed = object.__new__(type(impl).__mro__[2])  # as vLLM has made it
    vars(changed).update(vars(impl))
    layer.impl = changed
    yield layer
    vars(layer).clear()
    vars(layer).update(kept)


def load(llm: LLM, path: Path | str, name: str = "adapter", **options: Any) -> None:
    load.count = getattr(load, "count", 0) + 1  # type: ignore[attr-defined]
    llm.llm_engine.add_lora(LoRARequest(name, load.count, str(path), **options))  # type: ignore[attr-defined]


# --- engines and layers, by vLLM's own objects that are changed ---


def test_a_plain_layer_is_not_refused(attention: Attention) -> None:
    assert reason_against(attention) is None


LAYERS: dict[str, tuple[Callable[[Any], None], str]] = {
    "backend": (lambda x: setattr(x, "impl", object.__new__(TritonAttentionImpl)), "backend is CPU_ATTN, expected"),
    "encoder": (lambda x: setattr(x, "attn_type", AttentionType.ENCODER_ONLY), "encoder_only attention, expected"),
    "sinks": (lambda x: setattr(x.impl, "sinks", torch.zeros(4)), "has sinks, expected none"),
    "cache": (lambda x: setattr(x.impl, "kv_cache_dtype", "fp8"), "KV cache is in fp8, expected auto"),
    "queries": (lambda x: setattr(x, "query_quant", torch.nn.Identity()), "queries are quantised"),
    "alibi": (lambda x: setattr(x.impl, "alibi_slopes", torch.ones(4)), "has ALiBi slopes"),
    "shared cache": (lambda x: setattr(x, "kv_sharing_target_layer_name", "0"), "the KV cache of another layer"),
    "pictures": (lambda x: setattr(x, "use_mm_prefix", True), "tokens of pictures see later ones"),
    "context parallel": (lambda x: setattr(x.impl, "total_cp_world_size", 2), "context parallelism"),
    "value size": (lambda x: setattr(x, "head_size_v", 16), "values have another size"),
}


@pytest.mark.parametrize(("change", "message"), LAYERS.values(), ids=LAYERS)
def test_layers(attention: Attention, change: Callable[[Any], None], message: str) -> None:
    change(attention)
    assert message in str(reason_against(attention))


def test_latent_attention(manager: Any) -> None:
    layer = object.__new__(MLAAttention)
    torch.nn.Module.__init__(layer)
    model = torch.nn.ModuleDict({"attention": torch.nn.ModuleDict({"attn": layer})})
    model["attention"].forward = None
    (site,) = sites_of(model).values()
    assert site.refused == "it is a MLAAttention, expected plain attention"


ENGINES: dict[str, tuple[str, str, Any, str]] = {
    "pipeline": ("parallel_config", "pipeline_parallel_size", 2, "pipeline_parallel_size is 2, expected 1"),
    "parts": ("parallel_config", "use_ubatching", True, "enable_dbo"),
    "cascade": ("model_config", "disable_cascade_attn", False, "cascade attention is on"),
}


@pytest.mark.parametrize(("part", "name", "value", "message"), ENGINES.values(), ids=ENGINES)
def test_engines(manager: Any, part: str, name: str, value: Any, message: str) -> None:
    """Of vLLM's config only what is read."""
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, use_ubatching=False),
        model_config=SimpleNamespace(disable_cascade_attn=True),
    )
    assert refused_engine(manager.model, config) is None
    setattr(getattr(config, part), name, value)
    assert message in str(refused_engine(manager.model, config))


def test_models_of_pictures(manager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parallel = SimpleNamespace(pipeline_parallel_size=1, use_ubatching=False)
    config = SimpleNamespace(parallel_config=parallel, model_config=SimpleNamespace(disable_cascade_attn=True))
    monkeypatch.setattr(manager.model, "supports_multimodal", True, raising=False)
    assert refused_engine(manager.model, config) == "LlamaForCausalLM takes pictures or sound, expected a model of text"


def test_an_engine_that_is_refused_says_so_when_an_adapter_comes(
    llm: LLM, manager: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_adapter(model, tmp_path / "a", 0, feed_forward_rank=None)
    monkeypatch.setattr(manager.ntk_attention, "refused", "pipeline_parallel_size is 2, expected 1")
    with pytest.raises(AdapterError, match="cannot be served by this engine: pipeline_parallel_size is 2, expected 1"):
        load(llm, path)


def test_an_engine_whose_model_is_not_understood_goes_on(
    llm: LLM, manager: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plugin is a guest: LoRA must go on where transformers cannot make the model, say."""

    def fail(config: Any) -> Any:
        raise KeyError("no such model")

    monkeypatch.setattr("ntk_attention.vllm.engine.outline", fail)
    config = SimpleNamespace(
        cache_config=SimpleNamespace(enable_prefix_caching=True),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, use_ubatching=False),
        model_config=SimpleNamespace(disable_cascade_attn=True, hf_config=None),
    )
    made = Engine(manager, config)
    with pytest.raises(AdapterError, match="its model is not understood: KeyError: 'no such model'"):
        made.load(LoRARequest("a", 1, str(tmp_path)))


def test_a_layer_that_is_refused_says_so_when_an_adapter_comes(
    llm: LLM, manager: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the whole adapter, or of one that sees queries without positions only."""
    free = save_adapter(model, tmp_path / "free", 0, feed_forward_rank=None)
    rotary = save_adapter(model, tmp_path / "rotary", 0, feed_forward_rank=None, positions="rotary")
    name = "model.layers.1.self_attn"
    sites = manager.ntk_attention.sites
    monkeypatch.setitem(sites, name, replace(sites[name], refused_free="something rotates them"))
    load(llm, rotary, "rotary")
    with pytest.raises(AdapterError, match=rf"{name} cannot be served: something rotates them"):
        load(llm, free, "free")
    monkeypatch.setitem(sites, name, replace(sites[name], refused="it has sinks, expected none"))
    with pytest.raises(AdapterError, match=rf"{name} cannot be served: it has sinks"):
        load(llm, rotary, "again")
    monkeypatch.delitem(sites, name)
    with pytest.raises(AdapterError, match=rf"a state for {name}, where vLLM's LlamaForCausalLM has no attention"):
        load(llm, rotary, "missing")


def test_rotations(manager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries that are changed after they were rotated, and rotations that are not plain."""
    module = manager.model.model.layers[0].self_attn
    assert rotary_of(module) is module.rotary_emb

    class Changed(torch.nn.Module):
        def forward(self, positions: Any, q: Any, k: Any, v: Any) -> Any:
            q, k = self.rotary_emb(positions, q, k)
            q = self.norm(q)
            attn_output = self.attn(q, k, v)
            return attn_output

    with pytest.raises(ValueError, match="Changed does not give its queries to attention as rotary_emb made them"):
        rotary_of(Changed())
    several = object.__new__(MRotaryEmbedding)
    torch.nn.Module.__init__(several)
    monkeypatch.setitem(module._modules, "rotary_emb", several)
    with pytest.raises(ValueError, match="its rotary embedding is a MRotaryEmbedding"):
        rotary_of(module)


# --- adapters, loaded into an engine ---


ADAPTERS: dict[str, tuple[dict[str, Any], str]] = {
    "taylor": ({"feature_map": "taylor"}, "feature_map is 'taylor', vLLM can serve 'elu'"),
    "random": ({"feature_map": "positive_random"}, "feature_map is 'positive_random', vLLM can serve 'elu'"),
    "heads": ({"modules_to_save": ["lm_head"]}, "modules_to_save holds 'lm_head', expected none"),
    "rank": ({"feed_forward_rank": 9}, "feed_forward_rank is 9, this engine has places for 8: start it with a larger"),
}


@pytest.mark.parametrize(("options", "message"), ADAPTERS.values(), ids=ADAPTERS)
def test_adapters(llm: LLM, model: Path, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = save_adapter(model, tmp_path / "a", 0, **{"feed_forward_rank": None} | options)
    with pytest.raises(AdapterError, match=message):
        load(llm, path)


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"num_hidden_layers": 2}, "2 attention modules .* this one has 3"),
    "heads": ({"num_attention_heads": 2}, "2 heads, 2 KV heads"),
    "head_dim": ({"head_dim": 64}, "head_dim 64"),
}


@pytest.mark.parametrize(("sizes", "message"), OTHERS.values(), ids=OTHERS)
def test_adapters_of_other_models(llm: LLM, sizes: dict[str, Any], message: str, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", **sizes)
    path = save_adapter(other, tmp_path / "a", 0, feed_forward_rank=None)
    with pytest.raises(AdapterError, match=message):
        load(llm, path)


def broken_weights(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def no_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def unknown_field(folder: Path) -> None:
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"surprise": 1}))


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights": (broken_weights, "adapter_model.safetensors is damaged"),
    "no weights": (no_weights, "has no adapter_model.safetensors"),
    "field": (unknown_field, "unknown fields 'surprise'"),
}


@pytest.mark.parametrize(("break_it", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_folders(llm: LLM, model: Path, break_it: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    path = save_adapter(model, tmp_path / "a", 0, feed_forward_rank=None)
    break_it(path)
    with pytest.raises(AdapterError, match=message):
        load(llm, path)


def test_tokens_of_a_prefix(llm: LLM, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "PREFIX_TUNING"}))
    with pytest.raises(ValueError, match="holds the tokens of a prefix, which vLLM cannot serve"):
        load(llm, tmp_path)


def test_a_block_that_vllm_lacks(llm: LLM, manager: Any, model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    path = save_adapter(model, tmp_path / "a", 0, feed_forward_rank=4, feed_forward="beside")
    monkeypatch.delitem(manager.ntk_attention.blocks, "model.layers.2.self_attn")
    with pytest.raises(AdapterError, match=r"the feed-forward block model\.layers\.2\.mlp cannot be served"):
        load(llm, path)


def test_a_layer_that_has_no_lora(llm: LLM, manager: Any, model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    path = save_adapter(model, tmp_path / "a", 0, feed_forward_rank=4)
    monkeypatch.delitem(manager.modules, "model.layers.2.mlp.down_proj")
    with pytest.raises(AdapterError, match=r"layers\.2\.mlp\.down_proj cannot be served: .* has no LoRA in a layer of"):
        load(llm, path)


def test_a_block_of_another_form(llm: LLM, manager: Any, model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """What gives more than a tensor is left alone, and remembered."""
    path = save_adapter(model, tmp_path / "a", 0, feed_forward_rank=4, feed_forward="beside")
    factors = manager.ntk_attention.blocks["model.layers.1.self_attn"]
    monkeypatch.setattr(factors, "refused", None)
    block, x = torch.nn.Identity(), torch.randn(2, 128)
    given = (x, None)
    assert factors.after_block(block, (x,), {}, given) is given
    with pytest.raises(
        AdapterError, match=r"layers\.1\.mlp cannot be served: Identity does not give one tensor for one"
    ):
        load(llm, path)


def test_changed_weights_under_one_name(llm: LLM, model: Path, tmp_path: Path) -> None:
    """The prefix cache knows adapters by name and folder: it would answer with the keys of the first."""
    path = save_adapter(model, tmp_path / "a", 1, feed_forward_rank=None)
    load(llm, path, "a")
    load(llm, path, "a", load_inplace=True)
    shutil.rmtree(path)
    save_adapter(model, path, 2, feed_forward_rank=None)
    with pytest.raises(AdapterError, match="other weights than when it was loaded as 'a' before"):
        load(llm, path, "a", load_inplace=True)
    load(llm, path, "b")
    load(llm, shutil.copytree(path, tmp_path / "new"), "a")


def test_the_engine_goes_on(llm: LLM, model: Path, tmp_path: Path) -> None:
    """After all this; with LoRA, whose folders are vLLM's own affair."""
    lora = LoRARequest("lora", 1000, str(save_lora(model, tmp_path / "lora", 0)))
    (output,) = llm.generate(
        [{"prompt_token_ids": [1, 2, 3]}],
        SamplingParams(max_tokens=4, detokenize=False),
        lora_request=lora,
        use_tqdm=False,
    )
    assert len(output.outputs[0].token_ids) == 4


def test_hooks_are_set_once() -> None:
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.worker_manager import WorkerLoRAManager

    from ntk_attention.vllm.plugin import register

    register()
    before = LoRAModelManager.__init__, WorkerLoRAManager._load_adapter
    register()
    assert (LoRAModelManager.__init__, WorkerLoRAManager._load_adapter) == before
    assert Engine.__module__ == "ntk_attention.vllm.engine"
