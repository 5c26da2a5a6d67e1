"""Options in a file: which count, what is refused, and that a run is made again by what it leaves."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from ntk_attention.cli import finetuning
from ntk_attention.cli.main import app, console
from ntk_attention.cli.run_folder import CONFIG, RECORD
from ntk_attention.cli.settings import Settings, from_options
from tests.cli.test_cli import expect_refusal
from tests.tiny import save_letters


def invoke(*arguments):
    console.width = 200
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def asked(monkeypatch):
    """The settings that runs were asked for; none is made."""
    found = []

    def finetune(settings, output, **options):
        found.append(settings)
        raise ValueError("no run")

    monkeypatch.setattr(finetuning, "finetune", finetune)
    return found


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_file_takes_the_place_of_options(suffix, asked, tmp_path):
    options = {"model": "m", "learning-rate": "1e-2", "batch_size": 4, "packing": True, "max_length": 9, "rank": None}
    path = tmp_path / f"config.{suffix}"
    path.write_text(json.dumps(options) if suffix == "json" else yaml.safe_dump(options))
    invoke("finetune", tmp_path / "out", "--config", path, "--batch-size", 16, "--state-heads", "kv")
    (settings,) = asked
    assert (settings.model, settings.learning_rate, settings.packing, settings.max_length) == ("m", 0.01, True, 9)
    assert (settings.batch_size, settings.seed) == (16, 0)  # the command line counts, even where it says the default
    assert settings.adapter == {"feature_map": "elu", "rank": "auto", "state_heads": "kv", "positions": "free"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.yaml cannot be read"),
        ("a: [", "config.yaml is neither YAML nor JSON"),
        ("words", "config.yaml: expected names of options with values, got str"),
        ("learning_rat: 1", "config.yaml: unknown option 'learning_rat': did you mean learning_rate?"),
        ("resume: true", "config.yaml: unknown option 'resume'"),
        ("zzz: 1", "config.yaml: unknown option 'zzz': expected some of model, data, eval_data"),
        ("items: many", "config.yaml: items cannot be 'many': "),
        ("packing: perhaps", "config.yaml: packing cannot be 'perhaps': "),
        ("data: [a, b]", "config.yaml: data must be one value, got ['a', 'b']"),
        ("scheduler: wavy", "scheduler must be one of linear, cosine, constant, got 'wavy'"),
    ],
)
def test_bad_files(content, message, asked, tmp_path):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_text(content)
    expect_refusal(invoke("finetune", tmp_path / "out", "--config", path), message)
    assert not asked


def test_settings_become_options_and_settings_again():
    settings = Settings(
        "m", "d", items=9, adapter={"feature_map": "elu", "rank": 3, "state_heads": "kv", "positions": "free"}
    )
    assert from_options(settings.options()) == settings
    automatic = Settings("m", "d", adapter={**settings.adapter, "rank": "auto"})
    assert from_options({"rank": None} | automatic.options()) == automatic


@pytest.mark.slow
def test_a_run_is_made_again_and_resumed_by_what_it_leaves(model_folder, tmp_path, monkeypatch):
    data = save_letters(tmp_path / "letters.jsonl")
    options = ["--model", model_folder, "--data", data, "--batch-size", 8, "--max-new-tokens", 2, "--rank", 2]
    options += ["--items", 40, "--scheduler", "cosine", "--warmup", 0.2, "--gradient-accumulation", 2]
    assert invoke("finetune", tmp_path / "one", *options).exit_code == 0
    save_whole = finetuning.save_whole
    monkeypatch.setattr(finetuning, "save_whole", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    result = invoke("finetune", tmp_path / "two", "--config", tmp_path / "one" / CONFIG)
    assert result.exit_code == 130
    assert f"stopped: `ntk-attention finetune {tmp_path / 'two'} --resume` goes on" in result.output
    monkeypatch.setattr(finetuning, "save_whole", save_whole)
    result = invoke("finetune", tmp_path / "two", "--resume")
    assert result.exit_code == 0, result.output
    one, two = (json.loads((tmp_path / name / RECORD).read_text()) for name in ("one", "two"))
    for name in ("settings", "before", "start_loss", "train_loss", "after", "digest"):
        assert one[name] == two[name]
    expect_refusal(invoke("finetune", tmp_path / "two", "--resume", "--seed", 3), "started with other settings (seed)")
