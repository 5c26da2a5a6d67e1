"""How time and memory are measured, for all benchmarks alike.

Methods that are compared run round robin, one call each per round, so that drifting clocks hit all of them. Two clocks:

- "gpu": CUDA events around one call. A 256 MB buffer is written first, so that no call finds its inputs in the L2
  cache, and then the GPU sleeps for about a millisecond, in which Python queues the launches: what is measured is the
  time of the GPU, not that of Python.
- "wall": what a user waits for, from call to finished work. On a CPU, a call that is not timed goes before each one, so
  that no method pays for the caches that another has emptied.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

Clock = Literal["gpu", "wall"]
L2_FLUSH_BYTES = 256 * 2**20
HEAD_START_CYCLES = 2_000_000
MIN_REPETITIONS = 5


class Prepared(NamedTuple):
    """A method that is ready to be timed."""

    run: Callable[[], Any]
    figures: dict[str, Any] = {}  # noqa: RUF012  # what is known without a clock, such as a number of parameters


@dataclass
class Result:
    """What one method took; times are None where there is an error."""

    milliseconds: list[float] = field(default_factory=list)
    peak_memory_bytes: int | None = None  # of one call, above what was allocated before it; None on a CPU
    held_memory_bytes: int | None = None  # allocated by the preparation and kept: weights, optimizer state, cache
    figures: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def measure(
    setups: Mapping[str, Callable[[], Prepared]], device: str, clock: Clock, repetitions: int, budget_ms: float
) -> dict[str, Result]:
    """Prepare, warm up and time methods, interleaved.

    Args:
        setups: by name; each prepares its method. Whatever it or its method raises becomes the method's `error`.
        device: "cuda" or "cpu".
        clock: see the module; a CPU has "wall" only.
        repetitions: of each method; fewer, but at least `MIN_REPETITIONS`, where they would take over `budget_ms`.
        budget_ms: for one method.
    """
    results = {name: Result() for name in setups}
    ready: dict[str, tuple[Callable[[], Any], int]] = {}

    def attempt(name: str, work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception as error:
            results[name].error = describe(error)
            ready.pop(name, None)
        if results[name].error:
            release(device)

    def warm_up(name: str) -> None:
        result = results[name]
        before = allocated(device)
        run, result.figures = setups[name]()
        run()  # compiles and tunes what there is to compile, and makes optimizer states
        synchronize(device)
        kept = allocated(device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        estimate = wall_ms(run, device)
        if device == "cuda":
            result.peak_memory_bytes = torch.cuda.max_memory_allocated() - kept
            result.held_memory_bytes = kept - before
        affordable = max(min(MIN_REPETITIONS, repetitions), int(budget_ms / estimate))
        ready[name] = run, min(repetitions, affordable)

    def time_once(name: str) -> None:
        run, _ = ready[name]
        if device == "cpu":
            run()
        results[name].milliseconds.append(gpu_ms(run) if clock == "gpu" else wall_ms(run, device))

    for name in setups:
        attempt(name, lambda name=name: warm_up(name))  # type: ignore[misc]
    for i in range(repetitions):
        for name, (_, wanted) in list(ready.items()):
            if i < wanted:
                attempt(name, lambda name=name: time_once(name))  # type: ignore[misc]
    return results


def gpu_ms(run: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush_l2()
    torch.cuda._sleep(HEAD_START_CYCLES)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def flush_l2() -> None:
    torch.empty(L2_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda").zero_()


def wall_ms(run: Callable[[], Any], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def captured(run: Callable[[], Any], device: str) -> Callable[[], Any]:
    """The replay of a CUDA graph of `run`; on a CPU `run` itself."""
    if device != "cuda":
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay(keep_alive: Callable[[], Any] = run) -> None:  # the graph reads the memory that `run` holds
        graph.replay()

    return replay


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def release(device: str) -> None:
    """Give freed memory back. A GPU that a failed kernel has made unusable raises here, which ends the run."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def describe(error: BaseException) -> str:
    """A short text for the row of a method that does not run."""
    text = next(iter(str(error).splitlines()), "")
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return "out of memory"
    if isinstance(error, ValueError | NotImplementedError) or "No available kernel" in text or "No viable" in text:
        return f"unsupported: {text}"[:160]
    return f"{type(error).__name__}: {text}"[:160]
