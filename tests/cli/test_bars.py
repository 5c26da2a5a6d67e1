"""What a person sees of long work, on a terminal and in a log file."""

import io
import re
import time

import pytest
from rich.console import Console

from ntk_attention.cli import bars
from ntk_attention.cli.models import load_model


@pytest.fixture
def output(request, monkeypatch):
    """What is printed to a terminal, or to a file."""
    stream = io.StringIO()
    shown = Console(file=stream, force_terminal=getattr(request, "param", False), width=150, highlight=False)
    monkeypatch.setattr(bars, "console", shown)
    return stream


def test_a_log_file_gets_a_line_for_every_stage(output):
    with bars.bars() as reporter:
        reporter.stage("load")
        reporter.stage("train", 1000)
        reporter.advance(1000, loss=0.5)
        reporter.say("a thing [of note]")
        reporter.stage("more", 5)
    lines = [re.sub(r"^\[\d\d:\d\d:\d\d\] ", "", line) for line in output.getvalue().splitlines()]
    assert lines == [
        "load",
        "load: done in 0 s",
        "train",
        "train: 1,000/1,000, done in 0 s, loss 0.500",
        "a thing [of note]",
        "more",
        "more: done in 0 s",
    ]


def test_a_log_file_is_never_silent_for_long(output):
    """Also where a step takes long, or nothing is known of steps."""
    with bars.bars(silence=0.05) as reporter:
        reporter.stage("train", 4)
        reporter.advance(1, loss=0.25)
        time.sleep(0.3)
        reporter.stage("load")
        time.sleep(0.3)
    text = output.getvalue()
    assert len(re.findall(r"train: 1/4, 0 s, about \d s left, loss 0.250", text)) >= 2
    assert len(re.findall("load: 0 s", text)) >= 2


def test_an_error_is_the_last_line(output):
    def fail():
        with bars.bars() as reporter:
            reporter.stage("train", 4)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert "done" not in output.getvalue()


@pytest.mark.parametrize("output", [True], indirect=True)
def test_a_terminal_gets_bars(output):
    with bars.bars() as reporter:
        reporter.stage("load")
        reporter.stage("train", 1000)
        reporter.advance(500, loss=0.5)
        reporter.advance(1)
        reporter.progress.refresh()
        reporter.say("a thing [of note]")
    text = output.getvalue()
    for part in ("load", "train", "501/1,000", "loss 0.500", "a thing [of note]", "━"):
        assert part in text


def test_loading_tells_of_every_tensor(model_folder):
    class Reporter:
        stages, done = [], 0

        def stage(self, text, total=None):
            self.stages.append((text, total))

        def advance(self, n=1, **figures):
            self.done += n

    reporter = Reporter()
    model, _ = load_model(str(model_folder), reporter=reporter)
    ((text, total),) = reporter.stages
    assert text == f"load {model_folder.name}"
    assert total == reporter.done >= len(list(model.parameters())) - 1
