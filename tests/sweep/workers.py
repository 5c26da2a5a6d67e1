"""Every model type in its own process, which can be killed: for time, for memory, or because it crashed.

The processes are forks of this one, which has torch and transformers imported and never computes, so that none pays for
the imports. What a process says on the way tells what it was doing when it died.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import selectors
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

Row = dict[str, Any]
Task = Callable[[str, Callable[[str], None]], Row]  # a name and a function that is told each stage


@dataclass
class Worker:
    """A process and what it has said so far."""

    name: str
    pid: int
    pipe: int
    started: float
    heard: bytearray = field(default_factory=bytearray)

    @property
    def lines(self) -> list[Any]:
        complete = bytes(self.heard).split(b"\n")[:-1]
        return [json.loads(line) for line in complete]

    def row(self) -> Row | None:
        return next((line for line in self.lines if isinstance(line, dict)), None)

    def stage(self) -> str:
        return next((line for line in reversed(self.lines) if isinstance(line, str)), "start")


def run_all(
    names: Sequence[str], task: Task, *, jobs: int, seconds: float, gigabytes: float
) -> Iterator[tuple[str, Row | None, str, str]]:
    """Do the task for each name, several at a time.

    Args:
        seconds: after which a process is ended.
        gigabytes: of memory that a process can have.

    Yields:
        Name, the task's row or None, the last stage, and how the process ended where there is no row.
    """
    waiting = list(reversed(names))
    running: dict[int, Worker] = {}
    selector = selectors.DefaultSelector()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                worker = start(waiting.pop(), task, seconds, gigabytes)
                running[worker.pipe] = worker
                selector.register(worker.pipe, selectors.EVENT_READ)
            for key, _ in selector.select():
                worker = running[key.fd]
                said = os.read(worker.pipe, 1 << 16)
                worker.heard += said
                if not said:
                    selector.unregister(worker.pipe)
                    del running[worker.pipe]
                    yield worker.name, worker.row(), worker.stage(), end(worker)
    finally:
        for worker in running.values():
            os.kill(worker.pid, signal.SIGKILL)
            end(worker)
        selector.close()


def start(name: str, task: Task, seconds: float, gigabytes: float) -> Worker:
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        os.close(writing)
        return Worker(name, pid, reading, time.monotonic())
    try:
        os.close(reading)
        # Of the kernel, so that it also ends what hangs in C, and what has lost its parent.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        quieten(gigabytes)
        with os.fdopen(writing, "w") as pipe:

            def say(line: Any) -> None:
                pipe.write(json.dumps(line, default=str) + "\n")
                pipe.flush()

            say(task(name, say))
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.write(2, f"{name}: {type(error).__name__}: {error}\n".encode())
        os._exit(1)
    os._exit(0)


def quieten(gigabytes: float) -> None:
    """What a process of our own wants: one thread, limited memory, the first to be killed, no words but rows."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (int(gigabytes * 2**30),) * 2)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def end(worker: Worker) -> str:
    """Wait for the process; how it ended, in words."""
    _, status = os.waitpid(worker.pid, 0)
    os.close(worker.pipe)
    seconds = time.monotonic() - worker.started
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name} after {seconds:.0f} s"
    return f"ended with status {os.WEXITSTATUS(status)} after {seconds:.0f} s"
