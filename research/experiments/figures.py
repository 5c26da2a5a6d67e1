"""The figures of the report, as PNG. Each returns whether there was anything to draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from research import pictures

from .budgets import TOLERANCE
from .methods import METHODS
from .statistics import Result, difference
from .tables import OURS, Results, in_order, label

COLOURS = {"ntk": "#c0392b", "lora": "#1f4e79", "prefix": "#5d9bd1", "other": "#b0a58f"}
MARKERS = {"ntk": "o", "lora": "s", "prefix": "^", "other": "D"}
SHAPES = "os^Dv"
COLUMNS = 3
# Lines of the figure of sizes; the first method of each gives its colour.
SIZES = {
    "NTK-Attention": ("ntk-quarter", "ntk", "ntk-4x"),
    "as published": ("ntk-published",),
    "LoRA, all linear": ("lora-all", "lora-all-4x"),
    "LoRA, attention": ("lora-attention", "lora-attention-quarter"),
    "LoRA, q and v": ("lora-qv",),
    "DoRA, attention": ("dora",),
    "prefix": ("prefix", "prefix-1", "prefix-10", "prefix-100"),
    "prefix, from text": ("prefix-text",),
    "softmax + phi(q) M": ("prefix-memory",),
    "full fine-tuning": ("full",),
    "IA3": ("ia3",),
}
# Methods of the figure of learning rates, with colour and marker.
RATED = {
    "ntk": (COLOURS["ntk"], "o"),
    "attention-alone": ("#e59866", "o"),
    "ntk-published": ("#7d3c98", "v"),
    "lora-attention": (COLOURS["lora"], "s"),
    "lora-mlp": ("#2e8b57", "s"),
    "lora-all": ("#5d9bd1", "s"),
    "full": (COLOURS["other"], "D"),
}
Drawing = Callable[[Results, Path], bool]
plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})


def colour(method: str) -> str:
    return COLOURS[METHODS[method].family]


def panels(names: Sequence[str], height: float = 3.4) -> tuple[Any, list[tuple[str, Axes]]]:
    """The figure, and one panel for each task."""
    columns = 2 if len(names) == 4 else min(COLUMNS, len(names))
    rows = math.ceil(len(names) / columns)
    size = (4.4 * columns, height * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False)
    figure.set_layout_engine("constrained", h_pad=0.1)  # inches: titles stand clear of the panels above
    for axes in grid.flat[len(names) :]:
        axes.axis("off")
    found = list(zip(names, grid.flat, strict=False))
    for name, axes in found:
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.3)
    return figure, found


def save(figure: Any, path: Path) -> bool:
    pictures.save(figure, path)
    return True


def shown(result: Result, x: float) -> float:
    return 100 * x if result.task.higher_is_better else x


def trained(result: Result) -> int:
    return int(result.any_row["trainable_parameters"])


def differences(results: Results, path: Path) -> bool:
    """A panel for each task, a line for each method of equal size, with intervals."""
    lines: dict[str, list[tuple[str, float, float]]] = {}
    for name, own in results.items():
        size = trained(own[OURS]) if OURS in own and own[OURS].mean is not None else None
        for result in in_order(own.values()) if size else ():
            if result.method == OURS or METHODS[result.method].ablation or result.mean is None:
                continue
            if abs(trained(result) / size - 1) > TOLERANCE:
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
        axes.set_xscale("symlog", linthresh=10, linscale=2)
        largest = max(mean + width for _, mean, width in lines[name])
        ticks = [-10, -5, -2, 0, 2, 5, 10, 100] + [1000] * (largest > 1000)
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
        axes.set_xlim(min(-10, *(1.2 * (mean - width) for _, mean, width in lines[name])), max(100, 1.6 * largest))
        axes.minorticks_off()
        axes.set_ylim(len(lines[name]) - 0.5, -0.5)
    figure.supxlabel("ours over the method, % (logarithmic beyond 10)", fontsize=10)
    return save(figure, path)


def sizes(results: Results, path: Path) -> bool:
    """Test metric against trainable parameters, a line for each method; tasks where one has run at several sizes."""
    lines: dict[str, dict[str, list[Result]]] = {}
    for name, own in results.items():
        for text, methods in SIZES.items():
            points = [own[method] for method in methods if method in own and own[method].mean is not None]
            if points:
                lines.setdefault(name, {})[text] = sorted(points, key=trained)
    names = [name for name, own in lines.items() if any(len(points) > 1 for points in own.values())]
    if not names:
        return False
    figure, found = panels(names, height=4.2)
    shown_once: dict[str, Any] = {}
    for name, axes in found:
        for text, points in lines[name].items():
            method = SIZES[text][0]
            x = [trained(result) for result in points]
            y = [shown(result, result.mean) for result in points if result.mean is not None]
            error = [shown(result, result.deviation or 0.0) for result in points]
            i = [t for t, m in SIZES.items() if METHODS[m[0]].family == METHODS[method].family].index(text)
            shown_once[text] = axes.errorbar(
                x, y, yerr=error, color=colour(method), marker=SHAPES[i], markersize=8 if OURS in SIZES[text] else 5,
                linewidth=1.8 if OURS in SIZES[text] else 1, elinewidth=0.8, capsize=2,
                markerfacecolor=colour(method) if i == 0 else "white",
            )  # fmt: skip
        task = next(iter(results[name].values())).task
        unit = ", %" if task.higher_is_better else ", nats"
        axes.set(xscale="log", xlabel="trainable parameters", ylabel=task.metric + unit)
        axes.margins(x=0.1)
    figure.legend(shown_once.values(), shown_once, loc="outside lower center", ncols=4, fontsize=8.5, frameon=False)
    return save(figure, path)


def rates(results: Results, path: Path) -> bool:
    """Validation data against the learning rate, a panel for each task."""
    names = [name for name, own in results.items() if any(len(own[m].validation) > 1 for m in RATED if m in own)]
    if not names:
        return False
    figure, found = panels(names, height=2.9)
    shown_once: dict[str, Any] = {}
    for name, axes in found:
        own, bests = results[name], []
        task = next(iter(own.values())).task
        for method, (colour, marker) in RATED.items():
            scores = own[method].validation if method in own else {}
            points = [
                (x, 100 * score["share"] if task.has_head else score["loss"]) for x, score in scores.items() if score
            ]
            if points:
                bests.append((max if task.has_head else min)(y for _, y in points))
                line = axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4,
                                 linewidth=2.2 if method == OURS else 1.2)[0]  # fmt: skip
                shown_once.setdefault(label(method), line)
        axes.set(xscale="log", xlabel="learning rate", ylabel="accuracy, %" if task.has_head else "loss, nats")
        if not task.has_head:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
            axes.set_ylim(top=2 * max(bests))
        else:  # what fails is below
            spread = max(1.0, max(bests) - min(bests))
            axes.set_ylim(min(bests) - 2 * spread, max(bests) + 0.3 * spread)
    figure.legend(shown_once.values(), shown_once, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return save(figure, path)
