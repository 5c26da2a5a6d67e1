"""The command line on a tiny model: what a user sees, and one line with exit code 2 for bad input."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from ntk_attention.cli import models
from ntk_attention.cli.main import app, console

FINETUNE = ["--items", "60", "--held-out", "6", "--batch-size", "8", "--max-new-tokens", "4"]


def invoke(*arguments):
    console.width = 200
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "letters.jsonl"
    lines = [{"prompt": f"{a}{b}", "completion": a} for a in "abcdef" for b in "0123456789"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def finetuned(model_folder, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    return invoke("finetune", folder, "--model", model_folder, "--data", data, *FINETUNE), folder


def test_finetune(finetuned):
    result, folder = finetuned
    assert result.exit_code == 0, result.output
    for text in (
        "held-out items before",
        "calibrate",
        "fine-tune",
        "exact match",
        "trained 784 parameters",
        "saved to",
    ):
        assert text in result.output
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_evaluate(finetuned, data):
    result = invoke("evaluate", finetuned[1], "--data", data, "--items", 6, "--max-new-tokens", 4)
    assert result.exit_code == 0, result.output
    assert "base" in result.output
    assert "adapter" in result.output
    record = json.loads((finetuned[1] / "finetune.json").read_text())
    assert record["after"]["loss"] < record["before"]["loss"]


def test_generate(finetuned):
    result = invoke("generate", finetuned[1], "a7", "--max-new-tokens", 4)
    assert result.exit_code == 0, result.output
    assert "base model:" in result.output
    assert "with adapter:" in result.output


def test_info(finetuned, tmp_path):
    picture = tmp_path / "shares.png"
    result = invoke("info", finetuned[1], "--text", "some words to look at", "--picture", picture)
    assert result.exit_code == 0, result.output
    for text in ("attention modules", "784", "as many numbers has 12 tokens", "of the attention, from"):
        assert text in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def broken(kind, finetuned, tmp_path, model_folder):
    """A copy of the adapter that something is wrong with, and the options that go with it."""
    folder = tmp_path / "adapter"
    if kind == "missing":
        return folder
    shutil.copytree(finetuned[1], folder)
    weights = folder / "adapter_model.safetensors"
    if kind == "no weights":
        weights.unlink()
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-50])
    elif kind == "nan":
        tensors = load_file(weights)
        save_file({n: x * float("nan") if n.endswith(".Z_A") else x for n, x in tensors.items()}, weights)
    elif kind == "lora":
        base = AutoModelForCausalLM.from_pretrained(model_folder)
        get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
    elif kind == "no json":
        (folder / "adapter_config.json").write_text("{")
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "has no adapter_config.json: expected the folder of a saved adapter"),
        ("no weights", "has no adapter_model.safetensors"),
        ("truncated", "adapter_model.safetensors is damaged"),
        ("nan", "holds NaN or infinite values"),
        ("lora", "peft_type is 'LORA', expected 'NTK_ATTENTION'"),
        ("no json", "adapter_config.json is not JSON"),
    ],
)
def test_bad_adapters(kind, message, finetuned, tmp_path, model_folder):
    expect_refusal(invoke("info", broken(kind, finetuned, tmp_path, model_folder)), message)


def test_another_base_is_refused(finetuned, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(finetuned[1] / name, tmp_path)
    expect_refusal(
        invoke("info", finetuned[1], "--model", tmp_path), "the adapter was made for a model with 2 attention"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nothing.jsonl"], "no data at 'nothing.jsonl'"),
        (["--items", "-5"], "items must be positive and finite, got -5"),
        (["--learning-rate", "nan"], "learning_rate must be positive and finite, got nan"),
        (["--seed", "-1"], "seed must be a whole number from 0 to 2^32 - 1, got -1"),
        (["--max-new-tokens", "127"], "a prompt of 2 tokens and an answer of max_new_tokens = 127"),
        (["--feature-map", "cosine"], "unknown feature map 'cosine'"),
        (["--state-heads", "both"], "state_heads must be 'query' or 'kv', got 'both'"),
        (["--positions", "none"], "positions must be 'free' or 'rotary', got 'none'"),
        (["--rank", "0"], "rank must be a positive integer"),
        (["--model", "./nowhere"], "./nowhere is not a folder"),
    ],
    ids=lambda x: str(x),
)
def test_bad_finetune(arguments, message, model_folder, data, tmp_path):
    options = ["--model", model_folder, "--data", data, *FINETUNE, *arguments]
    expect_refusal(invoke("finetune", tmp_path / "out", *options), message)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def no_weights(finetuned, monkeypatch):
    """From here on no model can be loaded."""

    def fail(*args, **kwargs):
        raise AssertionError("weights were loaded")

    for auto in (AutoModelForCausalLM, PeftModel):
        monkeypatch.setattr(auto, "from_pretrained", fail)


@pytest.mark.parametrize("arguments", [["generate", "x", " "], ["info", "x", "--text", ""]], ids=lambda x: x[0])
def test_empty_text(arguments, no_weights):
    expect_refusal(invoke(*arguments), "is empty")


FILES = {
    "missing.jsonl": (None, "no data at"),
    "empty.jsonl": ("", "is empty"),
    "broken.jsonl": ('{"prompt": ', "line 1: not JSON"),
    "fields.jsonl": ('{"question": "a", "answer": "b"}', "line 1: the fields question, answer are no format"),
    "table.xls": ("prompt,completion", "expected a file that ends in one of .jsonl, .json, .csv,"),
    "bytes.txt": (b"\xff\xfe", "is not UTF-8 text"),
    "folder.jsonl": ("folder", "has no files to train on"),
    "long.jsonl": (
        "\n".join(json.dumps({"prompt": f"{'a' * 200}{i}", "completion": "b"}) for i in range(12)),
        "the model takes 128",
    ),
}


@pytest.fixture(params=FILES)
def bad_file(request, tmp_path):
    path = tmp_path / request.param
    content, message = FILES[request.param]
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path, message


def test_data_are_checked_before_a_model_is_loaded(bad_file, finetuned, model_folder, no_weights, tmp_path):
    path, message = bad_file
    out = tmp_path / "out"
    expect_refusal(invoke("finetune", out, "--model", model_folder, "--data", path), message)
    expect_refusal(invoke("evaluate", finetuned[1], "--data", path, "--items", 5), message)
    (tmp_path / "text").write_text("some text")
    options = ["--model", model_folder, "--text", tmp_path / "text", "--rows", 4, "--batch-size", 2]
    expect_refusal(invoke("compress", out, *options, "--calibration", path), message)
    assert not out.exists()


def test_files_are_checked_before_the_embedded_model_is_made(bad_file, tmp_path, monkeypatch):
    path, message = bad_file
    if path.name.startswith("long"):
        pytest.skip("that needs its tokenizer")
    monkeypatch.setattr(models, "embedded_folder", lambda: pytest.fail("the model was made"))
    expect_refusal(invoke("finetune", tmp_path / "out", "--data", path), message)


def test_folders_are_checked_before_a_model_is_loaded(finetuned, model_folder, data, no_weights, tmp_path):
    (tmp_path / "text").write_text("some text")
    options = ["--model", model_folder]
    for folder, message in ((tmp_path, "not empty and not a run"), (tmp_path / "text", "is a file")):
        expect_refusal(invoke("finetune", folder, *options, "--data", data), message)
        expect_refusal(invoke("compress", folder, *options, "--text", tmp_path / "text"), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "a" * 100, "--max-new-tokens", "48"], "and an answer of max_new_tokens = 48 are more"),
        (["generate", "a" * 128], "a prompt of 128 tokens and an answer are more than the model takes, 128"),
        (["generate", "a", "--temperature", "-1"], "temperature must be finite and not negative, got -1"),
        (["generate", "a", "--top-p", "0.5"], "top_p is for sampling: give a temperature above 0 with it"),
        (["generate", "a", "--system", "b"], "the model has no chat template"),
        (["generate"], "has no chat template, so it holds no conversation: give a prompt"),
        (["generate", "a", "--max-new-tokens", "0"], "max_new_tokens must be positive, got 0"),
        (["info", "--text", "a" * 200], "--text has 200 tokens, the model takes 1 to 128"),
        (["evaluate", "--items", "0"], "expected a positive number of items, got 0"),
        (["evaluate", "--max-new-tokens", "-1"], "max_new_tokens must be positive, got -1"),
    ],
    ids=lambda x: " ".join(x)[:30] if isinstance(x, list) else None,
)
def test_calls_are_checked_before_a_model_is_loaded(arguments, message, finetuned, data, no_weights):
    options = ["--data", data] if arguments[0] == "evaluate" else []
    expect_refusal(invoke(arguments[0], finetuned[1], *arguments[1:], *options), message)


def test_tables_name_what_counts(finetuned, data, model_folder, tmp_path):
    """A number for an embedded task, the text for a file, nothing for a plain text."""
    options = ["--items", 8, "--held-out", 4, "--batch-size", 8, "--max-new-tokens", 4]
    result = invoke("finetune", tmp_path / "out", "--model", model_folder, "--data", "chain-sum", *options)
    assert result.exit_code == 0, result.output
    assert "final number" in result.output
    assert "exact match" not in result.output
    record = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert record["before"].keys() == record["after"].keys() == {"loss", "final_number"}
    text = data.with_name("text.txt")
    text.write_text("some words")
    for source, shown in (("chain-sum", "final number"), (data, "exact match"), (text, None)):
        result = invoke("evaluate", finetuned[1], "--data", source, "--items", 4, "--max-new-tokens", 4)
        assert result.exit_code == 0, result.output
        assert [name for name in ("final number", "exact match") if name in result.output] == [shown] * bool(shown)


def expect_refusal(result, message):
    assert result.exit_code == 2, result.output
    error = [line for line in result.output.splitlines() if line.startswith("error:")]
    assert len(error) == 1
    assert message in error[0]
    assert "Traceback" not in result.output
