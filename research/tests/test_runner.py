"""However a worker process ends, its cell is one that failed, the others have their rows, and the run has an end."""

import multiprocessing
import os
import signal
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from types import SimpleNamespace

import pytest

from research.experiments import runner

from .dying import ENDS, LARGE, Cell, serve

REAL_SERVE = runner.serve
TASK = SimpleNamespace(name="task", steps=7)
ERRORS = {
    "exits": "the process died with exit code 3 (EOFError)",
    "leaves": "the process died with exit code 4 (EOFError)",
    "raises": "the process died with exit code 1 (EOFError)",
    "is killed": "the process died of SIGKILL (EOFError)",
    "aborts": "the process died of SIGABRT (EOFError)",
    "closes": "the process was stopped (EOFError)",
    "sends half": "the process died with exit code 0 (OSError: got end of file during message)",
    "sends half and leaves a child": "the process died of SIGKILL (OSError: got end of file during message)",
    "sends half slowly": "the process died with exit code 5 (OSError: got end of file during message)",
    "sends no pickle": "the process was stopped (UnpicklingError: ",
    "sends an unknown class": "the process was stopped (ModuleNotFoundError: No module named 'nowhere')",
    "sends a lambda": "the process died with exit code 1 (EOFError)",
    "is killed and leaves a child": "the process died of SIGKILL (EOFError)",
}


@pytest.fixture(autouse=True)
def workers(monkeypatch):
    monkeypatch.setattr(runner, "serve", serve)
    monkeypatch.setattr(runner, "GRACE", 0.5)
    monkeypatch.setattr(runner, "LOOK_AGAIN", 0.2)


def run(methods, jobs=2, always=False, on_row=lambda row: None):
    """Rows by method and seed; `always` plans every cell again, whether it has a row or not."""
    cells = [Cell("task", method, seed=i) for i, method in enumerate(methods)]
    rows = {}

    def write(row):
        key = row["method"], row["seed"]
        assert key not in rows
        rows[key] = row
        on_row(row)

    def planner():
        return [(cell, TASK) for cell in cells if always or (cell.method, cell.seed) not in rows]

    deadline = time.monotonic() + 120
    runner.run_jobs(planner, "cpu", write, deadline, jobs)
    assert time.monotonic() < deadline
    assert rows.keys() == {(cell.method, cell.seed) for cell in cells}
    assert all(row["steps"] == 7 for row in rows.values())
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 3])
def test_every_way_to_end(jobs):
    assert ERRORS.keys() == ENDS.keys()
    methods = [name for end in ENDS for name in (end, "works")]
    for (method, _), row in run(methods, jobs).items():
        if method == "works":
            assert "error" not in row
        else:
            assert row["error"].startswith(ERRORS[method]), row["error"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("is stopped", "TimeoutError: stopped by a signal at the deadline"),
        ("sends half and goes on", "TimeoutError: half a message at the deadline"),
        ("ignores SIGTERM", None),  # it works, and is lost as others are
    ],
)
def test_a_process_that_would_stay(method, error, tmp_path, monkeypatch):
    """The deadline comes a second after the process has come to that, however long it took."""
    note, rows, since = tmp_path / "note", [], []

    def clock():
        if note.exists():
            since.append(time.monotonic())
        return since[-1] - since[0] if since else 0.0

    monkeypatch.setattr(runner, "time", SimpleNamespace(monotonic=clock))
    cell = Cell(str(note), method)
    runner.run_jobs(lambda: [] if rows else [(cell, TASK)], "cpu", rows.append, 1.0, 1)
    assert time.monotonic() - since[0] < 60
    assert not multiprocessing.active_children()
    assert [row["error"] for row in rows] == ([f"the process was stopped ({error})"] if error else [])


def test_no_cell_is_begun_that_would_be_lost():
    """Cells say that they take 100 seconds, and 60 are left; those that run meanwhile have their rows."""
    cells, rows = [Cell("task", "takes long", seed=i) for i in range(5)], []
    runner.run_jobs(lambda: [(cell, TASK) for cell in cells], "cpu", rows.append, time.monotonic() + 60, 2)
    assert 1 <= len(rows) <= 3  # the second process may have been given another one meanwhile
    assert not any("error" in row for row in rows)
    assert not multiprocessing.active_children()
    lengths = runner.Lengths()
    assert lengths.of((cells[0], TASK)) == 0.0
    for task, seconds in (("short", 5.0), ("long", 90.0), ("short", 4.0)):
        lengths.add({"task": task, "seconds": seconds})
    lengths.add({"task": "failed", "error": "OutOfMemoryError"})
    assert [lengths.of((Cell(task, "ntk"), TASK)) for task in ("short", "long", "failed")] == [5.0, 90.0, 90.0]


def test_a_worker_leaves_at_sigterm():
    """In the middle of a cell, by its own end, quietly."""
    reader, writer = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=interrupted, args=(writer,))
    process.start()
    assert reader.recv() == "busy"
    process.terminate()
    process.join(60)
    assert process.exitcode == 0
    assert reader.recv() == "cleaned up"


def interrupted(connection):
    """A worker whose cell never ends; what cleans up behind it stands for what frees the GPU."""

    class Endless:
        def __init__(self, device):
            pass

        def __call__(self, cell, task):
            try:
                connection.send("busy")
                time.sleep(600)
            except Exception:
                connection.send("taken for a failure")
            finally:
                connection.send("cleaned up")

    runner.Worker, runner.registry, runner.replace = Endless, lambda: {"task": None}, lambda task, steps: task
    theirs, ours = multiprocessing.Pipe()
    ours.send((Cell("task", "works"), 1))
    REAL_SERVE(theirs, "cpu", 1, 0)


def test_large_rows():
    rows = run(["sends a large row", "works", "sends a large row"], jobs=1)
    assert sorted(len(row.get("filling", "")) for row in rows.values()) == [0, LARGE, LARGE]


def test_a_cell_that_always_kills_is_run_once():
    rows = run(["is killed", "works", "is killed"], always=True)
    assert Counter("error" in row for row in rows.values()) == {True: 2, False: 1}


def test_processes_that_die_while_they_wait():
    """With one at a time, the next cell comes to a process that is dead, or dies with the cell unread."""
    rows = run(["answers and exits", "works", "answers and leaves the next unread", "works", "works"], jobs=1)
    errors = {seed: row["error"] for (_, seed), row in rows.items() if "error" in row}
    assert errors.keys() - {1} == {3}  # the second one may find its process dying
    assert errors[3] == "the process died with exit code 0 (ConnectionResetError: [Errno 104] Connection reset by peer)"


def test_a_process_that_dies_unseen(monkeypatch):
    """It looks alive until the cell is sent."""

    def wait_for_the_end(row):
        if row["method"] == "answers and exits":
            for child in multiprocessing.active_children():
                child.join()

    with monkeypatch.context() as patch:
        patch.setattr(runner.Process, "is_alive", lambda self: True)
        rows = run(["answers and exits", "works", "works"], jobs=1, on_row=wait_for_the_end)
    assert [seed for (_, seed), row in rows.items() if "error" in row] == [1]
    assert "BrokenPipeError" in rows["works", 1]["error"]


def test_killed_from_outside():
    killed = []

    def kill(row):
        if not killed:
            killed.append(row["process"])
            os.kill(row["process"], signal.SIGKILL)

    rows = run(["works"] * 6, jobs=1, on_row=kill)
    assert sum("error" in row for row in rows.values()) <= 1
    assert len({row["process"] for row in rows.values() if "process" in row}) == 2


@pytest.mark.parametrize("jobs", [1, 2])
def test_processes_that_cannot_be_started(jobs, monkeypatch):
    start, started = BaseProcess.start, []

    def fails_twice(self):
        started.append(self)
        if len(started) in (1, 3):
            raise BlockingIOError(11, "Resource temporarily unavailable")
        start(self)

    monkeypatch.setattr(BaseProcess, "start", fails_twice)
    rows = run(["works", "exits", "works", "works", "works"], jobs)
    errors = [row["error"] for row in rows.values() if "error" in row]
    assert len(errors) == 3
    assert sum("no process can be started: BlockingIOError: [Errno 11]" in error for error in errors) == 2


def test_nothing_can_be_started(monkeypatch):
    monkeypatch.setattr(BaseProcess, "start", lambda self: (_ for _ in ()).throw(OSError(12, "Cannot allocate memory")))
    assert all("Cannot allocate memory" in row["error"] for row in run(["works"] * 4).values())
