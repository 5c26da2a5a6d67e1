"""Rows that results keep, and how large results may be."""

import json

import pytest
from typer.testing import CliRunner

from ntk_attention.theory.experiments import EXPERIMENTS
from research.__main__ import app
from research.experiments.rows import kept
from research.recording import ROOT, append, read, rounded, write
from research.tests.rows import row_of, selected_and_tested
from research.theory import POINTS, thinned

RESULTS = ROOT / "results"
MOST_BYTES, MOST_OF_A_PICTURE, MOST_OF_A_PAGE = 5 * 10**6, 10**5, 5 * 10**5


def command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_results_stay_small():
    sizes = {path: path.stat().st_size for path in RESULTS.rglob("*") if path.is_file()}
    largest = sorted(sizes, key=lambda path: -sizes[path])[:3]
    told = ", ".join(f"{path.relative_to(ROOT)}: {sizes[path]:,}" for path in largest)
    assert sum(sizes.values()) < MOST_BYTES, f"`python -m research tidy` may help; the largest are {told}"
    for path, size in sizes.items():
        assert path.suffix != ".png" or size < MOST_OF_A_PICTURE, path
        assert path.suffix != ".html" or size < MOST_OF_A_PAGE, path


def test_reports_read_the_same_from_tidy_rows(tmp_path):
    folder = tmp_path / "experiments"
    wanted = [*selected_and_tested("ntk", gain=0.05), *selected_and_tested("lora-all"), *selected_and_tested("share-5")]
    wanted.append(row_of("ntk", "time", 1e-3, 0, step_milliseconds=3.0, peak_memory_bytes=2**20))
    elsewhere = row_of("ntk", "final", 1e-3, 1, test={"loss": 1.0, "share": 0.1}, test_correct="4:f")
    old = [{**row, "commit": "older", "validation": {"loss": 9.0, "share": 0.1}} for row in wanted[:5]]
    failed = row_of("lora-all", "select", 1e-5, 0, error="OutOfMemoryError: no memory")
    curves = [{**row, "curve": [[1, 2.0]]} for row in wanted]
    for row in [*old, failed, *curves, elsewhere]:
        append(folder / "rows.jsonl", row)
    assert command("report", "--out", folder).exit_code == 0
    before = (folder / "README.md").read_text()
    assert "| 8, 2 rates | 0.003 |" in before
    done = command("tidy", tmp_path)
    assert done.exit_code == 0, done.output
    tidied = (folder / "rows.jsonl").read_text()
    rows = read(folder / "rows.jsonl")
    assert len(rows) == len(wanted) + 1
    assert not any("curve" in row or "error" in row or row["commit"] == "older" for row in rows)
    assert all(("test_correct" in row) == (row["learning_rate"] == 3e-3 and row["method"] != "share-5")
               for row in rows if row["stage"] == "final")  # fmt: skip
    assert command("tidy", tmp_path).exit_code == 0
    assert (folder / "rows.jsonl").read_text() == tidied
    assert command("report", "--out", folder).exit_code == 0
    after = (folder / "README.md").read_text()
    # what was dropped was counted; variants have no interval over items afterwards
    assert without_counts(before) == without_counts(after)
    page = (folder / "index.html").read_bytes()
    assert command("report", "--out", folder).exit_code == 0
    assert (folder / "index.html").read_bytes() == page


def without_counts(report):
    lines = report[: report.index("## How it was made")].splitlines()
    return [line for line in lines if not line.startswith("| prefix holds 5 % at the start | +")]


def test_lines_of_several_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"a": 1, "made": "x", "b": i} for i in range(3)] + [{"a": 1, "made": "y", "c": None}, {"a": 2, "made": "x"}]
    write(path, rows, ("made",))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {"a": 1, "made": "x", "each": [{"b": 0}, {"b": 1}, {"b": 2}]}
    assert len(lines) == 3
    append(path, {"a": 3})
    assert read(path) == [*rows, {"a": 3}]
    path.write_text(path.read_text() + '{"each": 3}\n')
    with pytest.raises(ValueError, match="line 5: expected a row of JSON"):
        read(path)


def test_what_a_row_keeps():
    row = row_of("ntk", "select", 1e-3, 0, validation={"loss": 1.23456789, "share": 1 / 3}, trainable_parameters=5)
    wanted = {**row, "validation": {"loss": 1.23457, "share": 1 / 3}}
    del wanted["trainable_parameters"]
    assert kept(row) == wanted
    assert rounded([1e-9 / 3, 7, "x", None]) == [3.33333e-10, 7, "x", None]


def test_curves_of_theory_are_thinned():
    row = {"kind": "run", "draw": 0, **{name: list(range(200)) for name in ("t", "loss", "predicted")}}
    drawn = thinned(row)
    assert len(drawn["t"]) <= POINTS + 1
    assert (drawn["t"][0], drawn["loss"][-1]) == (0, 199)
    assert thinned(drawn) == drawn
    assert thinned({**row, "draw": 1})["predicted"] == [0, 199]


def test_the_theory_of_results_is_drawn_again(tmp_path):
    for name in EXPERIMENTS:
        (tmp_path / f"{name}.jsonl").write_bytes((RESULTS / "theory" / f"{name}.jsonl").read_bytes())
    assert command("theory", tmp_path).exit_code == 0
    assert (tmp_path / "README.md").read_text() == (RESULTS / "theory" / "README.md").read_text()
