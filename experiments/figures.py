"""The figures of the report, as PNG. Each returns whether there was anything to draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from .budgets import TOLERANCE
from .methods import METHODS
from .statistics import Result, difference
from .tables import OURS, Results, in_order, label

COLOURS = {"ntk": "#c0392b", "lora": "#1f4e79", "prefix": "#5d9bd1", "other": "#b0a58f"}
MARKERS = {"ntk": "o", "lora": "s", "prefix": "^", "other": "D"}
COLUMNS = 3
Drawing = Callable[[Results, Path], bool]
plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})


def colour(method: str) -> str:
    return COLOURS[METHODS[method].family]


def panels(names: Sequence[str], height: float = 3.4) -> tuple[Any, list[tuple[str, Axes]]]:
    """The figure, and one panel for each task."""
    columns = min(COLUMNS, len(names))
    rows = math.ceil(len(names) / columns)
    size = (4.4 * columns, height * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axes in grid.flat[len(names) :]:
        axes.axis("off")
    found = list(zip(names, grid.flat, strict=False))
    for name, axes in found:
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.3)
    return figure, found


def save(figure: Any, path: Path) -> bool:
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def shown(result: Result, x: float) -> float:
    return 100 * x if result.task.higher_is_better else x


def differences(results: Results, path: Path) -> bool:
    """A panel for each task, a line for each method of equal size, with intervals."""
    lines: dict[str, list[tuple[str, float, float]]] = {}
    for name, own in results.items():
        size = own[OURS].any_row.get("trainable_parameters") if OURS in own and own[OURS].mean is not None else None
        for result in in_order(own.values()) if size else ():
            trained = result.any_row.get("trainable_parameters", 0)
            if result.method == OURS or METHODS[result.method].ablation or abs(trained / size - 1) > TOLERANCE:
                continue
            if (gain := difference(own[OURS], result)) and result.mean:
                width = 100 * gain.by_seeds / abs(result.mean) if gain.by_seeds is not None else 0.0
                lines.setdefault(name, []).append((result.method, 100 * gain.relative, width))
    if not lines:
        return False
    figure, found = panels(list(lines), height=1.0 + 0.25 * max(map(len, lines.values())))
    for name, axes in found:
        axes.axvline(0, color="#333333", linewidth=1)
        axes.axvspan(-2, 0, color="#333333", alpha=0.07, linewidth=0)
        for i, (method, mean, width) in enumerate(lines[name]):
            axes.errorbar(mean, i, xerr=width, color=colour(method), marker=MARKERS[METHODS[method].family],
                          markersize=5, capsize=2, linewidth=1.2)  # fmt: skip
        axes.set_yticks(range(len(lines[name])), [label(method) for method, _, _ in lines[name]], fontsize=8.5)
        axes.set_xscale("symlog", linthresh=10)
        axes.set_xticks([-10, -2, 0, 2, 5, 10, 100], ["-10", "-2", "0", "2", "5", "10", "100"], fontsize=8)
        axes.minorticks_off()
        axes.set_ylim(len(lines[name]) - 0.5, -0.5)
    figure.supxlabel("ours over the method, % (logarithmic beyond 10)", fontsize=10)
    return save(figure, path)


def sizes(results: Results, path: Path) -> bool:
    """Test metric against trainable parameters, a panel for each task."""
    names = [name for name, own in results.items() if sum(r.mean is not None for r in own.values()) > 1]
    if not names:
        return False
    figure, found = panels(names)
    for name, axes in found:
        texts = []
        for result in in_order(results[name].values()):
            trained = result.any_row.get("trainable_parameters", 0)
            if result.mean is None or METHODS[result.method].ablation or not trained:
                continue
            family = METHODS[result.method].family
            y = shown(result, result.mean)
            error = shown(result, result.deviation or 0.0)
            axes.errorbar(trained, y, yerr=error, color=COLOURS[family], marker=MARKERS[family], capsize=2, linewidth=1,
                          markersize=8 if result.method == OURS else 5)  # fmt: skip
            texts.append((trained, y, result.method))
        task = next(iter(results[name].values())).task
        axes.set(xscale="log", ylabel=f"{task.metric}{', %' if task.higher_is_better else ', nats'}")
        axes.xaxis.set_minor_formatter("")
        axes.margins(x=0.15)
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, 0.3 * high), max(high, 3.3 * low))  # half a decade at least: equal sizes look equal
        texts.sort(key=lambda text: text[1])
        low, high = axes.get_ylim()
        places = apart([y for _, y, _ in texts], 0.045 * (high - low))
        for (trained, y, method), place in zip(texts, places, strict=True):
            line = {"arrowstyle": "-", "linewidth": 0.4, "color": "#999999", "shrinkA": 0, "shrinkB": 2}
            axes.annotate(method, (trained, y), xytext=(14, place), textcoords=("offset points", "data"),
                          va="center", fontsize=6.5, arrowprops=line)  # fmt: skip
    figure.supxlabel("trainable parameters", fontsize=10)
    return save(figure, path)


def apart(values: list[float], gap: float) -> list[float]:
    """Rising values, moved as little as neighbours at least a gap apart need, each group about its middle."""
    groups: list[list[float]] = []
    for value in values:
        groups.append([value])
        while len(groups) > 1 and middle(groups[-1], gap)[0] - middle(groups[-2], gap)[-1] < gap:
            groups[-2:] = [groups[-2] + groups[-1]]
    return [place for group in groups for place in middle(group, gap)]


def middle(group: list[float], gap: float) -> list[float]:
    """Places a gap apart, about the mean of the group."""
    return [sum(group) / len(group) + gap * (i - (len(group) - 1) / 2) for i in range(len(group))]


def rates(results: Results, path: Path) -> bool:
    """Validation data against the learning rate, a panel for each task."""
    names = [name for name, own in results.items() if any(len(r.validation) > 1 for r in own.values())]
    if not names:
        return False
    figure, found = panels(names)
    for name, axes in found:
        low = []
        for result in in_order(results[name].values()):
            if METHODS[result.method].tier > 1:
                continue
            points = [
                (rate, 100 * score["share"] if result.task.has_head else score["loss"])
                for rate, score in result.validation.items()
                if score
            ]
            if points:
                low.append(points[0][1])
                width = 2.2 if result.method == OURS else 1.0
                axes.plot(*zip(*points, strict=True), color=colour(result.method), linewidth=width, markersize=4,
                          marker=MARKERS[METHODS[result.method].family])  # fmt: skip
                axes.annotate(result.method, points[-1], xytext=(4, 0), textcoords="offset points", fontsize=6.5)
        task = next(iter(results[name].values())).task
        axes.set(xscale="log", ylabel="accuracy, %" if task.has_head else "loss, nats")
        if not task.has_head:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:.2g}")
            axes.yaxis.set_minor_formatter("{x:.2g}")
        axes.margins(x=0.2)
    figure.supxlabel("learning rate", fontsize=10)
    return save(figure, path)


def curves(results: Results, path: Path) -> bool:
    """Training loss of the methods of tiers 0 and 1, mean over the final seeds."""
    found_curves = {
        name: {
            result.method: curves
            for result in in_order(own.values())
            if METHODS[result.method].tier <= 1
            and (curves := [row["curve"] for row in result.finals.values() if "curve" in row])
        }
        for name, own in results.items()
    }
    names = [name for name, own in found_curves.items() if own]
    if not names:
        return False
    figure, found = panels(names)
    for name, axes in found:
        for method, own_curves in found_curves[name].items():
            steps = [step for step, _ in own_curves[0]]
            losses = np.mean([[loss for _, loss in curve] for curve in own_curves], axis=0)
            width = 2.2 if method == OURS else 1.0
            axes.plot(steps, losses, color=colour(method), linewidth=width)
            axes.annotate(method, (steps[-1], losses[-1]), xytext=(4, 0), textcoords="offset points", fontsize=6.5)
        axes.set(yscale="log", ylabel="training loss")
        axes.margins(x=0.15)
    figure.supxlabel("step", fontsize=10)
    return save(figure, path)
