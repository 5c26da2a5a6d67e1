"""The first table of the comparison, of made-up rows."""

import pytest

from research.experiments.document import markdown
from research.experiments.ladder import ladder
from research.experiments.registry import registry
from research.experiments.statistics import collect
from research.tests.rows import selected_and_tested


def shown(*rows):
    """Lines of its table by their names, and all of it."""
    text = markdown(ladder(collect([row for own in rows for row in own], registry())))
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {line[0]: line[1] for line in lines if len(line) == 2}, text


def test_the_steps_in_their_order():
    cells, text = shown(
        selected_and_tested("lora-qv"), selected_and_tested("lora-all", 0.02), selected_and_tested("ntk", 0.05)
    )
    names = ["as published", "attention alone, calibrated", "the default", "the best LoRA", "full fine-tuning"]
    assert [name for name in cells if name in names] == names
    assert cells["as published"] == cells["full fine-tuning"] == "not run"
    assert cells["the default"] == "**65.5 % ± 0.5**<br>0.003, +0.50<br>a"
    assert cells["the best LoRA"] == "LoRA, all linear<br>62.5 % ± 0.5<br>0.003, +0.50<br>a"
    assert cells["the default less the best LoRA"] == "+3.0 ± 0.0<br>points"
    assert "without rows: LoRA, attention; LoRA, MLP; DoRA, attention;" in text
    assert "Commits: a is `c`.\n" in text
    assert ladder({}) == []


def test_bold_is_what_the_seeds_tell_apart():
    lora = selected_and_tested("lora-all")
    same = [
        {**row, "test": {"loss": 1.0, "share": 0.5 + 0.1 * (row["seed"] % 3)}} if "test" in row else row for row in lora
    ]
    ours = selected_and_tested("ntk", 0.01)
    assert "**" not in shown(ours, same)[1]
    cells, _ = shown(ours, selected_and_tested("lora-all", 0.02))
    assert cells["the best LoRA"].startswith("LoRA, all linear<br>**62.5 % ± 0.5**<br>")
    assert "**" not in cells["the default"]


def test_commits_and_seeds_that_lack_are_said():
    ours = [{**row, "commit": "d"} if row["seed"] in (7, 8) else row for row in selected_and_tested("ntk")]
    published = [{**row, "commit": "e"} for row in selected_and_tested("ntk-published") if row["seed"] != 3]
    full = [row for row in selected_and_tested("full") if row["stage"] == "select"]
    cells, text = shown(ours, published, full, selected_and_tested("lora-all"))
    assert cells["as published"] == "60.4 % ± 0.5<br>7 of 8 seeds<br>0.003↑, +0.50<br>a"
    assert cells["the default"].endswith("<br>b c, rate b")
    assert cells["full fine-tuning"] == "not tested yet"
    assert "Commits: a is `e`, b is `c`, c is `d`. Numbers of different letters are of different code." in text
    chosen = [{**row, "commit": "f"} if row["stage"] == "select" else row for row in selected_and_tested("ntk")]
    assert shown(chosen, selected_and_tested("lora-all"))[0]["the default"].endswith("<br>a, rate b")


def test_what_breaks_has_no_mean():
    rows = selected_and_tested("ntk")
    broken = [{**row, "error": "the loss is not finite at step 9"} if row["seed"] == 2 else row for row in rows]
    for row in broken:
        if "error" in row:
            row.pop("test", None)
    cells, _ = shown(broken, selected_and_tested("lora-all"))
    assert cells["the default"] == "diverges with 1 of 8 seeds"
    assert cells["the default less the best LoRA"] == "not known"


@pytest.mark.parametrize("count", [1, 27])
def test_letters(count):
    rows = [{**row, "commit": f"c{i % count}"} for i, row in enumerate(selected_and_tested("ntk"))]
    _, text = shown(rows)
    assert ("aa is `c" in text) == (count > 26)
