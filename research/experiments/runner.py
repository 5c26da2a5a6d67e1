"""Runs cells side by side: several processes on every GPU, each with the base models it has met in memory."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from research.recording import Row

from .registry import registry
from .tasks import Base, Task
from .train import Cell, run_cell

Job = tuple[Cell, Task]
Planner = Callable[[], list[Job]]  # what can be run now, the most wanted first, given the rows written so far
GRACE = 5.0  # seconds that a process has for its own end
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
    torch.set_num_threads(threads)
    if device == "cuda":
        torch.cuda.set_device(number % torch.cuda.device_count())
    worker, tasks = Worker(device), registry()
    while True:
        cell, steps = connection.recv()
        connection.send(worker(cell, replace(tasks[cell.task], steps=steps)))


def run_inline(planner: Planner, device: str, write: Callable[[Row], None], deadline: float) -> None:
    """One after another in this process: the deadline is looked at between cells."""
    worker = Worker(device)
    while time.monotonic() < deadline and (ready := planner()):
        write(worker(*ready[0]))


class Process:
    """A worker process and the cell that it runs."""

    def __init__(self, device: str, threads: int, number: int):
        context = multiprocessing.get_context("spawn")
        self.number = number
        self.job: Job | None = None
        self.connection, theirs = context.Pipe()
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
        if not self.connection.poll():
            if self.is_alive():
                return None
            if not self.connection.poll():  # it may have answered and died in between
                raise EOFError
        return self.connection.recv()

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


def run_jobs(planner: Planner, device: str, write: Callable[[Row], None], deadline: float, jobs: int) -> None:
    """Until nothing is left to run, or the deadline has come: then what is still running is lost.

    However a process ends, the cell that it had is one that failed, and others go on. No cell is run twice.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    processes: list[Process] = []
    finished: set[Cell] = set()

    def finish(job: Job, row: Row) -> None:
        finished.add(job[0])
        write(row)

    def fail(job: Job, process: Process | None, error: Exception) -> None:
        text = f"{type(error).__name__}: {error}".removesuffix(": ")
        if process is None:
            text = f"no process can be started: {text}"
        else:
            processes.remove(process)
            text = f"{process.end()} ({text})"
        finish(job, {**asdict(job[0]), "steps": job[1].steps, "error": text})

    try:
        while time.monotonic() < deadline:
            busy = {process.job[0] for process in processes if process.job}
            ready = [job for job in planner() if job[0] not in busy | finished]
            for job in ready[: jobs - len(busy)]:
                process = None
                try:
                    process = idle(processes) or started(processes, device, threads)
                    process.send(job)
                except Exception as error:
                    fail(job, process, error)
                    if process is None:
                        break  # others would fare no better now
            working = [process for process in processes if process.job]
            if not working:
                if not ready:
                    return
                continue
            pause = min(max(0.0, deadline - time.monotonic()), LOOK_AGAIN)
            wait([process.connection for process in working], timeout=pause)
            for process in working:
                assert process.job
                try:
                    row = process.receive()
                except Exception as error:
                    fail(process.job, process, error)
                    continue
                if row is not None:
                    job, process.job = process.job, None
                    finish(job, row)
    finally:
        for process in processes:
            process.process.terminate()


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
