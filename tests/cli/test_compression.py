"""`ntk-attention compress` on a tiny model: texts, caches and prefix-tuning become adapters, or are refused."""

import json

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ntk_attention.cli.compression import WORK, Settings, compress, keep, read_source
from ntk_attention.cli.evaluation import fidelity
from ntk_attention.cli.models import fast_dtype, load_tokenizer
from ntk_attention.convert import save_cache
from ntk_attention.convert.prefixes import prefix_of_cache, prefix_of_text
from tests.tiny import save_model

from .test_cli import expect_refusal, invoke

TEXT = " ".join(f"the {a}{b} of {b * 7}" for a in "abcdef" for b in range(6))  # some 500 bytes, the context has 128
SMALL = ["--rows", 16, "--length", 24, "--batch-size", 4, "--steps", 12]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def compressed(model_folder, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compressed") / "out"
    return invoke("compress", folder, "--text", text, "--model", model_folder, *SMALL), folder


def filled_cache(model, tokens=40):
    ids = torch.arange(2, 2 + tokens)
    with torch.no_grad():
        return model(input_ids=ids[None], use_cache=True).past_key_values, ids


def test_a_text(compressed):
    result, folder = compressed
    assert result.exit_code == 0, result.output
    for words in ("read the text", "write calibration text", "fit", "distill", "state, distilled", "MiB"):
        assert words in result.output
    record = json.loads((folder / "compress.json").read_text())
    assert record["prefix_tokens"] == len(TEXT)
    assert record["with_prefix"]["kl"] < 1e-6
    assert record["fitted"]["kl"] < 0.7 * record["without"]["kl"]
    assert record["distilled"]["kl"] < record["fitted"]["kl"]
    assert not (folder / WORK).exists()


def test_it_is_an_ordinary_adapter(compressed):
    result = invoke("generate", compressed[1], "the b3", "--max-new-tokens", 4)
    assert result.exit_code == 0, result.output
    assert "with adapter:" in result.output


def test_a_run_goes_on_after_the_last_stage(model_folder, text, compressed, tmp_path, monkeypatch):
    """Killed in the distillation: calibration text and fit are there, and the end is that of an unbroken run."""
    record = json.loads((compressed[1] / "compress.json").read_text())
    settings = Settings(**record["settings"])

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ntk_attention.cli.compression.distill", killed)
        with pytest.raises(KeyboardInterrupt):
            compress(settings, tmp_path / "out")
    with pytest.raises(ValueError, match="already holds a run: add --resume"):
        compress(settings, tmp_path / "out")
    for name in ("study", "fit"):
        monkeypatch.setattr(f"ntk_attention.cli.compression.{name}", killed)
    resumed = compress(settings, tmp_path / "out", resume=True)
    assert resumed["distilled"]["kl"] == pytest.approx(record["distilled"]["kl"], rel=0.05)
    assert resumed["fitted"] == json.loads((tmp_path / "out" / "compress.json").read_text())["fitted"]
    with pytest.raises(ValueError, match="is finished: nothing to resume"):
        compress(settings, tmp_path / "out", resume=True)


def test_a_cache(model_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    save_cache(tmp_path / "cache.safetensors", *filled_cache(model))
    arguments = ["--cache", tmp_path / "cache.safetensors", "--model", model_folder, *SMALL[:-1], 0]
    result = invoke("compress", tmp_path / "out", *arguments)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "compress.json").read_text())
    assert "distilled" not in record
    assert record["fitted"]["kl"] < record["without"]["kl"]
    numbers = 2 * 2 * 2 * 8 * 40  # layers, keys and values, KV heads, d, tokens
    assert record["cache_bytes"] == numbers * fast_dtype().itemsize


def test_a_prefix_tuning_adapter(model_folder, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tuned = get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM"))
    torch.nn.init.normal_(tuned.prompt_encoder["default"].embedding.weight)
    tuned.save_pretrained(tmp_path / "tuned")
    items = [json.dumps({"prompt": f"{a}{b}", "completion": a}) for a in "abcdef" for b in range(10)]
    (tmp_path / "items.jsonl").write_text("\n".join(items))
    arguments = ["--prefix-tuning", tmp_path / "tuned", "--model", model_folder, "--calibration"]
    result = invoke("compress", tmp_path / "out", *arguments, tmp_path / "items.jsonl", *SMALL)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "compress.json").read_text())
    assert record["prefix_tokens"] == 20
    assert record["distilled"]["kl"] < record["without"]["kl"]


def test_fidelity():
    """Against the formulas, with a padded row."""
    torch.manual_seed(0)
    expected, actual = torch.randn(2, 2, 5, 7).double()
    batch = {"input_ids": torch.randint(0, 7, (2, 5)), "attention_mask": torch.ones(2, 5)}
    batch["attention_mask"][1, 3:] = 0
    figures = fidelity([batch], [expected], [actual])
    e, a = (torch.cat([x[0], x[1, :3]]).log_softmax(-1) for x in (expected, actual))
    assert figures["kl"] == pytest.approx((e.exp() * (e - a)).sum(-1).mean().item(), rel=1e-5)
    assert figures["agreement"] == pytest.approx((e.argmax(-1) == a.argmax(-1)).double().mean().item())
    logs = actual.log_softmax(-1)
    nll = [-logs[i, t, batch["input_ids"][i, t + 1]] for i, n in ((0, 5), (1, 3)) for t in range(n - 1)]
    assert figures["perplexity"] == pytest.approx(torch.stack(nll).mean().exp().item(), rel=1e-5)
    assert fidelity([batch], [expected], [expected])["kl"] == pytest.approx(0.0, abs=1e-6)


def test_parts_of_a_long_text(model_folder):
    """Within the window as in one pass; beyond it in parts, of which each is what it is alone."""
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    cache, ids = filled_cache(model, 60)
    for chunked, whole in zip(prefix_of_text(model, ids, chunk_size=17), prefix_of_cache(model, cache), strict=True):
        assert torch.allclose(chunked.keys, whole.keys, atol=1e-5)
    parts = prefix_of_text(model, ids, window=30)
    last, _ = filled_cache(model, 60)
    with torch.no_grad():
        last = model(input_ids=ids[None, 30:], use_cache=True).past_key_values
    assert parts[1].keys.shape[1] == 60
    assert torch.allclose(parts[1].keys[:, 30:], prefix_of_cache(model, last)[1].keys, atol=1e-5)


def test_a_text_begins_as_the_tokenizer_begins_it(tmp_path, text):
    folder = save_model(tmp_path / "model", "<start> $A <end>")
    tokenizer = load_tokenizer(str(folder))
    document, _ = read_source(Settings(str(folder), "text", str(text)), tokenizer)
    assert document.tolist() == tokenizer(TEXT)["input_ids"][:-1]


def test_a_run_without_distillation_goes_on_after_the_fit(model_folder, text, compressed, tmp_path, monkeypatch):
    settings = Settings(**{**json.loads((compressed[1] / "compress.json").read_text())["settings"], "steps": 0})

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ntk_attention.cli.compression.keep", lambda model, folder: (keep(model, folder), killed()))
        with pytest.raises(KeyboardInterrupt):
            compress(settings, tmp_path / "out")
    fitted = load_file(tmp_path / "out" / WORK / "fitted" / "adapter_model.safetensors")
    compress(settings, tmp_path / "out", resume=True)
    resumed = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.equal(resumed[name], x) for name, x in fitted.items())


def nan_cache(path, model):
    cache, ids = filled_cache(model)
    cache.layers[1].keys[0, 0, 3, 2] = float("nan")
    save_cache(path, cache, ids)
    return ["--cache", path]


def other_cache(path, model):
    other = LlamaConfig(vocab_size=300, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    save_cache(path, *filled_cache(LlamaForCausalLM(other)))
    return ["--cache", path]


def no_cache(path, model):
    save_file({"weight": torch.zeros(2)}, path)
    return ["--cache", path]


def empty_text(path, model):
    path.write_text(" \n")
    return ["--text", path]


def no_config(path, model):
    path.mkdir()
    (path / "adapter_config.json").write_text('{"peft_type": "NOTHING"}')
    return ["--prefix-tuning", path]


def lora(path, model):
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(path)
    return ["--prefix-tuning", path]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (nan_cache, "self_attn: keys hold NaN or infinite values"),
        (other_cache, "has 2 KV heads, keys of size 8 and values of size 8; the prefix has 4, 16 and 16"),
        (no_cache, "is not a KV cache: expected tensors 0.keys, 0.values, 1.keys, ..., got weight"),
        (empty_text, "is empty: expected a text"),
        (lora, "expected a prefix-tuning or cartridge adapter, got LORA"),
        (lambda path, model: ["--text", path], "no file"),
        (no_config, "adapter_config.json cannot be read: KeyError"),
        (
            lambda path, model: ["--text", "README.md", "--learning-rate", "inf"],
            "learning_rate must be positive and fin",
        ),
        (lambda path, model: ["--text", "README.md", "--seed", -1], "seed must be a whole number from 0"),
        (lambda path, model: ["--text", "README.md", "--calibration", "a.csv"], "no data at 'a.csv'"),
        (lambda path, model: [], "expected one of --text, --cache and --prefix-tuning, got 0"),
        (lambda path, model: ["--text", "README.md", "--rows", 2], "rows must be two batches at least, got 2 rows"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_bad_input_writes_nothing(make, message, model_folder, tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    arguments = make(tmp_path / "bad", model)
    if make not in (nan_cache, other_cache):  # which only the model can tell
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    expect_refusal(invoke("compress", tmp_path / "out", "--model", model_folder, *arguments), message)
    assert not (tmp_path / "out").exists()
