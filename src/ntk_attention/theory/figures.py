"""One figure for each experiment, from its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from . import run_bridge, run_capacity, run_kernel, run_scaling, run_training
from .fits import power_law
from .setting import Row

BLUE, RED, GREY = "#1f4e79", "#b5402a", "#888888"


def grid(title: str) -> tuple[Any, list[Axes]]:
    """A figure of two by two panels."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    figure.suptitle(title, fontsize=13)
    for panel in axes.flat:
        panel.grid(alpha=0.3)
    return figure, list(axes.flat)


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=140)
    plt.close(figure)


def shades(values: Sequence[Any]) -> list[Any]:
    """One colour for each value, from light to dark."""
    return [plt.get_cmap("viridis_r")(0.1 + 0.85 * i / max(1, len(values) - 1)) for i in range(len(values))]


def medians(rows: list[Row], x: str, y: str | Callable[[Row], float]) -> tuple[list[float], list[float]]:
    """The median of y for each value of x."""
    value = y if callable(y) else lambda row: row[y]
    keys = sorted({row[x] for row in rows})
    return keys, [median(value(row) for row in rows if row[x] == key) for key in keys]


def label(panel: Axes, title: str, x: str, y: str, log: str = "xy", legend: bool = True) -> None:
    panel.set_title(title, fontsize=11)
    panel.set(xlabel=x, ylabel=y)
    if "x" in log:
        panel.set_xscale("log")
    if "y" in log:
        panel.set_yscale("log")
    if legend:
        panel.legend(frameon=False, fontsize=8)


def kernel(rows: list[Row], path: Path) -> None:
    """Experiment 1."""
    figure, (radius, size, distance, smallest) = grid("Lemma 3.1: how the kernel moves, and what it tends to")
    shift = [r for r in rows if r["kind"] == "shift"]
    by_m = [r for r in shift if r["varied"] == "m"]
    lengths = sorted({r["m"] for r in by_m})
    for m, colour in zip(lengths, shades(lengths), strict=True):
        R, change, bound = run_kernel.median_shifts(by_m, "common", m=m)
        radius.plot(R, change, marker="o", markersize=3, color=colour, label=f"m = {m}")
    radius.plot(R, bound, "--", color=RED, label=f"our bound, m = {m}")
    radius.plot(R, [change[0] * r / R[0] for r in R], ":", color=GREY, label="slope 1")
    label(radius, "all columns moved by R together", "R", "|H(W~) - H(W(0))|_F")
    for varied, marker in (("m", "o"), ("d", "s"), ("n", "^"), ("sigma", "v")):
        values, change, bound = run_kernel.constants(rows, varied)
        line = size.plot([v / values[0] for v in values], change, marker=marker, markersize=4)[0]
        name = f"{varied} = {values[0]:g} to {values[-1]:g}"
        size.plot([v / values[0] for v in values], bound, "--", color=line.get_color(), alpha=0.6)
        line.set_label(name)
    size.plot([], [], "--", color=GREY, label="our bound")
    label(size, "the constant: change / R at R = 0.01", "the size that varies / its first value", "change / R")
    for (inputs, sigma), colour in zip(run_kernel.starts_of(rows), (BLUE, RED, "#4f8f4f"), strict=True):
        chosen = run_kernel.concentrated(rows, inputs, sigma)
        name = f"{inputs} inputs, sigma = {sigma:g}"
        distance.scatter([r["m"] for r in chosen], [r["distance"] for r in chosen], s=5, color=colour, alpha=0.3)
        m, d = medians(chosen, "m", "distance")
        distance.plot(m, d, color=colour, label=name)
        m, value = medians(chosen, "m", lambda r: max(r["smallest"], 1e-8))
        smallest.plot(m, value, marker="o", markersize=3, color=colour, label=name)
        smallest.axhline(chosen[0]["limit_smallest"], color=colour, linestyle="--", alpha=0.6)
    distance.plot(m, [d[-1] * (m[-1] / v) ** 0.5 for v in m], ":", color=GREY, label="slope -1/2")
    label(distance, "H(W(0)) tends to its limit", "m", "|H(W(0)) - limit|_F / |limit|_F")
    smallest.set_ylim(bottom=1e-5)
    label(smallest, "lambda_min(H(W(0))); dashed: of the limit", "m", "lambda_min")
    save(figure, path)


def training(rows: list[Row], path: Path) -> None:
    """Experiment 2."""
    figure, (loss, rate, drift, steps) = grid("Theorem 3.2: gradient descent against the prediction of H(W(0))")
    runs = [r for r in run_training.by_m(rows, "independent") if r["draw"] == 0]
    lengths = [r["m"] for r in runs][::2]
    for m, colour in zip(lengths, shades(lengths), strict=True):
        row = next(r for r in runs if r["m"] == m)
        loss.plot(row["t"], [v / row["loss"][0] for v in row["loss"]], color=colour, label=f"m = {m}")
        loss.plot(row["t"], [v / row["loss"][0] for v in row["predicted"]], ":", color=colour)
    loss.set_ylim(bottom=run_training.TARGET / 2)
    label(loss, "independent signs; dotted: prediction", "step", "loss / loss at the start", log="y")
    for start, colour in (("independent", BLUE), ("paired", RED)):
        runs = [r for r in run_training.by_m(rows, start) if r["rate"] is not None and r["predicted_rate"]]
        ratios = [r["rate"] / r["predicted_rate"] for r in runs]
        rate.scatter([r["m"] for r in runs], ratios, s=6, color=colour, alpha=0.4)
        rate.plot(*medians(runs, "m", lambda r: r["rate"] / r["predicted_rate"]), color=colour, label=f"{start} signs")
        drift.plot(*medians(runs, "m", "drift"), marker="o", markersize=3, color=colour, label=f"{start}: max over r")
        drift.plot(*medians(runs, "m", "drift_rms"), "--", color=colour, label=f"{start}: root mean square over r")
    rate.axhspan(0.9, 1.1, color=GREY, alpha=0.2, label="within 10 %")
    rate.set_ylim(0, 3)
    label(rate, "contraction per step, measured / predicted", "m", "ratio (small m: beyond the panel)", log="x")
    label(drift, "how far the columns move", "m", "|w_r(t) - w_r(0)|")
    m = max(r["m"] for r in rows if r.get("sweep"))
    sweep = sorted((r for r in rows if r.get("m") == m and r.get("draw") == 0 and r["start"] == "paired"),
                   key=lambda r: r["factor"])  # fmt: skip
    for row, colour in zip(sweep, shades(sweep), strict=True):
        steps.plot([t + 1 for t in row["t"]], [v / row["loss"][0] for v in row["loss"]], color=colour,
                   label=f"{row['factor']:g}{' (diverged)' if row['diverged'] else ''}")  # fmt: skip
    steps.set_ylim(run_training.TARGET / 2, 1e3)
    label(steps, f"m = {m}, pairs: eta times m lambda_max", "step + 1", "loss / loss at the start")
    save(figure, path)


def scaling(rows: list[Row], path: Path) -> None:
    """Experiment 3."""
    figure, (length, compute, steps, samples) = grid("Proposition 3.3: the loss against m, steps and n")
    own, fixed, by_n = (run_scaling.final(rows, kind) for kind in ("m", "fixed", "n"))
    length.plot(*medians(own, "m", run_scaling.last_loss), marker="o", color=BLUE, label="eta from each run's kernel")
    length.plot(*medians(fixed, "m", run_scaling.last_loss), marker="s", color="#4f8f4f", label="one eta for all m")
    held = medians(own, "m", lambda r: min(r["held_out"]))
    length.plot(*held, "--", marker="o", color=RED, label="held out, at its best step")
    label(length, f"against the prefix's length, {own[0]['steps']} steps", "m", "loss per sample")
    for row, colour in zip(fixed, shades(fixed), strict=True):
        compute.plot([row["m"] * t for t in row["t"]], row["loss"], color=colour, label=f"m = {row['m']}")
    label(compute, "one eta for all m, against compute", "m * steps", "loss per sample")
    longest = max(own, key=lambda r: r["m"])
    steps.plot(longest["t"], longest["loss"], color=BLUE, label="training")
    steps.plot(longest["t"], longest["held_out"], "--", color=RED, label="held out")
    for (name, (t, loss)), style in zip(run_scaling.windows(longest).items(), (":", "-.", (0, (1, 3))), strict=True):
        power = power_law(t, loss)
        steps.plot(t, [2.718281828**power.intercept * v**power.slope for v in t], linestyle=style, color=GREY,
                   label=f"{name}: exponent {power.slope:.2f}")  # fmt: skip
    label(steps, f"against steps, m = {longest['m']}", "step", "loss per sample")
    late = medians(by_n, "n", lambda r: r["held_out"][-1])
    best = medians(by_n, "n", lambda r: min(r["held_out"]))
    samples.plot(*late, marker="s", color="#d08a7a", label="held out, at the end")
    samples.plot(*best, marker="o", color=RED, label="held out, at its best step")
    samples.plot(*medians(by_n, "n", run_scaling.last_loss), marker="o", color=BLUE, label="training, at the end")
    samples.set_ylim(1e-5, 5)
    label(samples, f"against the number of samples, m = {by_n[0]['m']}", "n", "loss per sample")
    save(figure, path)


def bridge(rows: list[Row], path: Path) -> None:
    """Experiment 4."""
    figure, (size, drift, tokens, features) = grid("A real layer: prefix tokens and (Z, k) in place of its context")
    kinds = [("prefix", "m", BLUE, "m prefix tokens"), ("positive_random", "r", RED, "(Z, k), positive random")]
    for kind, key, colour, name in (*kinds, ("elu", "r", "#4f8f4f", "(Z, k), elu")):
        runs = [r for r in rows if r["kind"] == kind]
        sizes = [r[key] for r in runs]
        size.plot(sizes, [r["loss"][-1] for r in runs], marker="o", color=colour, label=name)
        size.plot(sizes, [r["held_out"][-1] for r in runs], "--", marker="x", color=colour)
        drift.plot(sizes, [r["drift"][0] for r in runs], marker="o", color=colour, label=name)
        drift.plot(sizes, [1 - r["alignment"] for r in runs], ":", marker="x", color=colour)
    size.axhline(1, color=GREY, linewidth=1)
    label(size, "after training; dashed: held-out queries", "m or r", "loss / loss without prefix")
    label(drift, "lazy? solid: move of P or Z; dotted: 1 - cosine of kernels", "m or r", "change / start")
    for panel, (kind, key, _, name) in zip((tokens, features), kinds, strict=True):
        runs = [r for r in rows if r["kind"] == kind]
        for row, colour in zip(runs, shades(runs), strict=True):
            panel.plot(row["loss"], color=colour, label=f"{key} = {row[key]}, rate {row['rate']:g}")
        label(panel, name, f"step of {run_bridge.STEPS}, Adam", "loss / loss without prefix", log="y")
    save(figure, path)


def capacity(rows: list[Row], path: Path) -> None:
    """Experiment 5."""
    figure, (lost, sharpness, count, answers) = grid("What a state of r features returns of m random facts")
    fact, count_rows = run_capacity.chosen(rows, kind="facts"), run_capacity.chosen(rows, kind="counted")
    sharp = run_capacity.chosen(fact, beta=run_capacity.SHARP)
    styles = {"anchored": (BLUE, "o"), "positive_random": (RED, "s"), "elu": ("#4f8f4f", "^")}
    lines = {8: ":", 32: "-", 128: "--"}
    for name, r in run_capacity.SIZES:
        own = [row | {"m / r": row["m"] / r} for row in run_capacity.chosen(sharp, map=name, r=r)]
        colour, marker = styles[name]
        drawn: dict[str, Any] = {
            "color": colour,
            "linestyle": lines[r],
            "marker": marker,
            "markersize": 4,
            "label": f"{name}, r = {r}",
        }
        lost.plot(*run_capacity.averages(own, "m / r", "lost_solved"), **drawn)
        answers.plot(*run_capacity.averages(own, "m / r", "right_answers"), **drawn)
        answers.plot(
            *run_capacity.averages(own, "m / r", "right_squares"), color=colour, linestyle=lines[r], alpha=0.35
        )
    own = [row | {"m / r": row["m"] / row["r"]} for row in run_capacity.chosen(sharp, map="anchored", r=32)]
    lost.plot(*run_capacity.averages(own, "m / r", "tail"), color="black", label="least, k before the values")
    lost.plot(*run_capacity.averages(own, "m / r", "every_state"), "-.", color=GREY, label="least of any state, r = 32")
    label(lost, "sharp logits: error of the best state", "m / r", "squared error / values", log="x")
    answers.axvline(own[0]["decodable"] / 32, color="black", label="no state beyond, r = 32")
    answers.axvline(1, color=GREY, linestyle=":", label="exact up to here")
    label(answers, "answers right: trained for them; pale: least squares", "m / r", "share of facts", log="x")
    answers.legend(frameon=False, fontsize=8, loc="lower left")
    swept = run_capacity.chosen(fact, m=run_capacity.FACTS, r=32)
    for name, (colour, marker) in styles.items():
        x, y = run_capacity.averages(run_capacity.chosen(swept, map=name), "beta", "lost_solved")
        sharpness.plot(x, y, marker=marker, markersize=4, color=colour, label=f"{name}, r = 32")
    for name, line, words in (
        ("tail", "-", "singular values beyond the r-th"),
        ("sharp", "-.", "by the own keys' share"),
    ):
        x, y = run_capacity.averages(swept, "beta", name)
        sharpness.plot(x, [value or float("nan") for value in y], line, color="black", label=words)
    label(sharpness, f"m = {run_capacity.FACTS}: from blunt to sharp logits", "largest logit", "squared error / values")
    for r, colour in zip(sizes := sorted({row["r"] for row in count_rows}), shades(sizes), strict=True):
        own = run_capacity.chosen(count_rows, r=r)
        count.plot(*run_capacity.averages(own, "d_v", "bound"), color=colour, label=f"bound, r = {r}")
        count.plot(*run_capacity.averages(own, "d_v", "reached"), "o", color=colour)
    label(count, "largest m with an exact state, dots: measured", "d_v", "m")
    save(figure, path)
