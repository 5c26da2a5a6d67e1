"""Runs cells side by side: several processes on every GPU, each with the base models it has met in memory."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from recording import Row

from .registry import registry
from .tasks import Base, Task
from .train import Cell, run_cell

Job = tuple[Cell, Task]
Planner = Callable[[], list[Job]]  # what can be run now, the most wanted first, given the rows written so far


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
        except Exception as error:
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


def run_jobs(planner: Planner, device: str, write: Callable[[Row], None], deadline: float, jobs: int) -> None:
    """Until nothing is left to run, or the deadline has come: then what is still running is lost."""
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // jobs)
    running: dict[Connection, tuple[Any, Job | None]] = {}
    numbers = itertools.count()

    def start() -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, device, threads, next(numbers)), daemon=True)
        process.start()
        theirs.close()
        running[ours] = process, None

    try:
        while time.monotonic() < deadline:
            busy = {job[0] for _, job in running.values() if job}
            ready = [job for job in planner() if job[0] not in busy]
            while len(running) < min(jobs, len(busy) + len(ready)):
                start()
            for connection, (process, job) in running.items():
                if job is None and ready:
                    cell, task = ready.pop(0)
                    running[connection] = process, (cell, task)
                    connection.send((cell, task.steps))  # a recipe's functions do not travel
            waiting = {connection: job for connection, (_, job) in running.items() if job}
            if not waiting:
                return
            for connection in wait(list(waiting), timeout=min(max(0.0, deadline - time.monotonic()), 3600.0)):
                assert isinstance(connection, Connection)
                process, _ = running.pop(connection)
                try:
                    write(connection.recv())
                    running[connection] = process, None
                except EOFError:  # the process died: out of memory, say
                    cell, task = waiting[connection]
                    process.join()
                    error = f"the process died with exit code {process.exitcode}"
                    write({**asdict(cell), "steps": task.steps, "error": error})
    finally:
        for process, _ in running.values():
            process.terminate()
