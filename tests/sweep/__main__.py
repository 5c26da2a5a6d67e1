"""Check an adapter on a tiny random model of every model type of the installed transformers.

    python -m tests.sweep --jobs 2                      # all types, into results/sweep/ and docs/models.md
    python -m tests.sweep --types llama,opt             # some
    python -m tests.sweep --shard 3/8 --rows part3.jsonl    # an eighth, on one of eight machines
    python -m tests.sweep --merge part*.jsonl           # their rows together
    python -m tests.sweep --report                      # docs/models.md anew from the rows

A type whose row was made with the same versions and sources is not run again, unless with --again: a run that was
stopped goes on where it was. No network and no GPU is used. Ends with status 1 if any type is silently wrong or raised
an unclear exception.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from research import recording

from . import rows as files
from .build import model_types
from .examine import NOT_BUILT, RESULTS, SILENT, examine
from .report import MODELS, write_report
from .subject import UNCLEAR
from .workers import run_all

SECONDS, GIGABYTES = 180.0, 8.0  # of one model type
LOG_EVERY = 20.0  # seconds between lines, where the output is no terminal
BUILDING = ("start", "build")
# Of this process and those that it starts.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Bar:
    """How far the sweep is: one line that moves in a terminal, and a line now and then in a log."""

    def __init__(self, total: int):
        self.total, self.done, self.counts = total, 0, Counter[str]()
        self.started = self.printed = time.monotonic()

    def advance(self, result: str) -> None:
        self.done += 1
        self.counts[result] += 1
        now = time.monotonic()
        is_terminal = sys.stderr.isatty()
        if is_terminal or now - self.printed > LOG_EVERY or self.done in (1, self.total):
            self.printed = now
            seconds = now - self.started
            left = seconds / self.done * (self.total - self.done)
            filled = 30 * self.done // self.total
            counts = ", ".join(f"{self.counts[name]} {name}" for name in RESULTS if self.counts[name])
            bar = f"[{'#' * filled}{'.' * (30 - filled)}] {self.done}/{self.total}"
            line = f"{bar}, {clock(seconds)}, {clock(left)} left: {counts}"
            print(line, end="\r" if is_terminal and self.done < self.total else "\n", file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def died(name: str, stage: str, end: str) -> dict[str, Any]:
    """The row of a type whose process gave none: too slow, the base model's fault while it is built, or else ours."""
    result = NOT_BUILT if stage in BUILDING or "SIGALRM" in end else UNCLEAR
    return {"type": name, "result": result, "reason": f"{stage}: the process was {end}"}


def sweep(names: list[str], path: Path, *, jobs: int, again: bool, seconds: float, gigabytes: float) -> None:
    """Run what has no current row; every row is in the file as soon as it is there."""
    now, found = files.stamp(), files.read(path)
    to_do = [name for name in names if again or not files.is_current(found.get(name), now)]
    print(f"{len(to_do)} of {len(names)} model types to run, {jobs} at a time, into {path}", file=sys.stderr)
    files.write(path, found)  # without half a line that a killed run left
    bar = Bar(len(to_do))
    for name, row, stage, end in run_all(to_do, examine, jobs=jobs, seconds=seconds, gigabytes=gigabytes):
        row = {**(row or died(name, stage, end)), **now}
        recording.append(path, row)
        bar.advance(row["result"])
    files.write(path, files.read(path))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m tests.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", help="model types, with commas between them; all by default")
    parser.add_argument("--shard", help="an eighth of them is 3/8")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--rows", type=Path, help="file of rows; by default results/sweep/transformers-VERSION.jsonl")
    parser.add_argument(
        "--merge", type=Path, nargs="+", metavar="ROWS", help="add the rows of these files, run nothing"
    )
    parser.add_argument("--report", action="store_true", help="write docs/models.md, run nothing")
    parser.add_argument("--again", action="store_true", help="also types that have a current row")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which a model type is given up")
    parser.add_argument("--gigabytes", type=float, default=GIGABYTES, help="of memory for one model type")
    return parser.parse_args(arguments)


def chosen(types: str | None, shard: str | None) -> list[str]:
    """The model types to run.

    Raises:
        ValueError: if transformers has none of that name, or the shard is none.
    """
    known = model_types()
    names = known if types is None else types.split(",")
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"transformers has no model type {', '.join(unknown)}")
    return names if shard is None else files.shard_of(names, shard)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # which ends the processes as well
    path = options.rows or files.default_path()
    try:
        names = chosen(options.types, options.shard)
        if options.merge:
            files.write(path, files.merged([*([path] if path.exists() else []), *options.merge]))
        elif not options.report:
            limits = {"seconds": options.seconds, "gigabytes": options.gigabytes}
            sweep(names, path, jobs=options.jobs, again=options.again, **limits)
        found = files.read(path)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if path == files.default_path():
        write_report(found, MODELS)
    looked_at = found if options.merge or options.report else {name: found[name] for name in names}
    bad = [row for row in looked_at.values() if row["result"] in (SILENT, UNCLEAR)]
    for row in bad:
        print(f"{row['type']}: {row['result']}: {row['reason']}")
    counts = Counter(row["result"] for row in looked_at.values())
    print(", ".join(f"{counts[name]} {name}" for name in RESULTS))
    return 1 if bad else 0


if __name__ == "__main__":
    os.environ |= {"TRITON_INTERPRET": "1", **os.environ, **ENVIRONMENT}
    sys.exit(main())
