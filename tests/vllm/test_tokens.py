"""The tokens that vLLM writes are those that transformers writes, whatever is beside them in a batch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from .serve import answers
from .subject import KINDS, expected_tokens, make_model, prompts, save_adapter, save_lora

LENGTH = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Eight of ours, two of each common kind, and two of LoRA."""
    folder = tmp_path_factory.mktemp("adapters")
    ours = {name: save_adapter(model, folder / name, seed, **kind) for seed, (name, kind) in enumerate(KINDS.items())}
    more = {f"default{seed}": save_adapter(model, folder / f"default{seed}", seed) for seed in (11, 12)}
    return ours | more | {f"lora{seed}": save_lora(model, folder / f"lora{seed}", seed) for seed in (21, 22)}


@pytest.mark.parametrize("max_loras", [4, 12])
def test_mixed_batch(model: Path, adapters: dict[str, Path], max_loras: int, tmp_path: Path) -> None:
    """Base model, ours and LoRA in one batch, in chunks, with a prefix cache; with fewer slots than adapters, too."""
    names = [None, *adapters]
    texts = prompts(200, shared=70)
    requests = [(names[i // 2 % len(names)], text) for i, text in enumerate(texts)]
    expected = expected_tokens(model, adapters, requests, LENGTH)
    found = answers(model, adapters, requests, LENGTH, tmp_path, max_loras=max_loras)
    assert [answer.tokens for answer in found] == expected
    assert sum(answer.num_cached for answer in found) > 1000  # the cache was used, by the adapter's own requests
    first = [text for text in texts[:1] for _ in names]
    alone = expected_tokens(model, adapters, list(zip(names, first, strict=True)), LENGTH)
    assert len({tuple(tokens) for tokens in alone}) == len(names)  # every adapter shows


FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},  # a bias of the queries
    "qwen3": {},  # normalised queries
    "mistral": {"sliding_window": 24},
    "gemma2": {  # scores that are capped, another scale of these, a window in every second layer
        "sliding_window": 24,
        "query_pre_attn_scalar": 24,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "glm4": {"partial_rotary_factor": 0.5, "pad_token_id": 0},  # half of a head rotated, in pairs of neighbours
    "llama": {  # scaled positions
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 256,
        }
    },
    "granite": {},  # a condition before the rotation
    "opt": {"ffn_dim": 192, "word_embed_proj_dim": 128},  # no rotary positions, and a block that is not one module
}


@pytest.mark.parametrize(("model_type", "options"), FAMILIES.items(), ids=FAMILIES)
def test_families(model_type: str, options: Mapping[str, Any], tmp_path: Path) -> None:
    """Both kinds of positions beside the base model, in every kind of model."""
    model = make_model(tmp_path / "model", model_type, **options)
    kinds = {"attention": KINDS["attention"], "published": KINDS["published"]}
    kinds |= {} if model_type == "opt" else {"default": {}}
    adapters = {
        name: save_adapter(model, tmp_path / name, seed, **kind) for seed, (name, kind) in enumerate(kinds.items())
    }
    names = [None, *adapters]
    requests = [(names[i % len(names)], text) for i, text in enumerate(prompts(16, longest=90))]
    expected = expected_tokens(model, adapters, requests, LENGTH)
    found = answers(model, adapters, requests, LENGTH, tmp_path)
    assert [answer.tokens for answer in found] == expected
