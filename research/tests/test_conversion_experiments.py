"""The experiments of conversion run on a tiny model: their rows, what is skipped, and their report."""

import json

import pytest
from matplotlib.image import imread
from typer.testing import CliRunner

from research.experiments.conversion import methods
from research.experiments.conversion.commands import app
from research.experiments.conversion.methods import METHODS
from research.experiments.conversion.texts import TEXTS
from research.recording import read

METHODS_RUN = (
    "no context",
    "full cache",
    "window",
    "shortened cache, distilled",
    "trained cache",
    "state elu, direct",
    "state elu, fitted",
    "state elu free, distilled",
    "state random 256, features learned",
    "state anchored 63, distilled",
    "state taylor 2, fitted",
    "state elu, 4 layers exact",
    "state elu, first 4 and last 64 tokens",
)
DOCUMENTS = ["--texts", "email", "--limit", 250, "--held-out", 40, "--steps", 2, "--rows", 8, "--length", 24]
DOCUMENTS += ["--batch-size", 4, "--methods", ";".join(METHODS_RUN)]
TUNING = ["--tokens", "4,8", "--train-steps", 2, "--batch-size", 2, "--train-rates", "1e-2", "--calibration-batches", 2]
TUNING += ["--steps", 2, "--held-out", 4]


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def folder(model_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("conversion")
    for arguments in (
        ["documents", "--model", model_folder, "--work", out / "work", *DOCUMENTS],
        ["prefix-tuning", "--model", model_folder, "--work", out / "work", *TUNING],
        ["accuracy", "--largest", 5, "--budget", 1e5],
    ):
        done = invoke(*arguments, "--out", out)
        assert done.exit_code == 0, done.output
    return out


@pytest.mark.slow
def test_documents(folder, model_folder):
    rows = {row["method"]: row for row in read(folder / "documents.jsonl")}
    assert rows.keys() == set(METHODS_RUN)
    assert rows["full cache"]["kl"] < 1e-6
    assert rows["no context"]["bytes"] == 0
    same = [
        rows[name]["bytes"] for name in ("window", "shortened cache, distilled", "trained cache", "state elu, fitted")
    ]
    assert max(same) < 1.25 * min(same)
    before = (folder / "documents.jsonl").read_text()
    again = ["documents", "--model", model_folder, "--work", folder / "work", *DOCUMENTS]
    assert invoke(*again, "--out", folder).exit_code == 0
    assert (folder / "documents.jsonl").read_text() == before


def test_a_file_is_a_text_and_its_calibration_text_is_kept(model_folder, tmp_path, monkeypatch):
    (tmp_path / "own.txt").write_text("\n\n".join(f"Paragraph {i} says {i * i}." for i in range(40)))
    arguments = [*DOCUMENTS[2:-1], "no context", "--texts", tmp_path / "own.txt", "--model", model_folder]
    arguments += ["--work", tmp_path / "work"]
    assert invoke("documents", *arguments, "--out", tmp_path).exit_code == 0
    monkeypatch.setattr(methods, "study", lambda *arguments, **options: pytest.fail("studied twice"))
    assert invoke("documents", *arguments, "--out", tmp_path / "elsewhere").exit_code == 0
    first, second = (read(folder / "documents.jsonl")[0] for folder in (tmp_path, tmp_path / "elsewhere"))
    assert first["text"] == "own"
    assert (first["kl"], first["study_seconds"]) == (second["kl"], second["study_seconds"])


def test_a_method_that_fails_is_a_row(model_folder, tmp_path, monkeypatch):
    def fails(job):
        job.adapt()
        raise ValueError("the divergence is NaN")

    monkeypatch.setitem(METHODS, "window", fails)
    arguments = [*DOCUMENTS[:-1], "window;no context", "--model", model_folder, "--out", tmp_path]
    arguments += ["--work", tmp_path / "work"]
    assert invoke("documents", *arguments).exit_code == 0
    rows = {row["method"]: row for row in read(tmp_path / "documents.jsonl")}
    assert rows["window"]["error"] == "the divergence is NaN"
    assert rows["no context"]["kl"] > 0
    assert invoke("report", "--out", tmp_path).exit_code == 0
    assert "Not measured: window: the divergence is NaN" in (tmp_path / "README.md").read_text()


@pytest.mark.slow
def test_prefix_tuning(folder):
    rows = {(row["m"], row["method"]) for row in read(folder / "prefix_tuning.jsonl")}
    ways = {f"{how} {what}" for how in ("fitted", "distilled") for what in ("elu", "anchored 63", "random 256")}
    assert rows == {
        (0, "base"),
        *((m, way) for m in (4, 8) for way in {"tuned", "direct elu", "direct taylor 2"} | ways),
    }


def test_accuracy(folder):
    rows = read(folder / "accuracy.jsonl")
    assert {row["m"] for row in rows} == {2, 4, 8, 16, 32}
    assert all(row["max_error"] <= row["bound"] + 1e-12 for row in rows if row["bound"])
    assert all(row["frobenius_error"] <= row["frobenius_bound"] + 1e-12 for row in rows if row["bound"])
    assert any(row["bound"] is None for row in rows)


@pytest.mark.slow
def test_report(folder):
    done = invoke("report", "--out", folder)
    assert done.exit_code == 0, done.output
    text = (folder / "README.md").read_text()
    for name in ("accuracy-max", "accuracy-frobenius", "documents", "prefix_tuning"):
        assert f"({name}.png)" in text
        assert imread(folder / f"{name}.png").std() > 0.05  # something is drawn
    assert all(name in text for name in METHODS_RUN)
    assert json.loads((folder / "documents.jsonl").read_text().splitlines()[0])["sha256"] in text


def test_texts():
    for name, load in TEXTS.items():
        assert len(load()) > 5000, name


def test_unknown_names(tmp_path):
    assert set(METHODS_RUN) <= METHODS.keys()
    done = invoke("documents", "--texts", "poem", "--out", tmp_path)
    assert done.exit_code == 2
    assert "unknown 'poem'" in done.output
