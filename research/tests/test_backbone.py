"""A backbone out of an ONNX file, its probe, and a picture task on it."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from research.experiments import classification, dinov2
from research.experiments.classification import probe
from research.experiments.registry import registry
from research.experiments.train import Cell

TINY = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(dinov2, "SIZES", TINY)


def hub_name(name):
    """Of the checkpoints, which the newest transformers renames."""
    for new, old in {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"}.items():
        name = name.replace(f"attention.{new}", f"attention.{old}")
    return name.replace("attention.o_proj", "attention.output.dense")


def exported(model, path, without=()):
    """As torch exports it: matrices transposed and nameless, of position embeddings the first apart."""
    onnx = pytest.importorskip("onnx")
    from onnx import helper, numpy_helper

    arrays, nodes = [], []

    def add(name, x):
        if name not in without:
            arrays.append(numpy_helper.from_array(x.detach().contiguous().numpy(), name))

    for i, (name, x) in enumerate((hub_name(name), x) for name, x in model.state_dict().items()):
        if name == "embeddings.position_embeddings":
            add("onnx::Concat_1", x[:, :1])
            add("onnx::Reshape_2", x[:, 1:])
        elif name.startswith("encoder") and x.ndim == 2:
            add(f"onnx::MatMul_{i}", x.T)
            place = name.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.")
            nodes.append(helper.make_node("MatMul", ["x", f"onnx::MatMul_{i}"], [f"/backbone/{place}/MatMul_output_0"]))
        elif name != "embeddings.mask_token":
            add(f"backbone.{name}", x)
    nodes.append(helper.make_node("Reshape", ["onnx::Reshape_2", "shape"], ["/backbone/embeddings/Reshape_1"]))
    nodes.append(helper.make_node("Concat", ["onnx::Concat_1", "x"], ["/backbone/embeddings/Concat_6"]))
    nodes.append(helper.make_node("Concat", ["x", "y"], ["/backbone/embeddings/Concat_7"]))
    add("decoder.weight", torch.ones(2))
    onnx.save(helper.make_model(helper.make_graph(nodes, "graph", [], [], arrays)), str(path))


def test_a_backbone_comes_back(tmp_path, small):
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(**TINY)).eval()
    exported(model, tmp_path / "model.onnx")
    dinov2.save_backbone(tmp_path / "model.onnx", tmp_path / "found")
    found = Dinov2Model.from_pretrained(tmp_path / "found").eval()
    pixels = torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(found(pixels).last_hidden_state, model(pixels).last_hidden_state)


@pytest.mark.parametrize(
    ("missing", "error"), [("backbone.layernorm.bias", "missing_keys"), ("onnx::Concat_1", "Concat")]
)
def test_another_file_is_refused(tmp_path, small, missing, error):
    exported(Dinov2Model(Dinov2Config(**TINY)), tmp_path / "model.onnx", without=[missing])
    with pytest.raises(ValueError, match=error):
        dinov2.save_backbone(tmp_path / "model.onnx", tmp_path / "found")


def test_a_probe_is_logistic_regression():
    """It finds the classes, and its gradient is zero."""
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    features = 100 + 5 * torch.randn(60, 4) + 10 * torch.eye(4)[labels]
    head = probe(features, labels, decay=1e-2)
    assert (head(features).argmax(dim=1) == labels).float().mean() > 0.7
    deviation = features.std(dim=0) + 1e-6
    scaled = ((features - features.mean(dim=0)) / deviation).double()
    weight, bias = (head.weight * deviation).double(), (head.bias + head.weight @ features.mean(dim=0)).double()
    error = (scaled @ weight.T + bias).softmax(dim=1) - torch.eye(3)[labels].double()
    assert (error.T @ scaled / 60 + 2e-2 * weight).abs().max() < 1e-3


def test_cells(asset_folder, worker, monkeypatch):
    monkeypatch.setattr(classification, "PIXELS", 28)
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**{**TINY, "hidden_size": 32})).save_pretrained(asset_folder / "models/dinov2-small")
    task = replace(registry()["dino-64"], steps=3, batch_size=4)
    task.check()
    for method in ("ntk", "lora-mlp", "full"):
        row = worker(Cell("dino-64", method, 1e-3, 0, "develop"), task)
        assert "error" not in row or "no ranks give" in row["error"], row["error"]
        if "error" not in row:
            assert math.isfinite(row["forgetting"])
            assert 0 <= row["validation"]["share"] <= 1
    assert task.pixels(torch.zeros(2, 1, 28, 28, dtype=torch.uint8)).shape == (2, 3, 28, 28)
