"""One picture per benchmark and hardware, as PNG."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from research.pictures import save

from .grouping import by_sizes, fastest, fastest_prefix, median, number, prefix_lengths
from .rows import Row

OURS, PLAIN = "#c0392b", "#333333"
PREFIX = ("#8fbbe0", "#5d9bd1", "#2e75b6", "#1f4e79")
OTHER = "#b0a58f"
plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})


def slug(hardware: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-")


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]], gap: float = 0.05) -> None:
    """Write labels beside the right ends of lines (x, y, text, colour) on a log axis, moved apart where they touch."""
    low, high = np.log(axes.get_ylim())
    ends = sorted(ends, key=lambda end: end[1])
    heights = [(np.log(end[1]) - low) / (high - low) for end in ends]
    for _ in range(200):
        heights[0] = max(heights[0], gap)
        for i in range(len(ends) - 1):
            overlap = max(0.0, gap - (heights[i + 1] - heights[i])) if ends[i][0] == ends[i + 1][0] else 0.0
            heights[i] -= overlap / 2
            heights[i + 1] += overlap / 2
    for (x, _, text, colour), height in zip(ends, heights, strict=True):
        place = (x, np.exp(low + height * (high - low)))
        axes.annotate(text, place, xytext=(7, 0), textcoords="offset points", va="center", color=colour, fontsize=9)


def attention(rows: list[Row], path: Path) -> None:
    """Time over plain attention, by shape, for the sizes that all methods ran with."""
    groups = by_sizes(row for row in rows if not row["method"].startswith("ceiling"))
    first = groups[0].sizes
    groups = [g for g in groups if (g.sizes["d"], g.sizes["H_kv"]) == (first["d"], first["H_kv"])]
    modes = list(dict.fromkeys(g.sizes["mode"] for g in groups))
    figure, panels = plt.subplots(1, len(modes), figsize=(6.2 * len(modes), 5), sharey=True, layout="constrained")
    ends: list[list[tuple[float, float, str, str]]] = []
    for axes, mode in zip(np.atleast_1d(panels), modes, strict=True):
        own = [g for g in groups if g.sizes["mode"] == mode]
        lengths = prefix_lengths(own[0].rows)
        name = "ours auto" if "ours auto" in own[0].rows else "ours rotary"
        lines = [("ours", OURS, [g.rows.get(name) for g in own])]
        for m, colour in zip(lengths, PREFIX[len(PREFIX) - len(lengths) :], strict=True):
            lines.append((f"prefix, m = {m:,}", colour, [fastest_prefix(g.rows, m) for g in own]))
        lines.append(("naive fp32", OTHER, [g.rows.get("naive fp32") for g in own]))
        axes.plot([0, len(own) - 1], [1, 1], color=PLAIN, linewidth=1)
        ends.append([(len(own) - 1, 1, "plain attention", PLAIN)])
        for name, colour, line in lines:
            points = [
                (i, time / reference)
                for i, (g, row) in enumerate(zip(own, line, strict=True))
                if (time := median(row)) and (reference := median(fastest(g.rows, "plain")))
            ]
            if points:
                width = 2.4 if name == "ours" else 1.4
                axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, linewidth=width)
                ends[-1].append((*points[-1], name, colour))
        ticks = [f"B = {g.sizes['B']}\nL = {g.sizes['L']:,}" for g in own]
        scale = "log" if lengths else "linear"  # real tokens take many times as long
        axes.set(title=mode, yscale=scale, xticks=range(len(own)), xticklabels=ticks)
        axes.set_xlim(-0.2, len(own) - 1 + 0.42 * len(own))
        axes.grid(axis="y", alpha=0.3)
        axes.yaxis.set_major_formatter("{x:g}")
    np.atleast_1d(panels)[0].set_ylabel("time over plain attention")
    for axes, found in zip(np.atleast_1d(panels), ends, strict=True):
        label_ends(axes, found)
    figure.suptitle(
        f"{rows[0]['hardware']}, {first['dtype']}, causal, {first['H']} heads of size {first['d']}", fontsize=11
    )
    save(figure, path)


def figure3(rows: list[Row], path: Path) -> None:
    """The paper's arrangement: run time against the number of parameters, a panel for each L."""
    groups = by_sizes(rows)
    figure, panels = plt.subplots(
        1, len(groups), figsize=(3.6 * len(groups) + 0.6, 3.9), sharey=True, layout="constrained"
    )
    lines = (("prefix", PREFIX[3], "prefix P: m d"), ("prefix-kv", PREFIX[1], "keys and values: 2 m d"))
    for axes, (sizes, methods) in zip(np.atleast_1d(panels), groups, strict=True):
        for name, colour, text in lines:
            found = [methods.get(f"{name} m={m}", {}) for m in prefix_lengths(methods)]
            points = [(row["figures"]["parameters"], row["milliseconds"]["median"]) for row in found if median(row)]
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, linewidth=1.4, label=text)
        if (ours := methods.get("ours")) and (time := median(ours)):
            axes.axhline(time, color=OURS, linewidth=1, linestyle=":")
            axes.plot(ours["figures"]["parameters"], time, color=OURS, marker="*", markersize=13, linestyle="none",
                      label="NTK-Attention, any m: r d + r")  # fmt: skip
        axes.set(title=f"L = {sizes['L']}", xscale="log", yscale="log", xlabel="trainable parameters")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
    np.atleast_1d(panels)[0].set_ylabel("run time, ms")
    np.atleast_1d(panels)[0].legend(frameon=False, fontsize=8.5, loc="upper left")
    figure.suptitle(f"One layer, d = {groups[0].sizes['d']}, forward, {rows[0]['hardware']}", fontsize=11)
    save(figure, path)


def bars(axes: Axes, names: Sequence[str], values: Sequence[float | None], notes: Sequence[str]) -> None:
    """Horizontal bars, first at the top, with a note at each end."""
    widths = [value or 0.0 for value in values]
    colours = [OURS if n.startswith("ours") else PREFIX[1] if n.startswith("prefix") else OTHER for n in names]
    axes.barh(range(len(names)), widths, color=colours, height=0.65)
    for i, (width, note) in enumerate(zip(widths, notes, strict=True)):
        axes.annotate(note, (width, i), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set(yticks=range(len(names)), yticklabels=names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.65 * (max(widths) or 1.0))
    axes.tick_params(axis="y", length=0)


def decode(rows: list[Row], path: Path) -> None:
    kinds = {"graph": "CUDA graph", "eager": "eager"}
    by_batch(rows, path, "launch", kinds, "no prefix", "ms per step (over no prefix)", "Decoding")


def generate(rows: list[Row], path: Path) -> None:
    kinds = {"dynamic": "dynamic cache", "static": "static cache"}
    by_batch(rows, path, "cache", kinds, "no adapter", "ms per call (over no adapter)", "generate")


def by_batch(
    rows: list[Row], path: Path, size: str, kinds: dict[str, str], reference: str, unit: str, title: str
) -> None:
    """Milliseconds by method, a row of panels for each kind by this size, a column for each batch."""
    groups = by_sizes(rows)
    shown = [kind for kind in kinds if any(g.sizes[size] == kind for g in groups)]
    batches = list(dict.fromkeys(g.sizes["B"] for g in groups))
    inches = 5.6 * len(batches), 0.6 + 2.4 * len(shown)
    figure, panels = plt.subplots(len(shown), len(batches), figsize=inches, squeeze=False, layout="constrained")
    for sizes, methods in groups:
        axes = panels[shown.index(sizes[size])][batches.index(sizes["B"])]
        least = median(methods.get(reference))
        notes = [
            f"{number(time)}  ({time / least:.2f})" if (time := median(row)) and least else row.get("error", "")
            for row in methods.values()
        ]
        bars(axes, list(methods), [median(row) for row in methods.values()], notes)
        axes.set_title(f"batch {sizes['B']}, {kinds[sizes[size]]}", fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel(unit)
    figure.suptitle(f"{title}, Llama 1B shape, {rows[0]['hardware']}", fontsize=11)
    save(figure, path)


def training(rows: list[Row], path: Path) -> None:
    """Milliseconds per step by method, with memory and trainable parameters; of the largest batch."""
    largest = max(row["sizes"]["B"] * row["sizes"]["L"] for row in rows)
    rows = [row for row in rows if row["sizes"]["B"] * row["sizes"]["L"] == largest]
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["sizes"]["num_hidden_layers"], row["sizes"]["hidden_size"]), []).append(row)
    inches = 9.5, sum(0.9 + 0.3 * len(own) for own in groups.values())
    heights = [1 + len(own) for own in groups.values()]
    figure, panels = plt.subplots(
        len(groups), figsize=inches, squeeze=False, layout="constrained", gridspec_kw={"height_ratios": heights}
    )
    for axes, ((layers, size), own) in zip(panels.flat, groups.items(), strict=True):
        order = sorted(own, key=lambda row: median(row) or float("inf"))
        names = [f"{row['method']}{' (again)' if row['sizes'].get('run', 1) > 1 else ''}" for row in order]
        bars(axes, names, [median(row) for row in order], [training_note(row) for row in order])
        axes.set_title(f"{layers} layers of size {size:,}", fontsize=10)
    panels.flat[-1].set_xlabel("ms per step")
    sizes = rows[0]["sizes"]
    figure.suptitle(f"Training step, B = {sizes['B']}, L = {sizes['L']:,}, {rows[0]['hardware']}", fontsize=11)
    save(figure, path)


def training_note(row: Row) -> str:
    if "error" in row:
        return row["error"]
    memory = "" if row["peak_memory_bytes"] is None else (
        f", {(row['peak_memory_bytes'] + row['held_memory_bytes']) / 2**30:.1f} GiB"
    )  # fmt: skip
    trained = row["figures"]["trainable_parameters"] / 1e6
    return f"{number(row['milliseconds']['median'])} ms{memory}, {trained:,.1f} M trained"


def processes(rows: list[Row], path: Path) -> None:
    """Tokens per second by way, a panel for each model."""
    groups = by_sizes(rows)
    figure, panels = plt.subplots(len(groups), 1, figsize=(7.5, 1 + 2.3 * len(groups)), layout="constrained")
    for axes, (sizes, methods) in zip(np.atleast_1d(panels), groups, strict=True):
        rates = [1e3 * row["figures"]["tokens"] / time if (time := median(row)) else None for row in methods.values()]
        notes = [
            f"{rate:,.0f}" if rate else row.get("error", "") for rate, row in zip(rates, methods.values(), strict=True)
        ]
        bars(axes, list(methods), rates, notes)
        axes.set_title(
            f"{sizes['num_hidden_layers']} layers of size {sizes['hidden_size']:,}, {sizes['dtype']}", fontsize=10
        )
    np.atleast_1d(panels)[-1].set_xlabel("tokens per second of all processes")
    figure.suptitle(f"Training in two processes, {rows[0]['hardware']}", fontsize=11)
    save(figure, path)


def adapters(rows: list[Row], path: Path) -> None:
    """Milliseconds per call by method, with tokens per second."""
    notes = [
        f"{1e3 * row['figures']['tokens'] / time:,.0f} tokens/s" if (time := median(row)) else row.get("error", "")
        for row in rows
    ]
    figure, axes = plt.subplots(figsize=(8.2, 0.9 + 0.38 * len(rows)), layout="constrained")
    bars(axes, [row["method"] for row in rows], [median(row) for row in rows], notes)
    sizes = rows[0]["sizes"]
    axes.set_xlabel("ms per call of generate")
    axes.set_title(f"{sizes['adapters']} adapters, batch {sizes['B']}, {rows[0]['hardware']}", fontsize=11)
    save(figure, path)


def building(rows: list[Row], path: Path) -> None:
    """Gigabytes of keys and values read per second, a panel for each dtype, beside the copy's."""
    groups = by_sizes(rows)
    dtypes = list(dict.fromkeys(g.sizes["dtype"] for g in groups))
    figure, panels = plt.subplots(len(dtypes), 1, figsize=(7.5, 1 + 1.9 * len(dtypes)), layout="constrained")
    for axes, dtype in zip(np.atleast_1d(panels), dtypes, strict=True):
        names, rates = [], []
        for sizes, methods in (g for g in groups if g.sizes["dtype"] == dtype):
            for name, row in methods.items():
                time = median(row)
                names.append(f"{'ours, ' if name != 'copy' else ''}{name}, m = {sizes['m']:,}")
                rates.append(row["figures"]["bytes"] / time / 1e6 if time else 0.0)
        bars(axes, names, rates, [f"{rate:,.0f}" for rate in rates])
        axes.set_title(dtype, fontsize=10)
    np.atleast_1d(panels)[-1].set_xlabel("GB/s of keys and values (copy: read and written)")
    figure.suptitle(f"Building a state, H = 8, d = 64, {rows[0]['hardware']}", fontsize=11)
    save(figure, path)


def cpu(rows: list[Row], path: Path) -> None:
    """Time of ours over plain attention against L."""
    groups = by_sizes(rows)
    modes = list(dict.fromkeys(g.sizes["mode"] for g in groups))
    figure, panels = plt.subplots(1, len(modes), figsize=(4.6 * len(modes), 3.6), sharey=True, layout="constrained")
    for axes, mode in zip(np.atleast_1d(panels), modes, strict=True):
        axes.axhline(1, color=PLAIN, linewidth=1)
        for dtype, colour in (("float32", OURS), ("bfloat16", "#e59866")):
            points = [
                (g.sizes["L"], ours / plain)
                for g in groups
                if (g.sizes["mode"], g.sizes["dtype"]) == (mode, dtype)
                and (ours := median(g.rows.get("ours")))
                and (plain := median(g.rows.get("plain")))
            ]
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, label=dtype)
        lengths = sorted({g.sizes["L"] for g in groups})
        axes.set(title=mode, xscale="log", xlabel="L", ylim=(0, None))
        axes.set_xticks(lengths, [f"{L:,}" for L in lengths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    np.atleast_1d(panels)[0].set_ylabel("time over plain attention")
    np.atleast_1d(panels)[0].legend(frameon=False)
    figure.suptitle(rows[0]["hardware"], fontsize=11)
    save(figure, path)


def host(rows: list[Row], path: Path) -> None:
    """Microseconds of one call, by what is called."""
    groups = by_sizes(rows)
    modes = list(dict.fromkeys(g.sizes["mode"] for g in groups))
    figure, panels = plt.subplots(1, len(modes), figsize=(3.2 * len(modes), 3.6), layout="constrained")
    for axes, mode in zip(np.atleast_1d(panels), modes, strict=True):
        found = next(g.rows for g in groups if g.sizes["mode"] == mode)
        times = {name: 1e3 * time / row["figures"]["calls"] for name, row in found.items() if (time := median(row))}
        names = list(times)
        colours = [OURS if name.startswith("ours") else PLAIN if name.startswith("plain") else OTHER for name in names]
        axes.bar(range(len(names)), list(times.values()), color=colours)
        axes.set(title=mode, ylabel="µs per call")
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    figure.suptitle(rows[0]["hardware"], fontsize=11)
    save(figure, path)


PLOTS: dict[str, Callable[[list[Row], Path], None]] = {
    "attention": attention,
    "figure3": figure3,
    "decode": decode,
    "generate": generate,
    "training": training,
    "large": training,
    "processes": processes,
    "adapters": adapters,
    "building": building,
    "cpu": cpu,
    "host": host,
}
