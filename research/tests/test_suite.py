"""The development suite: its data, exact completions without generation, its command and its tables."""

import math
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from ntk_attention.cli.evaluation import mean_loss
from research.__main__ import app
from research.experiments import assets, commands, develop, language
from research.experiments.language import as_item, encoded, loss_and_exact
from research.experiments.plan import develop_cells
from research.experiments.registry import registry
from research.experiments.suite import LENGTHS, SUITE
from research.recording import append, read

ARGUMENTS = ("--method", "lora-attention", "--method", "ntk", "--steps", 2, "--device", "cpu")


def command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def said(done):
    return " ".join(done.output.replace("│", " ").split())


@pytest.mark.parametrize("name", ["rotation", "calendar"])
def test_problems(tmp_path, monkeypatch, name):
    """No prompt is in two splits, whatever the seeds have given."""
    pytest.importorskip("reasoning_gym")
    monkeypatch.setenv("NTK_ASSETS", str(tmp_path))
    assets.word_problems(name, assets.reasoning(name), 300)(tmp_path)
    prompts = {split: [row["prompt"] for row in assets.read_rows(name, split)] for split in assets.SPLITS}
    assert [len(own) for own in prompts.values()] == [300, 500, 1000]
    assert len({prompt for own in prompts.values() for prompt in own}) == 1800
    with pytest.raises(ValueError, match=r"twice: 30 different prompts are needed for train, found 1"):
        assets.word_problems("twice", lambda size, seed: [assets.Item("1 + 1", "2")] * size, 30)(tmp_path)


def test_tasks_of_the_suite():
    small = [task for task in SUITE if task.model == "smollm2-135m"]
    assert {task.name for task in small if task.max_new_tokens} == set(LENGTHS) == set(assets.REASONING)
    assert {task.data.removesuffix("-target") for task in SUITE} | {task.model for task in SUITE} <= set(assets.ASSETS)
    assert {task.name for task in SUITE} <= set(registry())
    assert len({task.name for task in SUITE}) == len(SUITE)
    for task in SUITE:
        assert task.has_head or task.train_items == task.steps * task.batch_size


def test_one_shape(tasks, worker):
    """All training batches of a task of the suite are of one shape, which longer items would not fit."""
    task = replace(tasks["chain-sum"], pad_to=12, max_length=12)
    base = worker.base(task)
    examples = task.examples(base, "train", 0)
    assert 0 < len(examples) < len(tasks["chain-sum"].examples(base, "train", 0)) + 1
    assert {task.batch(base, examples[i : i + 3])["input_ids"].shape[1] for i in range(0, len(examples), 3)} == {12}


def test_exact_is_what_greedy_decoding_writes(tasks, worker, monkeypatch):
    """Completions that a model has written itself, cut at some place, and some with one token changed; in batches."""
    base = worker.base(tasks["chain-sum"])
    model, pad = base.model.eval(), base.tokenizer.pad_token_id
    prompts = [
        row["input_ids"]
        for row, _ in encoded([as_item({"text": f"{i} is {i * i}"}, base.tokenizer) for i in range(12)], base.tokenizer)
    ]
    rows, expected = [], []
    for i, prompt in enumerate(prompts):
        written = generated(model, prompt, 3 + i % 4, pad)
        completion = list(written)
        if i % 3 == 0:
            completion[i % len(completion)] = (completion[i % len(completion)] + 7) % 250 + 3
        rows.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
        expected.append(completion == generated(model, prompt, len(completion), pad))
    assert 0 < sum(expected) < len(rows)
    for size in (1, 40, 10**6):
        monkeypatch.setattr(language, "EVALUATION_TOKENS", size)
        loss, exact = loss_and_exact(model, rows, pad)
        assert exact == sum(expected) / len(rows)
        assert loss == pytest.approx(mean_loss(model, rows, pad), rel=1e-5)


def generated(model, prompt, count, pad):
    """The next tokens by `generate`, whose own end token does not end it here."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
                         eos_token_id=None, pad_token_id=pad)  # fmt: skip
    return out[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def folder(asset_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("develop")
    done = command("develop", "chain-sum", *ARGUMENTS, "--rate", "3e-3", "--rate", "1e-2", "--out", path)
    assert done.exit_code == 0, done.output
    return path


def test_rows(folder):
    rows = read(folder / develop.ROWS)
    assert {(row["method"], row["learning_rate"]) for row in rows} == {
        (method, rate) for method in ("lora-attention", "ntk") for rate in (3e-3, 1e-2)
    }
    for row in rows:
        assert "error" not in row, row["error"]
        assert row["stage"] == develop.STAGE
        assert row["validation"].keys() == {"loss", "exact"}
        assert math.isfinite(row["forgetting"])
        assert not row.keys() & {"test", "test_correct"}
        assert row["trainable_parameters"] > 0
    before = (folder / develop.ROWS).read_text()
    done = command("develop", "chain-sum", *ARGUMENTS, "--rate", "3e-3", "--out", folder)
    assert done.exit_code == 0, done.output
    assert (folder / develop.ROWS).read_text() == before  # what has a row is not run again


def test_the_report(folder):
    done = command("report", "--out", folder)
    assert done.exit_code == 0, done.output
    text = (folder / "README.md").read_text()
    assert "### Development: the size of a full Z" in text
    best = min(row["validation"]["loss"] for row in read(folder / develop.ROWS) if row["method"] == "ntk")
    assert f"| ntk | {best:.4f}" in text
    row = read(folder / develop.ROWS)[-1]
    append(folder / develop.ROWS, {**row, "batch_size": 7, "validation": {"loss": 1e-9}})  # of other batches
    assert command("report", "--out", folder).exit_code == 0
    assert (folder / "README.md").read_text() == text


def test_what_fails_is_tried_once_more_alone(asset_folder, tmp_path, monkeypatch):
    """In the first round every cell of a method fails, one of them in the second, too; the other has its row."""
    rounds = []

    def run_jobs(planner, device, write, deadline, jobs):
        ready = [cell for cell, _ in planner()]
        rounds.append((jobs, [(cell.method, cell.learning_rate) for cell in ready]))
        for cell in ready:
            fails = cell.method == "ntk" and (len(rounds) == 1 or cell.learning_rate == 1e-2)
            result = {"error": "the process died of SIGKILL (EOFError)"} if fails else {"validation": {"loss": 1.0}}
            write({**vars(cell), "steps": 2, **result})

    monkeypatch.setattr(commands, "run_jobs", run_jobs)
    arguments = ("develop", "chain-sum", *ARGUMENTS, "--rate", "3e-3", "--rate", "1e-2", "--jobs", 3)
    done = command(*arguments, "--out", tmp_path)
    assert done.exit_code == 1
    assert "1 failed, which the next run tries again" in said(done)
    failed = [("ntk", 3e-3), ("ntk", 1e-2)]
    assert [jobs for jobs, _ in rounds] == [3, 1]
    assert rounds[1][1] == failed
    assert len(read(tmp_path / develop.ROWS)) == 6
    rounds[:] = [None]
    command(*arguments, "--out", tmp_path)
    assert rounds[1] == (3, failed[1:])


def test_seeds_and_rates():
    task = registry()["letters"]
    row = {
        "task": "letters",
        "method": "ntk",
        "steps": task.steps,
        "batch_size": task.batch_size,
        "learning_rate": 3e-3,
        "seed": 0,
        "stage": "develop",
    }
    failed = {**row, "seed": 1, "error": "OutOfMemoryError"}
    cells = develop_cells([row, failed], task, "ntk", [3e-3, 1e-2], 2)
    assert [(cell.learning_rate, cell.seed) for cell in cells] == [(1e-2, 0), (3e-3, 1), (1e-2, 1)]
    assert develop_cells([row, failed, failed], task, "ntk", [3e-3], 2) == []
    other = {**row, "batch_size": 2 * task.batch_size}
    assert develop_cells([other], task, "ntk", [3e-3], 1) == develop_cells([], task, "ntk", [3e-3], 1)
    assert [cell.learning_rate for cell in develop_cells([], task, "lora-mlp", None, 1)] == [3e-4, 1e-3, 3e-3, 1e-2]


def test_the_tables():
    """By hand: two tasks, ours behind by 10 % on one and ahead by 20 % on the other."""
    losses = {
        ("ntk", "letters"): {1e-3: 1.2, 3e-3: 1.1, 1e-2: 2.2},
        ("ntk", "bases"): {1e-3: 0.9, 3e-3: 0.8, 1e-2: None},
        ("lora-mlp", "letters"): {1e-3: 1.0, 3e-3: 1.5},
        ("lora-mlp", "bases"): {1e-3: 1.25, 3e-3: 1.0},
        ("lora-attention", "bases"): {1e-3: 1.5},
        ("lora-mlp-4x", "bases"): {1e-3: 0.1},
    }
    rows = [
        {"method": method, "task": task, "learning_rate": rate, "seed": 0}
        | ({"validation": {"loss": loss, "exact": 0.25}, "forgetting": loss / 10} if loss else {"error": "not finite"})
        for (method, task), by_rate in losses.items()
        for rate, loss in by_rate.items()
    ]
    titles = [block.text for block in develop.tables(rows) if isinstance(block, develop.Heading)]
    assert titles == ["Development", "Development: the size of a full Z", "Development: four times the size"]
    summary, best, right, rates = [block for block in develop.tables(rows) if isinstance(block, develop.Table)][:4]
    by_name = {line[0]: line[1:] for line in summary.body}
    assert by_name["ntk"] == ["1.00", "2", "-6.2 %", "+10.0 %", "letters", "+0.095", "+0.110"]
    assert by_name["lora-mlp"][:4] == ["2.00", "2", "+0.0 %", "+0.0 %"]
    assert by_name["lora-attention"][:4] == ["3.00", "1", "+50.0 %", "+50.0 %"]
    assert ["ntk", "1.1000", "0.8000"] in best.body
    assert ["lora-mlp", "1.0000 ↓", "1.0000 ↑"] in best.body
    assert best.body[-1] == ["best LoRA", "lora-mlp", "lora-mlp"]
    assert ["lora-attention", "", "25.0"] in right.body
    assert rates.body[0] == ["ntk", "+10.8 %, +12.5 %", "+0.0 %, +0.0 %", "+100.0 %, +100.0 % (1 broken)"]
    two = develop.collect([rows[0], {**rows[0], "seed": 1, "validation": {"loss": 1.4}}, rows[1]])
    assert two["ntk"]["letters"].loss == {1e-3: pytest.approx(1.3)}  # the other rate has one seed


def test_test_data_stay_unseen(asset_folder, tmp_path):
    for arguments in (("run", "letters"), ("cell", "letters", "ntk", "--rate", 1e-3, "--seed", 1)):
        done = command(*arguments, "--out", tmp_path)
        assert done.exit_code == 2
        assert "letters is of the development suite, whose test data stay unseen" in said(done)
