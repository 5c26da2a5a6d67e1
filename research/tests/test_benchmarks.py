"""The benchmarks run at tiny sizes on a CPU; their rows, their report, and the prefix attention they compare with."""

import json
import math

import pytest
import torch
from matplotlib.image import imread
from torch.nn.attention.bias import causal_lower_right
from typer.testing import CliRunner

from research.__main__ import app
from research.benchmarks.attention import lower_bounds
from research.benchmarks.grouping import fastest, median
from research.benchmarks.models import TINY, llama
from research.benchmarks.prefix import prefix_cat, prefix_merge
from research.benchmarks.processes import STEPS, WAYS, Launch, Training
from research.benchmarks.registry import BENCHMARKS
from research.benchmarks.rows import Recorder, latest, read
from research.benchmarks.tables import floor
from research.benchmarks.timing import Prepared, measure
from tests.reference import relative_error

pytestmark = pytest.mark.slow

FIELDS = {"benchmark", "method", "sizes", "clock", "hardware", "versions", "commit", "seed", "milliseconds", "figures"}


def command(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows of all benchmarks."""
    path = tmp_path_factory.mktemp("benchmarks")
    done = command(*BENCHMARKS, "--tiny", "--device", "cpu", "--out", path)
    assert done.exit_code == 0, done.output
    return path


@pytest.mark.parametrize("name", BENCHMARKS)
def test_rows(folder, name):
    rows = read(folder / f"{name}.jsonl")
    assert rows
    for row in rows:
        assert "error" not in row
        assert row.keys() >= FIELDS
        assert row["benchmark"] == name
        assert row["versions"].keys() >= {"python", "torch", "transformers", "peft"}
        times = row["milliseconds"]
        assert 0 < times["min"] <= times["median"] <= times["max"]
        assert times["repetitions"] >= 1
    assert len(latest(rows)) == len(rows), "two rows have the same method and sizes"


def test_methods(folder):
    """What each benchmark is there to compare."""
    methods = {name: {row["method"] for row in read(folder / f"{name}.jsonl")} for name in BENCHMARKS}
    assert methods["attention"] >= {"plain flash", "ours auto", "prefix-cat m=4", "prefix-merge m=4", "naive fp32"}
    assert methods["decode"] >= {"no prefix", "ours", "prefix m=32"}
    assert methods["generate"] == {"no adapter", "ours", "ours, blocks too", "LoRA q,v", "LoRA all linear"}
    assert methods["training"] >= {"frozen", "full", "LoRA q,v", "LoRA all linear", "ours", "ours calibrated"}
    assert methods["large"] >= {"bf16", "bf16, checkpointing", "bf16, torch.compile", "bf16, offloaded, checkpointing"}
    assert methods["adapters"] >= {
        "no adapter",
        "ours, active",
        "ours, 1 by name",
        "ours, 6 by name",
        "LoRA, 6 by name",
    }
    layers = {"plain layer", "ours layer", "ours layer, default", "LoRA q,v layer"}
    assert methods["host"] == {"plain", "ours", "ours, one thread", *layers}
    assert methods["processes"] == {*WAYS, "DDP, twice the batch"}
    figures = {row["method"]: row["figures"] for row in read(folder / "figure3.jsonl")}
    assert figures["ours"]["parameters"] == 32 * 32 + 32
    assert figures["prefix m=64"]["parameters"] == 64 * 32
    trained = {row["method"]: row["figures"]["trainable_parameters"] for row in read(folder / "training.jsonl")}
    assert trained["frozen"] == 0
    assert trained["full"] == llama("cpu", tiny=True).num_parameters()
    assert trained["ours"] == trained["ours calibrated"] == 2 * 4 * (9 * 8 + 9)  # layers, heads, Z and k
    assert trained["ours, blocks too"] == 2 * (4 * (9 * 1 + 1 * 8 + 9) + 3 * (32 + 64))
    assert trained["prefix m=4"] == 4 * 2 * 2 * 2 * 8  # tokens, layers, keys and values, KV heads, d


def test_processes_train_alike(folder):
    rows = {row["method"]: row["figures"] for row in read(folder / "processes.jsonl")}
    twice, alone = rows.pop("DDP, twice the batch"), rows["one process"]
    assert (twice["tokens"], alone["tokens"], twice["processes"], alone["processes"]) == (2 * 8 * 16, 8 * 16, 2, 1)
    for way, figures in rows.items():
        assert figures["processes"] == (1 if way == "one process" else 2)
        assert len(figures["losses"]) == STEPS
        assert figures["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert twice["losses"] != pytest.approx(alone["losses"], rel=1e-3)


def test_processes_that_fail_give_an_error(tmp_path, capfd):
    training = Training("one process", {"B": 8, "L": 16, "dtype": "float32", **TINY, "num_key_value_heads": 0})
    Launch("one process", [training]).run(Recorder(tmp_path, "processes", "cpu"), "cpu")
    (row,) = read(tmp_path / "processes.jsonl")
    assert row["error"].startswith("status 1: ZeroDivisionError")
    assert "Traceback" in capfd.readouterr().err


def test_report(folder):
    assert command("report", "--out", folder).exit_code == 0
    text = (folder / "README.md").read_text()
    for name in BENCHMARKS:
        assert f"## {name}: " in text
        picture = next(folder.glob(f"{name}-*.png"))
        assert f"({picture.name})" in text
        assert imread(picture).std() > 0.05  # something is drawn
    assert "ours, times the floor" in text
    assert "largest relative difference of a loss" in text
    assert "slower than ours from m =" in text
    assert "above plain, µs" in text


def test_existing_rows_are_kept(folder):
    path = folder / "figure3.jsonl"
    rows = path.read_text().splitlines()
    path.write_text("\n".join(rows[:-1]) + "\n")
    assert command("figure3", "--tiny", "--device", "cpu", "--out", folder).exit_code == 0
    resumed = path.read_text().splitlines()
    assert resumed[:-1] == rows[:-1]
    assert json.loads(resumed[-1])["method"] == json.loads(rows[-1])["method"]
    assert command("figure3", "--tiny", "--device", "cpu", "--out", folder, "--again").exit_code == 0
    assert len(read(path)) == 2 * len(rows)


def test_list_and_unknown_names(tmp_path):
    assert all(name in command("list").output for name in BENCHMARKS)
    done = command("attention", "speed", "--out", tmp_path)
    assert done.exit_code == 2
    assert "unknown benchmark 'speed'" in done.output
    assert not list(tmp_path.iterdir())
    done = command("report", "--out", tmp_path)
    assert done.exit_code == 2
    assert "has no rows" in " ".join(done.output.replace("│", " ").split())  # the panel breaks lines


def test_errors_become_results():
    def no_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64 GiB")

    def breaks_later():
        calls = iter([None, None, None])
        return Prepared(lambda: next(calls))

    def works():
        return Prepared(lambda: None, {"m": 3})

    setups = {"no memory": no_memory, "breaks later": breaks_later, "works": works}
    results = measure(setups, "cpu", "wall", repetitions=4, budget_ms=1e9)
    assert results["no memory"].error == "out of memory"
    assert results["breaks later"].error.startswith("StopIteration")
    assert results["works"].error is None
    assert results["works"].figures == {"m": 3}
    assert len(results["works"].milliseconds) == 4


@pytest.mark.parametrize(
    ("B", "H", "H_kv", "L", "m"), [(2, 4, 4, 10, 3), (2, 4, 2, 10, 40), (1, 4, 4, 10, 70)], ids=str
)
def test_prefix_attention(B, H, H_kv, L, m):
    """Both ways against the formula in float64, outputs and all gradients."""
    torch.manual_seed(0)
    shapes = ((B, H, L, 16), (B, H_kv, L, 16), (B, H_kv, L, 16), (1, H_kv, m, 16), (1, H_kv, m, 16))
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    grad = torch.randn(B, H, L, 16, dtype=torch.float64)

    def formula(query, key, value, prefix_key, prefix_value):
        key, value = (
            torch.cat([p.expand(B, -1, -1, -1), x], dim=2).repeat_interleave(H // H_kv, dim=1)
            for p, x in ((prefix_key, key), (prefix_value, value))
        )
        visible = torch.ones(L, m + L, dtype=torch.bool).tril(m)
        logits = (query @ key.transpose(-1, -2) / 4).masked_fill(~visible, -math.inf)
        return torch.softmax(logits, dim=-1) @ value

    def run(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = function(*leaves)
        return [out, *torch.autograd.grad(out, leaves, grad.to(dtype))]

    expected = run(formula, torch.float64)
    for way in (prefix_merge, lambda *leaves: prefix_cat(*leaves, causal_lower_right(L, m + L))):
        errors = [relative_error(a, e) for a, e in zip(run(way, torch.float32), expected, strict=True)]
        assert max(errors) < 1e-5, errors


def test_bounds_and_floor():
    sizes = {"B": 1, "L": 2, "H": 2, "H_kv": 1, "d": 4, "dtype": "bfloat16", "mode": "forward+backward"}
    bounds = lower_bounds(sizes)
    product = 2 * 2 * 4 * 3  # multiply and add, heads, d, visible pairs
    assert bounds["plain"]["flops"] == [2 * product, 5 * product]
    query, key, lse = 2 * 2 * 2 * 4, 2 * 2 * 4, 4 * 2 * 2
    assert bounds["plain"]["bytes"] == [2 * query + 2 * key + lse, 4 * query + 4 * key + lse]
    state = 4 * 2 * 5 * (4 + 1)
    assert bounds["ours"]["bytes"][0] - bounds["plain"]["bytes"][0] == state
    figures = {"bounds": {"plain": {"bytes": [50, 60], "flops": [1, 9]}}}
    rows = [
        {"method": "ceiling copy", "milliseconds": {"median": 2.0}, "figures": {"bytes": 20}},
        {"method": "ceiling matmul", "milliseconds": {"median": 1.0}, "figures": {"flops": 1}},
        {"method": "plain slow", "milliseconds": {"median": 9.0}, "figures": {}},
        {"method": "plain fast", "milliseconds": {"median": 3.0}, "figures": figures},
        {"method": "plain none", "error": "unsupported"},
    ]
    best = fastest({row["method"]: row for row in rows}, "plain")
    assert median(best) == 3.0
    assert floor(best, rows) == 5.0 + 9.0  # bytes bind in the first pass, operations in the second
