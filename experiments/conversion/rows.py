"""Rows of results: JSON lines with hardware and versions; a row that stands there is not measured again."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from ntk_attention.training import hardware

VERSIONS = {m.__name__: m.__version__ for m in (torch, transformers, peft)} | {"python": platform.python_version()}


class Rows:
    def __init__(self, path: Path):
        self.path = path
        self.rows = read(path)

    def has(self, wanted: dict[str, Any]) -> bool:
        wanted = {**wanted, "hardware": hardware()}
        return any(all(row.get(key) == value for key, value in wanted.items()) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        row = {**row, "hardware": hardware(), "versions": VERSIONS}
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        shown = {k: v for k, v in row.items() if isinstance(v, float | int | str) and k not in ("hardware", "model")}
        print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in shown.items()), flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
