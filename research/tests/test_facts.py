"""Facts on a tiny model: their questions, what is skipped, what a method may keep, and the report."""

import json
from types import SimpleNamespace

import pytest
import torch
from matplotlib.image import imread
from typer.testing import CliRunner

from research.experiments import assets
from research.experiments.conversion import fact_texts, facts
from research.experiments.conversion.commands import app
from research.experiments.conversion.fact_methods import BM25, FACT_METHODS, WITH_BUDGET
from research.experiments.conversion.fact_texts import FactText, Question, chapter, chosen, company
from research.experiments.conversion.facts_report import with_scores
from research.recording import read

KIB = 2**-10
SMALL = ["--budgets", f"{32 * KIB}", "--seeds", "0", "--held-out", 40, "--limit", 400, "--steps", 2]
SMALL += ["--rows", 4, "--length", 24, "--batch-size", 2]


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("NTK_ASSETS", str(tmp_path_factory.mktemp("assets")))
    patch.setattr(fact_texts, "CONTINUATION", 100)
    whole = company(people=4, goods=4)
    texts = [FactText(name, whole.text, whole.questions[:5]) for name in ("company", "other")]
    assets.write_splits("facts", {"documents": [text.record() for text in texts]})
    yield
    patch.undo()


@pytest.fixture(scope="module")
def folder(prepared, model_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("facts")
    done = invoke(
        "facts", "--model", model_folder, "--work", out / "work", "--documents", "company", *SMALL, "--out", out
    )
    assert done.exit_code == 0, done.output
    return out


@pytest.mark.slow
def test_rows(folder):
    rows = read(folder / "facts.jsonl")
    assert len(rows) == 2 + len(WITH_BUDGET)
    assert {row["method"] for row in rows} == FACT_METHODS.keys()
    full, none = (next(r for r in rows if r["method"] == name) for name in ("full cache", "no context"))
    assert full["kl"] < 1e-6 < none["kl"]
    assert none["bytes"] == 0
    for row in rows:
        assert len(row["right"]) == len(row["likelihood"]) == 5
        assert all(x < 0 for x in row["likelihood"])
        assert row["kl_first"] == pytest.approx(row["kl"], abs=1e-9)  # 40 tokens


@pytest.mark.slow
def test_no_method_keeps_more_than_it_may_and_each_uses_what_it_has(folder):
    rows = [row for row in read(folder / "facts.jsonl") if row["mib"]]
    for row in rows:
        if row["method"] != "retrieval":  # which keeps the text, too
            assert 0.7 * row["mib"] * 2**20 < row["bytes"] <= row["mib"] * 2**20, row["method"]


@pytest.mark.slow
def test_what_has_a_row_is_not_run_again_and_minutes_end_a_run(folder, model_folder, tmp_path):
    arguments = ["facts", "--model", model_folder, "--work", folder / "work", *SMALL]
    before = (folder / "facts.jsonl").read_text()
    done = invoke(*arguments, "--documents", "company", "--out", folder)
    assert (done.exit_code, done.output) == (0, "")
    assert (folder / "facts.jsonl").read_text() == before
    done = invoke(*arguments, "--minutes", 0, "--methods", "no context;window", "--out", tmp_path)
    assert "4 of 4 rows are left" in done.output
    assert not (tmp_path / "facts.jsonl").exists()


@pytest.mark.slow
def test_report(folder):
    done = invoke("report", "--out", folder)
    assert done.exit_code == 0, done.output
    text = (folder / "README.md").read_text()
    for name in (*FACT_METHODS, "**company**", "(facts.png)"):
        assert name in text
    assert imread(folder / "facts.png").std() > 0.05  # something is drawn
    assert json.loads((folder / "facts.jsonl").read_text().splitlines()[0])["sha256"] in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "prayer"], "unknown 'prayer'"),
        (["--documents", "poem"], "unknown 'poem'"),
        (["--budgets", "2,lots"], "expected numbers separated by commas"),
        (["--budgets", "0"], "larger than 0"),
        (["--seeds", "-1"], "larger than -1"),
        (["--source", "dreams"], "unknown source 'dreams'"),
    ],
)
def test_refused(prepared, arguments, message, tmp_path):
    done = invoke("facts", *arguments, "--out", tmp_path / "none")
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())
    assert not (tmp_path / "none").exists()


def test_without_the_asset(tmp_path, monkeypatch):
    monkeypatch.setenv("NTK_ASSETS", str(tmp_path))
    done = invoke("facts", "--out", tmp_path)
    assert done.exit_code == 2
    assert "research prepare" in " ".join(done.output.replace("│", " ").split())


def test_windows_with_room_for_the_document_are_the_full_cache(prepared, model_folder, tmp_path):
    arguments = [*SMALL[2:], "--budgets", 1, "--documents", "other", "--model", model_folder, "--work", tmp_path]
    done = invoke("facts", "--methods", "full cache;window;retrieval", *arguments, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    full, *windows = read(tmp_path / "facts.jsonl")
    for row in windows:
        assert row["kl"] < 1e-5, row["method"]
        assert row["likelihood"] == pytest.approx(full["likelihood"], abs=0.02)


def test_bytes_that_hold_nothing_are_a_row(prepared, model_folder, tmp_path):
    arguments = ["--methods", "cartridge;shortened cache;state random, fitted;state anchored and tokens, distilled"]
    arguments += [*SMALL[2:], "--budgets", 0.05 * KIB, "--documents", "other", "--model", model_folder]
    assert invoke("facts", *arguments, "--work", tmp_path, "--out", tmp_path).exit_code == 0
    rows = {row["method"]: row["error"] for row in read(tmp_path / "facts.jsonl")}
    assert rows["cartridge"] == "51 bytes hold no token of 128"
    assert rows["shortened cache"] == "51 bytes hold no token of 136"
    assert rows["state random, fitted"] == "51 bytes hold no state of one feature beside 0 other numbers"
    assert "beside 4,352 other numbers" in rows["state anchored and tokens, distilled"]


# --- recall, questions, scores, retrieval ---


def test_recall_is_of_what_only_the_document_tells():
    common = {"kl": 1.0, "kl_first": 2.0, "likelihood": [-1.0, -2.0, -3.0, -4.0]}
    rows = [
        {"method": "full cache", "right": [1, 1, 1, 0], **common},
        {"method": "no context", "right": [1, 0, 0, 0], **common},
        {"method": "state", "right": [0, 1, 0, 1], **common, "kl": 0.25},
    ]
    *_, state = with_scores(rows)
    assert (state["asked"], state["recall"], state["answered"], state["of_open"]) == (2, 0.5, 0.5, -2.5)
    assert (state["closed"], state["closed_first"]) == (0.75, 0.0)
    assert with_scores(rows[1:]) == []


class Script:
    """A model that writes a given text after each prompt, whatever the prompt is."""

    def __init__(self, text):
        self.text = text

    def parameters(self):
        yield torch.zeros(1)

    def __call__(self, input_ids):
        logits = torch.zeros(*input_ids.shape, 256)
        for row in range(len(input_ids)):
            for place, letter in enumerate(self.text):
                logits[row, 2 + place, ord(letter)] = 9.0  # prompts have three letters
        return SimpleNamespace(logits=logits)


class Letters:
    pad_token_id = 0

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids):
        return "".join(chr(i) for i in ids)


@pytest.mark.parametrize(
    ("answer", "written", "right"),
    [(" 3.1", " 3.1.", True), (" 3.1", " 3.10", False), (" 3.1", " 3.2 ", False), ("zip", "zip`", True),
     ("zip", "zips", False)],
)  # fmt: skip
def test_an_answer_is_right_to_its_last_letter_and_no_further(answer, written, right):
    asked = [Question("q", "Q: ", answer), Question("q", "P: ", " other things")]
    (found, log), (other, _) = facts.score(Script(written), Letters(), asked)
    assert found is right
    assert not other
    assert (log > -1) is (written.startswith(answer))


def test_retrieval_finds_the_window_that_has_the_words():
    texts = ["The red lamp lies on shelf A10.", "The blue pump lies on shelf B20.", "Nobody goes to lunch."]
    index = BM25(texts)
    assert index.best("On which shelf does the blue pump lie?") == 1
    assert index.best("Who goes to lunch?") == 2


def test_every_answer_of_the_company_stands_in_the_text_before_the_continuation():
    text = company()
    early = text.text[: -fact_texts.CONTINUATION]
    assert len(text.questions) >= 50
    assert all(q.answer.strip() in early for q in text.questions)
    assert len({q.prompt for q in text.questions}) == len(text.questions)
    assert company() == text != company(seed=1)
    assert FactText.of(json.loads(json.dumps(text.record()))) == text


CHAPTER = """
.. function:: copy(src, dst, *, follow=True)

   Copies what the caller names first to the place that it has named after that, with ``ignore_all`` set by hand.

   .. versionadded:: 3.3

   .. versionchanged:: 3.8
      Added the *follow* parameter.

.. class:: Box(size=10)

   .. method:: open(mode='r', /, key=None)

      .. versionadded:: 3.9
         The *key* argument.

.. function:: old(a[, b])
"""


def test_questions_of_a_chapter():
    text = chapter("boxes", CHAPTER + " " * fact_texts.CONTINUATION)
    found = {q.prompt.removeprefix("\n\nQuestion: ").split("\nAnswer:")[0]: q.answer for q in text.questions}
    stems = [q.prompt.split("\nAnswer:")[1] for q in text.questions if "`size`" in q.prompt]
    assert stems == [" The default of `size` is `"]
    quote = next(prompt for prompt in found if "text above says" in prompt)
    assert found.pop(quote) == "ignore_all"
    assert quote.endswith("to the place that it has named after that, with ``")
    assert found == {
        "What is the default of `follow` in `copy`?": "True",
        "Which parameter of `copy` comes right behind `src`?": "dst",
        "Which parameter of `copy` comes right behind `dst`?": "follow",
        "In which version of Python was `copy` added to boxes?": " 3.3",
        "In which version of Python did `copy` get `follow`?": " 3.8",
        "What is the default of `size` in `Box`?": "10",
        "What is the default of `mode` in `Box.open`?": "'r'",
        "What is the default of `key` in `Box.open`?": "None",
        "Which parameter of `Box.open` comes right behind `mode`?": "key",
        "In which version of Python did `Box.open` get `key`?": " 3.9",
    }


def test_kinds_are_chosen_alike():
    asked = [Question("many", f"a{i}", "x") for i in range(500)] + [Question("few", f"b{i}", "x") for i in range(9)]
    kinds = [q.kind for q in chosen(asked + asked, 0)]
    assert (len(kinds), kinds.count("few")) == (96, 9)
