"""The sweep over model types: its machinery finds what is wrong, and a fixed eighth of all types has nothing wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ntk_attention import NTKAttentionModel
from ntk_attention.tuner.routing import ROUTE, ntk_attention_forward
from tests.sweep import checks, rows
from tests.sweep.__main__ import chosen, died, main
from tests.sweep.build import builds, class_names, model_types
from tests.sweep.examine import IN_PART, NOT_BUILT, RESULTS, SILENT, WORKS, examine, find_subject
from tests.sweep.outputs import deviation, difference
from tests.sweep.report import report
from tests.sweep.subject import REFUSED, UNCLEAR
from tests.sweep.workers import run_all

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NAMED = (
    "llama,qwen2,qwen3,mistral,gemma2,gemma3_text,gpt2,gpt_neox,opt,whisper,t5,bart,bert,roberta,distilbert,albert,"
    "modernbert,vit,deit,dinov2,clip,siglip,gpt_oss,glm4"
)
EIGHTH, CHUNKS = "1/8", 4  # chunks, since each is one test and so on one core
WRONG = (SILENT, UNCLEAR)


def with_function(monkeypatch, function):
    """Give routed modules another attention function."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, ROUTE, function)


def sees_the_future(module, query, key, value, attention_mask, **options):
    return ntk_attention_forward(module, query, key, value, torch.zeros(1, 1, query.shape[2], key.shape[2]), **options)


def scales_always(module, *args, **options):
    out, weights = ntk_attention_forward(module, *args, **options)
    return out * 1.001, weights


def forgets_the_cache(module, query, key, value, attention_mask, **options):
    if query.shape[2] == 1 < key.shape[2]:
        key, value, attention_mask = key[:, :, 1:], value[:, :, 1:], None
    return ntk_attention_forward(module, query, key, value, attention_mask, **options)


def detaches(module, query, key, value, attention_mask, **options):
    out, weights = ntk_attention_forward(module, query, key, value, attention_mask, **options)
    return out.detach() + 0 * query.sum(), weights


@pytest.mark.parametrize(
    ("function", "failing"),
    [
        (sees_the_future, {"causal", "weightless", "padding left"}),
        (scales_always, {"disabled", "weightless"}),
        (forgets_the_cache, {"cache dynamic"}),
        (detaches, {"training step"}),
    ],
)
def test_a_wrong_attention_function_is_found(monkeypatch, function, failing):
    with_function(monkeypatch, function)
    row = examine("llama")
    assert row["result"] == SILENT
    found = {name for name, check in row["checks"].items() if check["status"] == "wrong"}
    assert failing <= found, found
    assert all(f"{name}: " in row["reason"] for name in failing)


def test_errors_are_told_from_refusals(monkeypatch):
    def fails(*args, **options):
        raise KeyError("heads")

    with_function(monkeypatch, fails)
    row = examine("llama")
    assert row["result"] == UNCLEAR
    assert "KeyError: 'heads'" in row["reason"]
    monkeypatch.undo()
    row = examine("bloom")
    assert row["result"] == REFUSED
    assert "BloomForCausalLM" in row["reason"]


def subject_of(model_type):
    subject = find_subject(model_type, {}, [])
    assert subject is not None
    return subject


def test_an_adapter_that_is_another_after_saving_is_found(monkeypatch):
    subject, save = subject_of("llama"), PeftModel.save_pretrained
    assert checks.saved_and_loaded(subject).status == "passed"

    def saves_another(self, folder):
        with torch.no_grad():
            next(p for p in self.parameters() if p.requires_grad).add_(0.1)
        save(self, folder)

    monkeypatch.setattr(PeftModel, "save_pretrained", saves_another)
    assert checks.saved_and_loaded(subject).status == "wrong"


def test_an_adapter_that_stays_after_unload_is_found(monkeypatch):
    subject = subject_of("llama")
    assert checks.unloaded(subject).status == "passed"
    monkeypatch.setattr(NTKAttentionModel, "unload", lambda self: self.model)
    found = checks.unloaded(subject)
    assert found.status == "wrong"
    assert "modules changed" in found.detail


def test_a_calibration_that_spoils_outputs_is_found(monkeypatch):
    subject = subject_of("llama")

    def spoils(model, batches):
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))

    monkeypatch.setattr(checks, "calibrate", spoils)
    assert checks.calibrated(subject).status == "wrong"


def test_a_tower_without_inputs_works_in_part():
    row = examine("gemma3")
    assert row["result"] in (WORKS, IN_PART)
    if row["result"] == IN_PART:
        assert row["missing"] or row["left_out"] or row["unreached"]


def test_models_are_the_same_each_time_and_far_from_uniform():
    first, again = (next(builds("qwen2", [])).model for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert first.config.num_hidden_layers == 2
    ids = torch.arange(8, 24)[None]
    logits = first(input_ids=ids).logits
    assert logits.isfinite().all()
    assert logits.std(dim=1).mean() > 0.1


def test_the_most_useful_class_comes_first():
    assert class_names("llama")[0] == "LlamaForCausalLM"
    assert class_names("whisper")[0] == "WhisperForConditionalGeneration"
    assert class_names("t5")[0] == "T5ForConditionalGeneration"


def test_differences_are_relative_and_notice_what_is_missing():
    x = torch.tensor([1.0, -10.0, float("-inf")])
    assert deviation(x, x) == 0
    assert deviation(x, x + torch.tensor([0.1, 0.0, 0.0])) == pytest.approx(0.01)
    assert deviation(x, torch.tensor([float("nan"), -10.0, float("-inf")])) == float("inf")
    assert deviation(x, x[:2]) == float("inf")
    assert difference({"a": x}, {}) == float("inf")


def test_shards_are_a_partition_that_new_types_do_not_move():
    names = model_types()
    parts = [rows.shard_of(names, f"{i}/8") for i in range(1, 9)]
    assert sorted(name for part in parts for name in part) == sorted(names)
    assert all(len(names) / 16 < len(part) < len(names) / 4 for part in parts)
    with_more = rows.shard_of([*names, "a_new_type"], EIGHTH)
    assert set(parts[0]) <= set(with_more)
    for wrong in ("0/8", "9/8", "8", "a/b", "1/0"):
        with pytest.raises(ValueError, match="from 1/8 to 8/8"):
            rows.shard_of(names, wrong)
    with pytest.raises(ValueError, match="no model type nothing"):
        chosen("llama,nothing", None)
    assert main(["--types", "nothing"]) == 2


def row_of(name, result=WORKS, **fields):
    stamp = {"versions": {"torch": "1"}, "sources": "a", "commit": "c"}
    return {"type": name, "result": result, "reason": "", **stamp, **fields}


def test_rows_of_shards_are_merged_and_half_a_line_is_forgotten(tmp_path):
    one, two, three = (tmp_path / f"{i}.jsonl" for i in range(3))
    rows.write(one, {"b": row_of("b"), "a": row_of("a", SILENT)})
    rows.write(two, {"a": row_of("a")})
    two.write_text(two.read_text() + '{"type": "ha')
    merged = rows.merged([one, two])
    assert {name: row["result"] for name, row in merged.items()} == {"a": WORKS, "b": WORKS}
    rows.write(three, {"c": row_of("c", versions={"torch": "2"})})
    with pytest.raises(ValueError, match="different versions"):
        rows.merged([one, three])
    with pytest.raises(ValueError, match="not there"):
        rows.merged([tmp_path / "none"])
    one.write_text("nonsense\n" + one.read_text())
    with pytest.raises(ValueError, match="line 1"):
        rows.read(one)


def run_sweep(*arguments):
    environment = {**os.environ, "PYTHONPATH": f"src{os.pathsep}."}
    command = [sys.executable, "-m", "tests.sweep", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_run_goes_on_where_it_was(tmp_path):
    path = tmp_path / "rows.jsonl"
    done = run_sweep("--types", "llama,bloom", "--rows", path, "--jobs", 1)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 model types to run" in done.stderr
    assert "[##############################] 2/2" in done.stderr
    first = rows.read(path)
    assert {name: row["result"] for name, row in first.items()} == {"llama": WORKS, "bloom": REFUSED}
    assert {"torch", "transformers", "peft"} == set(first["llama"]["versions"])
    path.write_text(path.read_text() + '{"type": "op')
    done = run_sweep("--types", "llama,bloom,gpt2", "--rows", path, "--jobs", 1)
    assert "1 of 3 model types to run" in done.stderr
    assert rows.read(path) | first == rows.read(path)
    done = run_sweep("--types", "bloom", "--rows", path, "--again")
    assert "1 of 1 model types to run" in done.stderr
    assert rows.read(path)["bloom"] == first["bloom"]


def test_a_process_that_hangs_crashes_or_grows_is_ended():
    def task(name, say):
        say("build")
        if name == "hangs":
            say("a stage")
            time.sleep(60)
        if name == "crashes":
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "grows":
            return {"type": name, "size": len(bytearray(4 << 30))}
        return {"type": name}

    started = time.monotonic()
    names = ["works", "hangs", "crashes", "grows"]
    found = {n: rest for n, *rest in run_all(names, task, jobs=2, seconds=3.0, gigabytes=2.0)}
    assert time.monotonic() - started < 20
    assert found["works"][0] == {"type": "works"}
    assert found["hangs"][0] is None
    assert found["hangs"][1:] == ["a stage", "killed by SIGALRM after 3 s"]
    assert found["crashes"][2].startswith("killed by SIGKILL")
    assert found["grows"][0] is None
    assert died("hangs", *found["hangs"][1:])["result"] == NOT_BUILT
    assert died("killed", "a stage", "killed by SIGKILL after 3 s")["result"] == UNCLEAR
    assert died("crashes", *found["crashes"][1:])["result"] == NOT_BUILT


def test_the_report_has_a_line_for_every_type():
    text = report(
        {
            "llama": row_of("llama", adapted={"LlamaAttention": 2}, position_shift=[1e-7, 0.25], **{"class": "X"}),
            "bloom": row_of("bloom", REFUSED, reason="no | module\nroutes"),
            "odd": row_of("odd", NOT_BUILT, reason="x" * 1000),
        }
    )
    lines = text.splitlines()
    assert "| llama | X | works | 2 LlamaAttention |  | 1e-07 / 0.25 |" in lines
    assert any(line.startswith("| bloom |") and "no \\| module routes" in line for line in lines)
    assert max(map(len, lines)) < 500
    for name in RESULTS:
        assert any(line.startswith(f"| {name} | {int(name in (WORKS, REFUSED, NOT_BUILT))} |") for line in lines)


def chunk_of(names, number):
    return names[number::CHUNKS]


def nothing_is_wrong(names, tmp_path):
    path = tmp_path / "rows.jsonl"
    done = run_sweep("--types", ",".join(names), "--rows", path, "--jobs", 1)
    found = rows.read(path)
    assert set(found) == set(names), done.stderr[-2000:]
    bad = {name: row["reason"] for name, row in found.items() if row["result"] in WRONG}
    assert not bad, json.dumps(bad, indent=1)
    assert done.returncode == 0
    return found


def test_nothing_is_wrong_with_the_families_that_are_named(tmp_path):
    found = nothing_is_wrong(NAMED.split(","), tmp_path)
    assert all(row["result"] in (WORKS, IN_PART) for row in found.values()), found


@pytest.mark.parametrize("number", range(CHUNKS))
def test_nothing_is_wrong_with_an_eighth_of_all_types(tmp_path, number):
    nothing_is_wrong(chunk_of(chosen(None, EIGHTH), number), tmp_path)
