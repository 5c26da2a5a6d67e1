"""The experiments by name: measure, write the rows, draw the figure, say what was seen."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..progress import Reporter
from . import figures, run_bridge, run_capacity, run_kernel, run_scaling, run_training
from .setting import Experiment, Loader, Row, Setting


@dataclass(frozen=True)
class Parts:
    measure: Experiment
    words: Callable[[list[Row]], list[str]]
    figure: Callable[[list[Row], Path], None]


EXPERIMENTS = {
    "kernel": Parts(run_kernel.measure, run_kernel.words, figures.kernel),
    "training": Parts(run_training.measure, run_training.words, figures.training),
    "scaling": Parts(run_scaling.measure, run_scaling.words, figures.scaling),
    "capacity": Parts(run_capacity.measure, run_capacity.words, figures.capacity),
    "bridge": Parts(run_bridge.measure, run_bridge.words, figures.bridge),
}


def run(name: str, setting: Setting, folder: Path, reporter: Reporter, load_model: Loader) -> list[str]:
    """Run one experiment; write `folder`/name.jsonl and name.png. Returns what was seen, in sentences.

    The first line of the file is the setting with versions and hardware; every other is one measurement.
    """
    parts = EXPERIMENTS[name]
    folder.mkdir(parents=True, exist_ok=True)
    rows = parts.measure(setting, reporter, load_model)
    record = {"experiment": name, **asdict(setting), "torch": torch.__version__, "hardware": hardware(setting.device)}
    lines = "".join(json.dumps(row) + "\n" for row in [record, *rows])
    (folder / f"{name}.jsonl").write_text(lines)
    parts.figure(rows, folder / f"{name}.png")
    return parts.words(rows)


def check_device(device: str) -> str:
    """The name, if torch can use it in float64.

    Raises:
        ValueError: if not.
    """
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def hardware(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"
