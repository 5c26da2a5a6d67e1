"""The experiments on small sizes, through the command line: files, figures, and words made from the rows."""

import json

import pytest
from typer.testing import CliRunner

from ntk_attention.cli.main import app, console
from ntk_attention.theory import run_capacity, run_training
from ntk_attention.theory.setting import Setting


def invoke(*arguments):
    console.width = 400
    return CliRunner().invoke(app, ["theory", *map(str, arguments)])


SEEN = {
    "kernel": ("lie inside our bound", "image inputs"),
    "training": ("independent signs: at m = 256", "it diverged (passed", "careful step"),
    "capacity": ("is the one counted", "in 5 of 5 draws", "Largest logit 64, m = 256"),
    "scaling": ("equal compute", "Held-out loss against n", "exponent"),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    from ntk_attention.theory import run_scaling

    monkeypatch.setattr(run_training, "STEPS", 60)
    monkeypatch.setattr(run_scaling, "STEPS", 256)
    monkeypatch.setattr(run_capacity, "COUNTED", ((4, 3),))
    monkeypatch.setattr(run_capacity, "MULTIPLES", (1.0, 2.0))
    monkeypatch.setattr(run_scaling, "VARIED", (8, 16, 32, 64))


@pytest.mark.slow
@pytest.mark.parametrize("name", SEEN)
def test_experiment(name, tmp_path):
    result = invoke(name, "--out", tmp_path, "--largest", 8)
    assert result.exit_code == 0, result.output
    for text in SEEN[name]:
        assert text in result.output
    first, *rows = map(json.loads, (tmp_path / f"{name}.jsonl").read_text().splitlines())
    assert first["experiment"] == name
    assert first["seed"] == 0
    assert len(rows) >= 20
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    if name == "kernel":
        moves = [r for r in rows if r["kind"] == "shift"]
        assert f"{len(moves)} of {len(moves)} moves lie inside our bound" in result.output


def test_lazy_rate_is_within_ten_percent():
    """What experiment 2 must show, on one run of each start."""
    setting = Setting()
    for start, m in (("independent", 2**14), ("paired", 2**10)):
        row = run_training.train(setting, m, start, 1.0, 0)
        assert abs(run_training.rate_error(row)) < 0.1
        assert not row["diverged"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["walk"], "unknown experiment 'walk'"),
        (["kernel", "--device", "abacus"], "device 'abacus' cannot be used"),
        (["kernel", "--largest", 3], "must be 2^8 to 2^24, got 2^3"),
        (["kernel", "--inputs", "sound"], "inputs must be 'random' or 'image', got 'sound'"),
    ],
)
def test_errors(arguments, message, tmp_path):
    result = invoke(*arguments, "--out", tmp_path / "none")
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "none").exists()
