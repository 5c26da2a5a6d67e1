"""The experiment on positions at a tiny size: its rows, what is not run again, and its tables."""

import json

import pytest
import torch
from typer.testing import CliRunner

from ntk_attention.cli.data import collate
from ntk_attention.cli.evaluation import mean_loss
from research.__main__ import app
from research.experiments import positions
from research.experiments.method import Context
from research.experiments.methods import METHODS
from research.experiments.ours import adapters
from research.recording import read

ARGUMENTS = ("positions", "chain-sum", "--steps", 2, "--device", "cpu")


def command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(asset_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("positions")
    done = command(*ARGUMENTS, "--rate", "1e-2", "--out", path)
    assert done.exit_code == 0, done.output
    return path


def test_rows(folder):
    rows = read(folder / positions.ROWS)
    assert [row["method"] for row in rows] == list(positions.VARIANTS)
    for row in rows:
        assert row["shifted"].keys() == row["base"]["shifted"].keys() == {"0", "256", "1024", "4096"}
        assert row["validation"]["loss"] == row["shifted"]["0"]
        # the base model knows differences of positions alone, and so does what is free of positions
        held = [row["base"]] + [row] * (positions.VARIANTS[row["method"]][1] == "free")
        for found in held:
            for loss in (*found["shifted"].values(), found["left_padded"]):
                assert loss == pytest.approx(found["shifted"]["0"], rel=2e-3)
        assert row.keys() >= {"hardware", "versions", "commit", "jobs"}
    moved = [max(row["shifted"].values()) - min(row["shifted"].values()) for row in rows]
    assert moved[1] > 10 * moved[0]
    assert moved[3] > 10 * moved[2]


def test_what_has_a_row_is_not_run_again(folder, tmp_path):
    """With two processes: the row that is gone, and no other."""
    lines = (folder / positions.ROWS).read_text().splitlines()
    (tmp_path / positions.ROWS).write_text("\n".join(lines[:-1]) + "\n")
    done = command(*ARGUMENTS, "--rate", "1e-2", "--jobs", 2, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    again = (tmp_path / positions.ROWS).read_text().splitlines()
    assert again[:-1] == lines[:-1]
    before, after = json.loads(lines[-1]), json.loads(again[-1])
    assert after["shifted"] == pytest.approx(before["shifted"], rel=1e-4)


def test_the_report_without_other_rows(folder):
    done = command("report", "--out", folder)
    assert done.exit_code == 0, done.output
    rows, text = read(folder / positions.ROWS), (folder / "README.md").read_text()
    assert "### Positions on chain-sum, 2 steps" in text
    assert "| base model |" in text
    assert f"| default | rotary | 0.01 | 1 | {rows[3]['shifted']['0']:.4f} |" in text
    broken = {name: x for name, x in rows[0].items() if name not in ("shifted", "base", "left_padded")}
    blocks = positions.tables([*rows, broken | {"error": "the loss is not finite at step 1 of 2", "seed": 1}])
    assert blocks[-1].body[1][3:6] == ["2", "fails", ""]


def test_losses_by_hand(tasks, worker):
    """At no shift that of every other experiment; padding hides and moves, nothing else."""
    task = tasks["chain-sum"]
    base = worker.base(task)
    rows = [row for row, _ in task.examples(base, "validation", 0)]
    pad = base.tokenizer.pad_token_id
    batch = collate(rows, pad)
    assert positions.mean_loss(base.model, [batch]) == pytest.approx(mean_loss(base.model, rows, pad))
    padded = positions.left_padded(batch, 5, pad)
    assert torch.equal(padded["input_ids"][:, 5:], batch["input_ids"])
    assert not padded["attention_mask"][:, :5].any()
    assert (padded["labels"][:, :6] == -100).all()
    assert positions.shifted(batch, 7)["position_ids"][:, 0].eq(7).all()


def test_variants(tasks, worker):
    task = tasks["chain-sum"]
    base = worker.base(task)
    batch = task.batch(base, task.examples(base, "train", 0)[:4])
    for method, (adapter, seen) in positions.VARIANTS.items():
        model = METHODS[method].build(task.fresh(base, 0), Context(task, base, [batch]))
        assert {own.positions for own in adapters(model)} == {seen}
        assert {own.feed_forward is None for own in adapters(model)} == {adapter == "attention alone"}


def test_other_tasks_are_refused(asset_folder, tmp_path):
    done = command("positions", "sections-16", "--device", "cpu", "--out", tmp_path)
    assert done.exit_code == 2
    assert "expected a task of a language model" in " ".join(done.output.replace("│", " ").split())
