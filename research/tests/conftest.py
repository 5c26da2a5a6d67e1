"""Tiny models and data in the places of the real ones."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

if not torch.cuda.is_available():  # before anything imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

from research.experiments import assets, pretraining
from research.experiments.registry import registry
from research.experiments.runner import Worker
from tests.tiny import save_model

STEPS = {"chain-sum": 4, "sections-16": 4, "fashion-64": 3}  # of training, by task


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def asset_folder(tmp_path_factory, model_folder):
    """Assets of the right form with tiny models."""
    path = tmp_path_factory.mktemp("assets")
    patch = pytest.MonkeyPatch()
    patch.setenv("NTK_ASSETS", str(path))
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    patch.setattr(pretraining, "CONFIG", {**pretraining.CONFIG, **small, "patch_size": 14})
    patch.setattr(pretraining, "BATCH", 8)
    (path / "models").mkdir()
    shutil.copytree(model_folder, path / "models/smollm2-135m")
    shutil.copytree(model_folder, path / "models/minilm", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=258, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(path / "models/minilm")
    sizes = {"train": 24, "validation": 6, "test": 9}
    items = {name: [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(n)] for name, n in sizes.items()}
    texts = {name: [{"text": f"word {i} {i % 2}", "label": i % 2} for i in range(n)] for name, n in sizes.items()}
    assets.write_splits("chain-sum", items)
    assets.write_splits("sections", texts)
    assets.write_splits("python-docs", {"validation": [{"text": f"A passage, number {i}."} for i in range(64)]})
    rng = np.random.default_rng(0)
    for name in ("source", "target"):
        (path / "data" / f"fashion-{name}").mkdir()
        for split, n in sizes.items():
            pictures = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
            np.savez_compressed(
                path / "data" / f"fashion-{name}" / f"{split}.npz", images=pictures, labels=np.arange(n) % 2
            )
    pretraining.pretrain("cpu", steps=2)
    yield path
    patch.undo()


@pytest.fixture(scope="module")
def tasks(asset_folder):
    return {name: replace(registry()[name], steps=steps, batch_size=4) for name, steps in STEPS.items()}


@pytest.fixture(scope="module")
def worker():
    return Worker("cpu")
