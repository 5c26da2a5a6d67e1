"""Rows of one experiment; a row that stands there is not measured again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from research.recording import append, commit, hardware, read, versions


class Rows:
    def __init__(self, path: Path):
        self.path = path
        self.rows = read(path)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.made = {
            "hardware": hardware(device),
            "versions": versions(),
            "commit": commit("src", "research/experiments"),
        }

    def has(self, wanted: dict[str, Any]) -> bool:
        wanted = {**wanted, "hardware": self.made["hardware"]}
        return any(all(row.get(key) == value for key, value in wanted.items()) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append({**row, **self.made})
        append(self.path, self.rows[-1])
        shown = {k: v for k, v in row.items() if isinstance(v, float | int | str) and k != "model"}
        print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in shown.items()), flush=True)
