"""Adapters through vLLM's HTTP server: by name, loaded and unloaded while it runs."""

import shutil
from pathlib import Path

import pytest

from .server import serving
from .subject import KINDS, expected_tokens, make_model, prompts, save_adapter, save_lora

LENGTH = 16


def test_tiny_model(tmp_path: Path) -> None:
    """Two adapters from the start, others later; a broken folder and a name that is gone are errors of their own."""
    model = make_model(tmp_path / "model")
    adapters = {"default": save_adapter(model, tmp_path / "default", 1)}
    adapters["published"] = save_adapter(model, tmp_path / "published", 2, **KINDS["published"])
    later = {"late": save_adapter(model, tmp_path / "late", 3), "lora": save_lora(model, tmp_path / "lora", 4)}
    names = [None, *adapters, *later]
    requests = [(names[i % len(names)], text) for i, text in enumerate(prompts(60, shared=40))]
    expected = expected_tokens(model, adapters | later, requests, LENGTH)
    broken = Path(shutil.copytree(adapters["default"], tmp_path / "broken"))
    (broken / "adapter_model.safetensors").write_bytes(b"no such file")
    with serving(model, adapters, tmp_path) as server:
        for name, path in later.items():
            assert server.load(name, path)[0] == 200
        status, answer = server.load("broken", broken)
        assert status >= 400
        assert "is damaged" in answer  # the server shows no paths to clients; they are in its log
        assert f"{broken}/adapter_model.safetensors is damaged" in server.log.read_text()
        assert server.complete_all(requests, LENGTH, 16) == expected
        assert server.metric("vllm:prefix_cache_hits_total") > 0
        assert server.unload("late")[0] == 200
        assert server.post("/v1/completions", server.request("late", [1, 2, 3], 4))[0] == 404
        # Other weights by the old name come from a new folder.
        replaced = save_adapter(model, tmp_path / "late2", 5)
        assert server.load("late", replaced)[0] == 200
        own = [(name, text) for name, text in requests if name in ("late", None)]
        expected = expected_tokens(model, {"late": replaced}, own, LENGTH)
        assert server.complete_all(own, LENGTH, 8) == expected


def test_an_adapter_that_cannot_be_served_stops_the_start(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    adapter = save_adapter(model, tmp_path / "a", 1, feature_map="taylor", feed_forward_rank=None)
    with (
        pytest.raises(RuntimeError, match="feature_map is 'taylor', vLLM can serve 'elu'"),
        serving(model, {"a": adapter}, tmp_path),
    ):
        pass


def test_quantised_cache(tmp_path: Path) -> None:
    """A KV cache in float8, by its flag."""
    model = make_model(tmp_path / "model")
    adapter = save_adapter(model, tmp_path / "a", 1)
    with (
        pytest.raises(RuntimeError, match="KV cache is in fp8, expected auto"),
        serving(model, {"a": adapter}, tmp_path, **{"kv-cache-dtype": "fp8"}),
    ):
        pass


@pytest.mark.slow
def test_smollm2(tmp_path: Path) -> None:
    """The embedded model, 200 requests: itself, eight adapters of ours and two of LoRA."""
    from ntk_attention.cli.models import embedded_folder, load_tokenizer

    model = embedded_folder()
    kinds = [*KINDS.values(), {}, {}]
    adapters = {f"ours{i}": save_adapter(model, tmp_path / f"ours{i}", i, 0.3, **kind) for i, kind in enumerate(kinds)}
    adapters |= {f"lora{i}": save_lora(model, tmp_path / f"lora{i}", i) for i in range(2)}
    tokenizer = load_tokenizer(str(model))
    names = [None, *adapters]
    start = "You are given a short question. Answer it with one sentence, and think about it before you do. " * 2
    texts = [f"{start}What is {i} + {3 * i}, and why is {i * i} a number that Anna likes?" for i in range(200)]
    requests = [(names[i % len(names)], tokenizer(text).input_ids) for i, text in enumerate(texts)]
    expected = expected_tokens(model, adapters, requests, LENGTH)
    with serving(model, adapters, tmp_path, **{"max-loras": 11}) as server:
        found = server.complete_all(requests, LENGTH, 32)
        hits = server.metric("vllm:prefix_cache_hits_total") / server.metric("vllm:prefix_cache_queries_total")
    same = sum(own == other for own, other in zip(found, expected, strict=True))
    assert same == len(requests), f"{same} of {len(requests)} answers are the same"
    assert hits > 0.2
