"""Figures as small files: PNG of few colours, which drawings of lines and letters need no more of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot as plt

DPI, COLOURS = 100, 64


def save(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib and let go of it."""
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    shrink(path)


def shrink(path: Path) -> None:
    """A picture that is there, with fewer colours and nothing beside them."""
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
