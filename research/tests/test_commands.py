"""The commands of the comparison: the rows that they write, and the report."""

import json

import pytest
from typer.testing import CliRunner

from research.__main__ import app
from research.experiments.methods import METHODS
from research.experiments.registry import registry
from research.experiments.statistics import collect
from research.experiments.tables import verdict
from research.experiments.train import packed
from research.recording import read


def command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def results(asset_folder, tmp_path_factory):
    """What the command line writes for the default, a rival and a prefix on one task, and the report made of it."""
    path = tmp_path_factory.mktemp("results")
    methods = [part for name in ("ntk", "lora-qv", "prefix-text") for part in ("--method", name)]
    done = command("run", "sections-16", *methods, "--steps", 2, "--seeds", 2, "--device", "cpu", "--out", path)
    assert done.exit_code == 0, done.output
    return path


@pytest.mark.slow
def test_rows(results):
    rows, seeds = read(results / "rows.jsonl"), registry()["sections-16"].selection_seeds
    for row in rows:
        assert row.keys() >= {"hardware", "versions", "commit", "jobs", "seconds"}
        for name in ("trainable_parameters", "adapter_bytes", "test", "forgetting"):
            assert (name in row) == (row["stage"] == "final"), name
        assert (row["seed"] in seeds) == (row["stage"] == "select")
    for method in ("ntk", "lora-qv", "prefix-text"):
        own = [row for row in rows if row["method"] == method]
        selected = [row for row in own if row["stage"] == "select"]
        tried = sorted({row["learning_rate"] for row in selected})
        assert len(selected) == len(seeds) * len(tried) >= 4 * len(seeds)
        means = {
            rate: [
                sum(sign * row["validation"][name] for row in selected if row["learning_rate"] == rate)
                for sign, name in ((1, "share"), (-1, "loss"))
            ]
            for rate in tried
        }
        best = max(tried, key=lambda rate: means[rate])
        finals = [row for row in own if row["stage"] == "final"]
        assert {row["seed"] for row in finals} == {1, 2}
        assert {row["learning_rate"] for row in finals} == {best}


@pytest.mark.slow
def test_a_stopped_run_goes_on(results, tmp_path):
    """With two processes; a row that was there is not run again."""
    rows = (results / "rows.jsonl").read_text().splitlines()
    own = [line for line in rows if json.loads(line)["method"] == "ntk"]
    (tmp_path / "rows.jsonl").write_text("\n".join(own[:-2]) + "\n")
    arguments = ("run", "sections-16", "--method", "ntk", "--steps", 2, "--seeds", 2, "--device", "cpu")
    assert command(*arguments, "--jobs", 2, "--out", tmp_path).exit_code == 0
    resumed = read(tmp_path / "rows.jsonl")
    assert [json.dumps(row) for row in resumed[:-2]] == own[:-2]
    assert {row["jobs"] for row in resumed[-2:]} == {2}
    scores = {row["seed"]: row["test"]["loss"] for row in resumed if row["stage"] == "final"}
    before = {row["seed"]: row["test"]["loss"] for row in map(json.loads, own) if row["stage"] == "final"}
    assert scores == pytest.approx(before, rel=1e-4)  # a cell is the same wherever it runs


def test_a_cell_again(results, tmp_path):
    """Without its grid: the row that `run` has written, printed as it goes into the file, as often as asked."""
    before = next(row for row in read(results / "rows.jsonl") if (row["method"], row["stage"]) == ("ntk", "final"))
    arguments = ("--rate", before["learning_rate"], "--seed", before["seed"], "--steps", 2, "--device", "cpu")
    for _ in range(2):
        done = command("cell", "sections-16", "ntk", *arguments, "--out", tmp_path)
        assert done.exit_code == 0, done.output
    first, second = read(tmp_path / "rows.jsonl")
    assert json.loads(done.stdout) == second
    assert first.keys() == second.keys() == before.keys()
    assert all(first[name] == before[name] for name in ("task", "method", "stage", "learning_rate", "seed", "steps"))
    assert first["test"] == second["test"] == pytest.approx(before["test"], rel=1e-4)
    assert second["forgetting"] == pytest.approx(before["forgetting"], abs=1e-4)


def test_only_the_seeds_of_final_runs_count():
    task = registry()["sections-16"]
    row = {"task": task.name, "method": "ntk", "steps": task.steps, "learning_rate": 0.1, "stage": "final"}
    row |= {"validation": {"loss": 1.0, "share": 0.5}, "test": {"loss": 1.0, "share": 0.5}}
    rows = [{**row, "seed": seed} for seed in (1, 99)]
    rows += [{**row, "stage": "select", "seed": seed} for seed in task.selection_seeds]
    assert collect(rows, registry())["sections-16"]["ntk"].finals.keys() == {1}


def test_a_cell_that_fails(asset_folder, tmp_path):
    arguments = ("--rate", 1e30, "--seed", 0, "--steps", 2, "--device", "cpu", "--out", tmp_path)
    assert command("cell", "sections-16", "full", *arguments, "--stage", "select").exit_code == 0
    assert read(tmp_path / "rows.jsonl")[0]["error"].startswith("the loss is not finite")


def test_report(tmp_path):
    """Tables and figures of made-up rows, with the numbers that they must show."""
    rows, task = [], registry()["sections"]
    for method, shares in {"ntk": (0.80, 0.84), "lora-attention": (0.79, 0.81), "no-normaliser": (0.5, 0.5)}.items():
        same = {"task": task.name, "method": method, "steps": task.steps,
                "trainable_parameters": 1000, "adapter_bytes": 4000, "training_seconds": 1.0,
                "peak_memory_bytes": 2**20, "seconds": 2.0, "hardware": "a test", "versions": {"torch": "1"},
                "commit": "c", "jobs": 1}  # fmt: skip
        for rate in METHODS[method].rates:
            found = {"loss": 1.0, "share": 0.7 if rate == 3e-3 else 0.6}
            for seed in task.selection_seeds:
                rows.append({**same, "stage": "select", "seed": seed, "learning_rate": rate, "validation": found})
        for seed, share in zip(task.final_seeds, shares * 4, strict=True):
            correct = packed([i < 100 * share for i in range(100)])
            found = {"loss": 1.0, "share": share}
            rows.append({**same, "stage": "final", "seed": seed, "learning_rate": 3e-3, "validation": found,
                         "test": found, "test_correct": correct, "forgetting": 0.25,
                         "unrelated_loss_before": 2.8 if method == "ntk" or seed > 1 else 2.795})  # fmt: skip
        rows.append({**same, "stage": "final", "seed": 4, "learning_rate": 1e-3, "validation": found, "test": found})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert command("report", "--out", tmp_path).exit_code == 0
    text = (tmp_path / "README.md").read_text()
    assert "| sections | accuracy ↑ | 8 | 82.0 % | 80.0 % |" in text
    assert "| **NTK-Attention** | 1,000 | 82.0 % ± 2.1 | 8, 2 rates | 0.003 | +0.250 |" in text
    assert "| LoRA, attention | 1,000 = | 80.0 % ± 1.1 | 8, 2 rates | 0.003 | +0.250 ≠ |" in text
    # differences of 1 and 3 points in turn: mean 2, half width 2.365 * 1.069 / sqrt(8)
    assert "| LoRA, attention | +2.0 | ± 0.9 |" in text
    assert "at least level with the best LoRA in 1 of 1 task groups" in text
    assert "| **70.0 %** |" in text
    assert "without the normaliser k | normaliser" in text
    html = (tmp_path / "index.html").read_text()
    assert html.count("data:image/png;base64,") == len(list(tmp_path.glob("*.png"))) == 2
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    assert "http" not in html.replace("http-equiv", "")  # self-contained
    assert command("report", "--out", tmp_path / "empty").exit_code == 2
    others = [row for row in rows if (row["method"], row["seed"]) != ("lora-attention", 2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in others))
    assert command("report", "--out", tmp_path).exit_code == 0
    text = (tmp_path / "README.md").read_text()
    assert "since some seeds are missing or diverge: sections." in text
    assert "| sections | accuracy ↑ | 8 | 82.0 % | 79.9 % (7 seeds) |" in text
    published = [{**row, "method": "ntk-published"} for row in rows if row["method"] == "no-normaliser"]
    elsewhere = [{**row, "task": "bbc", "steps": registry()["bbc"].steps} for row in rows + published]
    rivals = collect(elsewhere + rows + [row for row in published if row["seed"] != 3], registry())
    assert "the published start on 1 of 1 tasks (sections not counted, where seeds are missing)" in verdict(rivals)
    broken = next(row for row in rows if row not in others and row["stage"] == "final")
    del broken["test"]
    broken["error"] = "the loss is not finite at step 9 of 10"
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps(broken) + "\n")
    assert command("report", "--out", tmp_path).exit_code == 0
    assert "| diverges with 1 of 8 seeds |" in (tmp_path / "README.md").read_text()  # no mean of those that are left
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"task": "sec')
    done = command("report", "--out", tmp_path)
    assert done.exit_code == 2
    assert f"line {len(others) + 2}: expected a row" in " ".join(done.output.replace("│", " ").split())


def test_bad_input_is_refused(asset_folder, tmp_path):
    for arguments, text in (
        (("run", "sections-17"), "unknown task 'sections-17'"),
        (("run", "sections-16", "--method", "lora"), "unknown method 'lora'"),
        (("run", "perl"), "the data 'perl' is not at"),
        (("run", "gemma-chain-sum"), "the model 'gemma3-270m' is not at"),
        (("prepare", "mnist"), "unknown asset 'mnist'"),
        (("run", "sections-16", "--jobs", 0), "--jobs"),
        (("cell", "sections-17", "ntk", "--rate", 1e-3, "--seed", 1), "unknown task 'sections-17'"),
        (("cell", "sections-16", "lora", "--rate", 1e-3, "--seed", 1), "unknown method 'lora'"),
        (("cell", "chain-sum", "head", "--rate", 1e-3, "--seed", 1), "head cannot run on chain-sum"),
        (("cell", "sections-16", "ntk", "--rate", 1e-3, "--seed", 1, "--stage", "test"), "unknown stage 'test'"),
        (("time", "sections-16", "--method", "as-small-heads"), "as-small-heads cannot run on sections-16"),
    ):
        options = () if arguments[0] == "prepare" else ("--out", tmp_path)
        done = command(*arguments, *options)
        assert done.exit_code != 0
        assert text in " ".join(done.output.replace("│", " ").split())
    assert not list(tmp_path.iterdir())
