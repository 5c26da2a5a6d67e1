"""What a person sees of long work: a bar that moves on a terminal, lines in a log file elsewhere."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ..progress import Reporter

console = Console(highlight=False)
SILENCE = 30.0  # seconds without a line in a log file


class Count(ProgressColumn):
    """How many are done, and of how many where that is known."""

    def render(self, task: Task) -> Text:
        if not task.completed and task.total is None:
            return Text("")
        return Text(f"{int(task.completed):,}" + ("" if task.total is None else f"/{int(task.total):,}"))


class Bars:
    """A progress bar for each stage of a run."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self.task: TaskID | None = None

    def stage(self, text: str, total: int | None = None) -> None:
        self.finish()
        self.task = self.progress.add_task(text, total=total, figures="")

    def advance(self, n: int = 1, **figures: float) -> None:
        if self.task is not None:
            shown = in_words(figures) if figures else self.progress.tasks[self.task].fields["figures"]
            self.progress.update(self.task, advance=n, figures=shown)

    def say(self, text: str) -> None:
        self.finish()
        self.task = None
        self.progress.console.print(text, markup=False, soft_wrap=True)

    def finish(self) -> None:
        if self.task is not None:
            task = self.progress.tasks[self.task]
            total = task.total if task.total is not None else max(1, task.completed)
            self.progress.update(self.task, total=total, completed=total)


class Lines:
    """A line when a stage begins and when it ends, and one every `silence` seconds in between."""

    def __init__(self, console: Console, silence: float = SILENCE):
        self.console, self.silence = console, silence
        self.started = time.monotonic()
        self.text, self.done, self.begun = "", 0, self.started
        self.total: int | None = None
        self.figures: dict[str, float] = {}
        self.lock, self.over = threading.Lock(), threading.Event()
        self.thread = threading.Thread(target=self.keep_telling, daemon=True)

    def stage(self, text: str, total: int | None = None) -> None:
        with self.lock:
            self.finish()
            self.text, self.total, self.done, self.begun = text, total, 0, time.monotonic()
            self.figures = {}
            self.tell("")

    def advance(self, n: int = 1, **figures: float) -> None:
        with self.lock:
            self.done += n
            self.figures.update(figures)

    def say(self, text: str) -> None:
        with self.lock:
            self.finish()
            self.console.print(text, markup=False, soft_wrap=True)

    def finish(self) -> None:
        if self.text:
            self.tell(f"done in {time.monotonic() - self.begun:.0f} s")
            self.text = ""

    def tell(self, what: str) -> None:
        of = "" if self.total is None else f"/{self.total:,}"
        count = f"{self.done:,}{of}" if what and self.done else ""
        said = ", ".join(part for part in (count, what, in_words(self.figures)) if part)
        clock = time.strftime("%H:%M:%S", time.gmtime(time.monotonic() - self.started))
        text = f"{self.text}: {said}" if said else self.text
        self.console.print(f"[{clock}] {text}", markup=False, soft_wrap=True)

    def keep_telling(self) -> None:
        while not self.over.wait(self.silence):
            with self.lock:
                if self.text:
                    self.tell(f"{time.monotonic() - self.begun:.0f} s{self.left()}")

    def left(self) -> str:
        """How long it will take, by how long it took."""
        if not self.total or not self.done:
            return ""
        return f", about {(time.monotonic() - self.begun) * (self.total - self.done) / self.done:.0f} s left"


def in_words(figures: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in figures.items())


@contextlib.contextmanager
def bars(silence: float = SILENCE) -> Iterator[Reporter]:
    """A reporter for the terminal, or for the file that the output goes to."""
    if not console.is_terminal:
        lines = Lines(console, silence)
        lines.thread.start()
        try:
            yield lines
            lines.finish()
        finally:
            lines.over.set()
            lines.thread.join()
        return
    columns = (TextColumn("{task.description:26}"), BarColumn(), Count(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[figures]}"), console=console) as progress:
        reporter = Bars(progress)
        yield reporter
        reporter.finish()
