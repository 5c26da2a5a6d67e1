"""Checkpoints that are whole or not there, and a folder that only one run writes into."""

import multiprocessing
import os
import resource
import shutil
import subprocess
import sys

import pytest

from ntk_attention.cli import finetuning, run_folder
from ntk_attention.cli.finetuning import Settings, finetune
from ntk_attention.cli.run_folder import (
    CHECKPOINTS,
    CONTENTS,
    LOCK,
    check_folder,
    is_whole,
    last_good_checkpoint,
    locked,
    move,
    seal,
    write_json,
)
from ntk_attention.cli.trainer import AdapterTrainer
from tests.tiny import save_letters


@pytest.fixture
def settings(model_folder, tmp_path):
    data = save_letters(tmp_path / "letters.jsonl")
    return Settings(
        str(model_folder),
        str(data),
        items=100,
        held_out=10,
        epochs=2,
        batch_size=8,
        learning_rate=0.1,
        max_new_tokens=4,
    )


def checkpoint(folder, step):
    path = folder / f"checkpoint-{step}"
    (path / "inside").mkdir(parents=True)
    (path / "weights").write_bytes(bytes(range(100)))
    (path / "inside" / "state").write_text("state")
    seal(path)
    return path


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "weights").write_bytes(b"x"),
        lambda path: (path / "weights").write_bytes(bytes(reversed(range(100)))),
        lambda path: (path / "inside" / "state").unlink(),
        lambda path: (path / CONTENTS).unlink(),
        lambda path: (path / CONTENTS).write_text("{"),
        lambda path: (path / CONTENTS).write_text("{}"),
        lambda path: shutil.rmtree(path),
    ],
    ids=["short", "other bytes", "file missing", "no list", "half a list", "empty list", "gone"],
)
def test_the_last_whole_checkpoint_is_taken(damage, tmp_path):
    for step in (9, 10, 100):  # by number, not by name
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-half").mkdir()
    assert last_good_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    damage(tmp_path / "checkpoint-100")
    assert not is_whole(tmp_path / "checkpoint-100")
    assert last_good_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_no_checkpoint(tmp_path):
    assert last_good_checkpoint(tmp_path / "nothing") is None


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "x.json", [1])
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", [object()])
    assert (tmp_path / "x.json").read_text() == "[\n 1\n]\n"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("b")
    move(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "c" / "b").read_text() == "b"


def hold(folder, is_held, release):
    with locked(folder):
        is_held.set()
        release.wait(60)


@pytest.mark.slow
def test_two_runs_into_one_folder(settings, tmp_path):
    context = multiprocessing.get_context("spawn")
    is_held, release = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / "out", is_held, release))
    other.start()
    try:
        assert is_held.wait(60)
        with pytest.raises(ValueError, match=r"another run is writing into .*out: wait for it"):
            finetune(settings, tmp_path / "out")
    finally:
        other.kill()  # a lock dies with its process
        other.join()
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {LOCK}
    finetune(settings, tmp_path / "out")


def test_a_target_that_cannot_be_written_to(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "FREE_BYTES", -1)  # there is no room either in /proc
    with pytest.raises(ValueError, match=r"/proc/.* cannot be written to"):
        finetune(settings, "/proc" / tmp_path.relative_to("/"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="cannot be written to"):
        check_folder(tmp_path / "out", {}, resume=False, overwrite=False)


@pytest.mark.slow
def test_a_disk_that_fills_up_in_a_checkpoint(settings, tmp_path, monkeypatch):
    """The system itself refuses to write more than some bytes of a file; then there is room again."""
    save = AdapterTrainer._save_checkpoint
    full_at = 12

    def on_a_full_disk(self, *args):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if self.state.global_step == full_at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        try:
            save(self, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    whole = finetune(settings, tmp_path / "whole")
    good = tmp_path / "out" / CHECKPOINTS / f"checkpoint-{full_at - 1}"
    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, "_save_checkpoint", on_a_full_disk)
        with pytest.raises(
            ValueError, match=f"the checkpoint of step {full_at} cannot be written .*good .* is {good} "
        ):
            finetune(settings, tmp_path / "out")
    assert last_good_checkpoint(good.parent) == good
    assert finetune(settings, tmp_path / "out", resume=True)["train_loss"] == whole["train_loss"]


@pytest.mark.slow
def test_a_half_written_checkpoint_is_skipped(settings, tmp_path, monkeypatch):
    """As an interrupted copy of the folder leaves it; and a run that was stopped after its last step."""
    whole = finetune(settings, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "save_whole", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            finetune(settings, tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    last = tmp_path / "copy" / CHECKPOINTS / "checkpoint-19"
    (last / "optimizer.pt").write_bytes((last / "optimizer.pt").read_bytes()[:100])
    for folder in ("out", "copy"):
        record = finetune(settings, tmp_path / folder, resume=True)
        assert record["train_loss"] == whole["train_loss"]
        assert record["after"] == whole["after"]


@pytest.mark.slow
def test_killed_and_resumed():
    """Four kills; `python -m tests.cli.kills` makes thirty."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.cli.kills", "--kills", "4", "--seed", "3"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "every end bit-equal" in result.stdout
