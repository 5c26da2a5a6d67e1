"""The paper's own tasks, on small local files with the columns of the real ones."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, ViTConfig, ViTModel
from typer.testing import CliRunner

from research.__main__ import app
from research.experiments import assets, recipes
from research.experiments.language import as_item, encoded
from research.experiments.registry import registry
from research.experiments.runner import Worker
from research.experiments.train import Cell, unpacked
from tests.tiny import save_tokenizer

SCHEMAS = {
    "super_glue-boolq": [{"question": "is ice water", "passage": "Ice is water.", "idx": 0, "label": 1}],
    "super_glue-cb": [{"premise": "It rained.", "hypothesis": "It is wet.", "idx": 0, "label": 2}],
    "super_glue-copa": [
        {"premise": "It rained.", "choice1": "Wet.", "choice2": "Dry.", "question": "effect", "idx": 0, "label": 0}
    ],
    "super_glue-multirc": [{"paragraph": "P.", "question": "Q?", "answer": "A", "idx": {"answer": 0}, "label": 0}],
    "super_glue-rte": [{"premise": "P.", "hypothesis": "H.", "idx": 0, "label": 0}],
    "super_glue-wic": [{"word": "bank", "sentence1": "A.", "sentence2": "B.", "start1": 0, "idx": 0, "label": 1}],
    "super_glue-wsc": [
        {"text": "Ann says she won.", "span1_index": 0, "span2_index": 2, "span1_text": "Ann", "span2_text": "she",
         "idx": 0, "label": 1}
    ],
    "gsm8k-main": [{"question": "2 + 3?", "answer": "It is <<2+3=5>>5.\n#### 5"}],
    "MATH-lighteval": [
        {"problem": "Solve.", "level": "Level 1", "solution": r"So $\boxed{\frac{1}{2}}$.", "type": "Algebra"}
    ],
}  # fmt: skip
ANSWERS = {"boolq": "yes", "cb": "neutral", "copa": "1", "multirc": "no", "rte": "yes", "wic": "yes", "wsc": "yes"}


@pytest.fixture
def copies(tmp_path, monkeypatch, model_folder):
    """Local copies of data and model, where the recipes look for them."""
    monkeypatch.setenv("NTK_ASSETS", str(tmp_path / "assets"))
    assets.write_splits("python-docs", {"validation": [{"text": f"A passage, number {i}."} for i in range(64)]})
    monkeypatch.setenv("NTK_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("NTK_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    recipes.load_split.cache_clear()
    shutil.copytree(model_folder, tmp_path / "models" / recipes.LLAMA_1B.split("/")[-1])
    shutil.copytree(model_folder, tmp_path / "models" / recipes.LLAMA_3B.split("/")[-1])
    return tmp_path


def recipe_names(kind):
    return [task.name for task in recipes.RECIPES if isinstance(task, kind) and task.model != recipes.GLM]


@pytest.mark.parametrize("name", recipe_names(recipes.LanguageRecipe))
def test_language_recipes_read_the_real_columns(copies, name):
    pytest.importorskip("datasets")
    task = registry()[name]
    data = recipes.folder_name(task.data, task.config)
    (copies / "data" / data).mkdir(parents=True)
    for split in ("train", "validation", "test"):
        lines = [json.dumps(row) for row in SCHEMAS[data] * (20 if split == "train" else 3)]
        (copies / "data" / data / f"{split}.jsonl").write_text("\n".join(lines))
    task.check()
    assert [len(task.items(split)) for split in ("train", "validation", "test")] == [18, 2, 3]
    item = task.items("test")[0]
    expected = ANSWERS.get(name.removeprefix("superglue-"), {"gsm8k": "It is 5.\n#### 5"}.get(name))
    assert item["completion"] == expected or (name == "math" and item["completion"].endswith("\n#### \\frac{1}{2}"))
    assert task.judge(item["completion"], item["completion"])
    assert not task.judge("something else, 17", item["completion"])
    (copies / "data" / data / "train.jsonl").unlink()
    recipes.load_split.cache_clear()
    with pytest.raises(ValueError, match=f"put a copy into NTK_DATA/{data}/"):
        task.check()


@pytest.mark.parametrize("name", recipe_names(recipes.PictureRecipe))
def test_picture_recipes_train_on_a_local_copy(copies, name):
    """Parquet with the columns of the real data set, a tiny ViT."""
    datasets = pytest.importorskip("datasets")
    task = replace(registry()[name], steps=2, batch_size=2)
    target = copies / "models" / task.model.split("/")[-1]
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(target)
    features = datasets.Features({task.image: datasets.Image(), task.label: datasets.ClassLabel(names=["a", "b"])})
    folder = copies / "data" / task.data.split("/")[-1]
    folder.mkdir(parents=True)
    for split in ("train", task.splits.test):
        pictures = [Image.new("RGB", (20, 18), (i, 0, 0)) for i in range(20)]
        rows = {task.image: pictures, task.label: [0] * 10 + [1] * 10}  # sorted by class, as many are
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    task.check()
    splits = [task.splits.rows(task.data, task.config, split) for split in ("train", "validation")]
    assert [set(rows[task.label]) for rows in splits] == [{0, 1}, {0, 1}]
    row = Worker("cpu")(Cell(name, "ntk", 1e-3, 1, "final"), task)
    assert "error" not in row, row
    assert len(unpacked(row["test_correct"])) == 20
    assert "forgetting" not in row  # the checkpoint has no head


def test_dry_run_needs_no_network():
    done = CliRunner().invoke(app, ["dry-run", "vit-cifar100", "superglue-copa", "math"])
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    assert "NTK-Attention: 608,400 trainable of 86," in text  # 12 layers x 12 heads x 65 x (64 + 1)
    assert "Which is the effect?" in text
    assert "or a copy in NTK_DATA/super_glue-copa" in text


@pytest.mark.parametrize("adds", ["$A", "<start> $A", "<start> $A <end>"])
def test_a_start_token_is_there_once(adds, tmp_path):
    """Whether the tokenizer adds it or not, of prompts and of texts."""
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path, adds), bos_token="<start>")
    rows = [{"prompt": "1+1=", "completion": "2"}, {"text": "a text"}]
    (prompt, _), (text, _) = encoded([as_item(row, tokenizer) for row in rows], tokenizer)
    assert tokenizer.decode(prompt["input_ids"]) == "<start>1+1=\n2<end>"
    assert tokenizer.decode(text["input_ids"]) == "<start>a text"


def test_what_is_scored():
    names = {"chain-sum": "final number", "gemma-gsm-worked": "final number", "gsm8k": "final number", "perl": "loss",
             "math": "final answer", "superglue-copa": "accuracy", "vit-cifar100": "accuracy"}  # fmt: skip
    assert {name: registry()[name].metric for name in names} == names
    assert registry()["chain-sum"].judge("It is 12.", "12")


def test_boxed_answers():
    assert recipes.boxed(r"a \boxed{1} and \boxed{\frac{a}{b}}.") == r"\frac{a}{b}"
    assert recipes.boxed("no box ") == "no box"
    assert recipes.same_answer("x\n#### \\frac{1}{2}", "#### \\frac{1} {2}")
    assert not recipes.same_answer("#### 2", "#### \\frac{1}{2}")
