"""Runs cells side by side: several processes on every GPU, each with the base models it has met in memory."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import signal
import struct
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch

from research.recording import Row

from .plan import is_result
from .registry import registry
from .tasks import Base, Task
from .train import Cell, run_cell

Job = tuple[Cell, Task]
Planner = Callable[[], list[Job]]  # what can be run now, the most wanted first, given the rows written so far
GRACE = 15.0  # seconds that a process has for its own end, and for what it has given the GPU to do
SHORT, LONG = struct.Struct("!i"), struct.Struct("!Q")  # sizes of messages, the latter after a short one of -1
READ_AT_ONCE = 2**16
LOOK_AGAIN = 30.0  # seconds: a process that is dead is noticed then, even if a child of it keeps its pipe open


class Worker:
    """Runs cells in this process and never raises: what goes wrong becomes the error of the row."""

    def __init__(self, device: str):
        warnings.filterwarnings("ignore")
        logging.getLogger("transformers").setLevel(logging.ERROR)
        self.device = device
        self.bases: dict[Any, Base] = {}

    def __call__(self, cell: Cell, task: Task) -> Row:
        try:
            return run_cell(cell, task, self.base(task), self.device)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            text = next(iter(str(error).splitlines()), "")
            return {**asdict(cell), "steps": task.steps, "error": f"{type(error).__name__}: {text}"}
        finally:
            if self.device == "cuda":
                torch.cuda.empty_cache()  # the next cell may need less, and other processes are on the same GPU

    def base(self, task: Task) -> Base:
        key = (type(task), task.model, task.data if task.has_head else None)
        if key not in self.bases:
            self.bases[key] = task.load(self.device)
        return self.bases[key]


def serve(connection: Connection, device: str, threads: int, number: int) -> None:
    """The life of a worker process. Workers are dealt to the GPUs in turn."""
    signal.signal(signal.SIGTERM, interrupt)
    torch.set_num_threads(threads)
    if device == "cuda":
        torch.cuda.set_device(number % torch.cuda.device_count())
    worker, tasks = Worker(device), registry()
    with suppress(KeyboardInterrupt):
        while True:
            cell, steps = connection.recv()
            connection.send(worker(cell, replace(tasks[cell.task], steps=steps)))


def interrupt(number: int, frame: object) -> None:
    """A worker leaves the GPU as any program does: one that is killed may break those beside it, under MPS."""
    raise KeyboardInterrupt


def run_inline(planner: Planner, device: str, write: Callable[[Row], None], deadline: float) -> None:
    """One after another in this process, each of which should have its row by the deadline."""
    worker, lengths = Worker(device), Lengths()
    while ready := [job for job in planner() if time.monotonic() + lengths.of(job) < deadline]:
        row = worker(*ready[0])
        lengths.add(row)
        write(row)


class Lengths:
    """How long cells last, in seconds: the longest of the same task, or of all where there is none."""

    def __init__(self) -> None:
        self.by_task: dict[str, float] = {}

    def add(self, row: Row) -> None:
        if "seconds" in row:
            self.by_task[row["task"]] = max(self.by_task.get(row["task"], 0.0), row["seconds"])

    def of(self, job: Job) -> float:
        return self.by_task.get(job[0].task, max(self.by_task.values(), default=0.0))


class Process:
    """A worker process and the cell that it runs.

    Nothing that it does makes this process wait: a connection's own `recv` would, for the rest of a message that never
    comes, as long as anything holds the other end.
    """

    def __init__(self, device: str, threads: int, number: int):
        context = multiprocessing.get_context("spawn")
        self.number = number
        self.job: Job | None = None
        self.read = bytearray()  # of a message that is on its way
        self.connection, theirs = context.Pipe()
        os.set_blocking(self.connection.fileno(), False)
        self.process = context.Process(target=serve, args=(theirs, device, threads, number), daemon=True)
        try:
            self.process.start()
        except BaseException:
            self.connection.close()
            raise
        finally:
            theirs.close()

    def is_alive(self) -> bool:
        return self.process.is_alive()

    def send(self, job: Job) -> None:
        self.job = job
        cell, task = job
        self.connection.send((cell, task.steps))  # a recipe's functions do not travel

    def receive(self) -> Row | None:
        """The row of its cell, or none while it works. Raises whatever may go wrong between two processes."""
        was_alive = self.is_alive()  # it may answer and die in between
        is_open = self.read_on()
        message, self.read = first_message(self.read)
        if message is not None:
            return ForkingPickler.loads(message)
        if was_alive and is_open:
            return None
        raise OSError("got end of file during message") if self.read else EOFError

    def read_on(self) -> bool:
        """Take what has come so far; whether more may come."""
        while True:
            try:
                found = os.read(self.connection.fileno(), READ_AT_ONCE)
            except BlockingIOError:
                return True
            if not found:
                return False
            self.read += found

    def hangs(self) -> str | None:
        """What keeps it from ever giving a row, if anything can be seen to."""
        if self.read:
            return "half a message"
        try:
            state = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # it has ended, or the system keeps no such files
            return None
        return "stopped by a signal" if state == "T" else None

    def end(self) -> str:
        """Stop the process, if it has not died, and say how it ended."""
        self.process.join(GRACE)  # one that has closed its end is about to die
        died = not self.is_alive()
        self.process.kill()
        self.process.join()
        self.connection.close()
        code = self.process.exitcode or 0
        if not died:
            return "the process was stopped"
        names = {number.value: number.name for number in signal.Signals}
        return f"the process died {f'of {names.get(-code, -code)}' if code < 0 else f'with exit code {code}'}"


class Running:
    """The processes of a run and what became of their cells.

    However a process ends, the cell that it had is one that failed, and others go on. No cell is run twice. Where one
    has failed the process is ended: what it holds of a device may be broken.
    """

    def __init__(self, device: str, write: Callable[[Row], None], jobs: int):
        self.device, self.write = device, write
        self.threads = max(1, (os.cpu_count() or 1) // jobs)
        self.processes: list[Process] = []
        self.finished: set[Cell] = set()
        self.lengths = Lengths()

    @property
    def working(self) -> list[Process]:
        return [process for process in self.processes if process.job]

    def ready(self, planned: list[Job], deadline: float) -> list[Job]:
        """Those that have not begun, and that should have their rows in time."""
        begun = {process.job[0] for process in self.working if process.job} | self.finished
        now = time.monotonic()
        return [job for job in planned if job[0] not in begun and now + self.lengths.of(job) < deadline]

    def begin(self, jobs: list[Job]) -> None:
        for job in jobs:
            process = None
            try:
                process = idle(self.processes) or started(self.processes, self.device, self.threads)
                process.send(job)
            except Exception as error:
                self.fail(job, process, error)
                if process is None:
                    break  # others would fare no better now

    def collect(self, timeout: float) -> None:
        """The rows that have come."""
        working = self.working
        wait([process.connection for process in working], timeout=timeout)
        for process in working:
            assert process.job
            try:
                row = process.receive()
            except Exception as error:
                self.fail(process.job, process, error)
                continue
            if row is not None:
                job, process.job = process.job, None
                self.finish(job, row)
                if not is_result(row):
                    end_all([self.processes.pop(self.processes.index(process))])

    def finish(self, job: Job, row: Row) -> None:
        self.finished.add(job[0])
        self.lengths.add(row)
        self.write(row)

    def fail(self, job: Job, process: Process | None, error: Exception) -> None:
        text = f"{type(error).__name__}: {error}".removesuffix(": ")
        if process is None:
            text = f"no process can be started: {text}"
        else:
            self.processes.remove(process)
            text = f"{process.end()} ({text})"
        self.finish(job, {**asdict(job[0]), "steps": job[1].steps, "error": text})


def run_jobs(planner: Planner, device: str, write: Callable[[Row], None], deadline: float, jobs: int) -> None:
    """Until nothing is left to run, or the deadline has come: then what is still running is lost, and what hangs fails.

    No cell is begun that should not have its row by then.
    """
    running = Running(device, write, jobs)
    try:
        while time.monotonic() < deadline:
            ready = running.ready(planner(), deadline)
            running.begin(ready[: jobs - len(running.working)])
            if running.working:
                running.collect(min(max(0.0, deadline - time.monotonic()), LOOK_AGAIN))
            elif not ready:
                return
        for process in running.working:
            if process.job and (reason := process.hangs()):
                running.fail(process.job, process, TimeoutError(f"{reason} at the deadline"))
    finally:
        end_all(running.processes)


def end_all(processes: list[Process]) -> None:
    """By SIGTERM at first, and those that do not hear it by SIGKILL."""
    for process in processes:
        process.process.terminate()
    last = time.monotonic() + GRACE
    for process in processes:
        process.process.join(max(0.0, last - time.monotonic()))
    for process in processes:
        process.process.kill()
        process.process.join(GRACE)
        process.connection.close()


def first_message(read: bytearray) -> tuple[bytearray | None, bytearray]:
    """The first message that a connection has sent, if all of it is there, and what comes after it."""
    if len(read) < SHORT.size:
        return None, read
    start, (size,) = SHORT.size, SHORT.unpack_from(read)
    if size == -1:
        if len(read) < SHORT.size + LONG.size:
            return None, read
        start, (size,) = SHORT.size + LONG.size, LONG.unpack_from(read, SHORT.size)
    return (read[start : start + size], read[start + size :]) if len(read) >= start + size else (None, read)


def idle(processes: list[Process]) -> Process | None:
    """One that waits for a cell. Those that have died meanwhile are let go."""
    for process in [process for process in processes if not process.job and not process.is_alive()]:
        processes.remove(process)
        process.end()
    return next((process for process in processes if not process.job), None)


def started(processes: list[Process], device: str, threads: int) -> Process:
    """A new one, in the place of one that is gone, if any is."""
    taken = {process.number for process in processes}
    processes.append(Process(device, threads, next(n for n in itertools.count() if n not in taken)))
    return processes[-1]
