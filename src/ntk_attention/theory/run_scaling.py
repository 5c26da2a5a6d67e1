"""Experiment 3, Proposition 3.3: the loss against the prefix's length m, the number of samples n and the steps.

The targets are y(x) = sum_k softmax(V^T x)_k u_k of a teacher with four tokens of its own. The student starts paired,
hence at F = 0: with independent signs its start, of size sqrt(m), would drown the targets off the samples.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..progress import Reporter
from .fits import Line, compare
from .inputs import INPUTS
from .model import initial, outputs
from .setting import Loader, Row, Setting
from .training import Start, descend

TEACHER, SHARPNESS, HELD_OUT = 4, 1.5, 256
SAMPLES = 32  # n where it is not varied
VARIED = tuple(2**k for k in range(2, 9))  # n where it is
STEPS = 1024


def data(setting: Setting, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs and targets [n, d] to train on, and [HELD_OUT, d] held out; the first n of one fixed order."""
    generator = setting.generator(3)
    options = {"dtype": torch.float64, "device": setting.device, "generator": generator}
    V, U = (torch.randn(setting.d, TEACHER, **options) for _ in range(2))  # type: ignore[call-overload]
    X = INPUTS[setting.inputs](HELD_OUT + n, setting.d, generator)
    Y = torch.softmax(SHARPNESS * X @ V, dim=1) @ U.T
    return X[HELD_OUT:], Y[HELD_OUT:], X[:HELD_OUT], Y[:HELD_OUT]


def train(setting: Setting, m: int, n: int, eta: float | None, draw: int) -> Row:
    """One run of STEPS steps. Losses are 1/2 |F - y|^2, averaged over samples.

    Args:
        eta: the step size; by default that of the run's own kernel, 1 / (m lambda_max).
    """
    X, Y, X_held, Y_held = data(setting, n)
    W, a = initial(setting.d, m, setting.sigma, setting.generator(10 + draw), paired=True)
    eta = eta or Start.of(W, a, X, Y).kernel_step()
    times = sorted({round(2 ** (k / 4)) for k in range(4 * 10 + 1)})  # 1 ... STEPS, evenly in its logarithm
    held_out: dict[int, float] = {}

    def watch(t: int, W: Tensor) -> None:
        if t in times:
            held_out[t] = 0.5 * (outputs(W, a, X_held) - Y_held).square().sum(dim=1).mean().item()

    run = descend(W, a, X, Y, eta, STEPS, watch=watch)
    row: Row = {"m": m, "n": n, "d": setting.d, "draw": draw, "eta": eta, "steps": STEPS, "diverged": run.diverged}
    row |= {"t": [*held_out], "loss": [run.loss[t] / n for t in held_out], "held_out": [*held_out.values()]}
    row |= {"start": run.loss[0] / n, "held_out_start": 0.5 * Y_held.square().sum(dim=1).mean().item()}
    return row | {"drift": run.drift}


def measure(setting: Setting, reporter: Reporter, load_model: Loader) -> list[Row]:
    """All rows; m up to 2^14 at most on a CPU's account, n from 4 to 256."""
    powers = range(5, min(setting.largest, 14) + 1)
    own = [("m", 2**k, SAMPLES, draw) for k in powers for draw in range(min(2, setting.draws))]
    m = 2 ** min(12, setting.largest)
    samples = [("n", m, n, draw) for n in VARIED for draw in range(min(2, setting.draws))]
    reporter.stage("scaling", len(own) + len(samples) + len(powers))
    rows = []
    for kind, m, n, draw in own + samples:
        rows.append({"kind": kind, **train(setting, m, n, None, draw)})
        reporter.advance()
    eta = min(r["eta"] for r in rows if r["kind"] == "m")  # fits the longest prefix
    for k in powers:
        rows.append({"kind": "fixed", **train(setting, 2**k, SAMPLES, eta, 0)})
        reporter.advance()
    return rows


def final(rows: list[Row], kind: str) -> list[Row]:
    return [r for r in rows if r["kind"] == kind and not r["diverged"]]


def columns(rows: list[Row], x: str, y: Callable[[Row], float]) -> tuple[list[float], list[float]]:
    return [r[x] for r in rows], [y(r) for r in rows]


def last_loss(row: Row) -> float:
    return row["loss"][-1]


def best_held_out(row: Row) -> float:
    return min(row["held_out"])


def windows(row: Row) -> dict[str, tuple[list[float], list[float]]]:
    """Steps and losses of a run in parts: early, late, and the last quarter, by name."""
    last, chosen = row["steps"], {}
    for low, high in ((1, 32), (32, last), (last // 4, last)):
        places = [i for i, t in enumerate(row["t"]) if low <= t <= high]
        chosen[f"steps {low} to {high}"] = ([row["t"][i] for i in places], [row["loss"][i] for i in places])
    return chosen


def collapse(rows: list[Row], largest: int) -> tuple[float, int]:
    """How far runs of different m at one eta lie apart, as a factor, where they have spent the same m * steps."""
    by_compute: dict[int, list[float]] = {}
    for r in rows:
        for t, loss in zip(r["t"], r["loss"], strict=True):
            if r["m"] >= largest // 32:
                by_compute.setdefault(r["m"] * t, []).append(loss)
    spread = [max(v) / min(v) for v in by_compute.values() if len(v) > 1]
    return max(spread), len(spread)


def verdict(name: str, x: list[float], y: list[float]) -> str:
    """One sentence about y against x: which law fits, with both slopes and residuals."""
    if max(y) / min(y) < 1.2:
        return f"{name}: flat, {y[0]:.3g} to {y[-1]:.3g}."
    winner, power, exp = compare(x, y)
    return (
        f"{name}: {winner}. Power law, exponent {power}, off by a factor {factor(power)}; exponential, "
        f"{exp.slope:.2g} [{exp.low:.2g}, {exp.high:.2g}] per unit, off by {factor(exp)}."
    )


def factor(fit: Line) -> str:
    return f"{2.718281828**fit.residual:.2f}"


def words(rows: list[Row]) -> list[str]:
    """What was seen."""
    own, samples, fixed = (final(rows, kind) for kind in ("m", "n", "fixed"))
    largest = max(r["m"] for r in own)
    text = [
        verdict(f"Loss after {STEPS} steps of the run's own kernel step, against m", *columns(own, "m", last_loss)),
        verdict(f"Loss after {STEPS} steps of one step size for all m, against m", *columns(fixed, "m", last_loss)),
    ]
    apart, places = collapse(fixed, largest)
    text.append(
        f"With one step size, runs of m >= {largest // 32} that have spent equal compute m * steps differ by a factor "
        f"of at most {apart:.2f} ({places} places): up to that, m and steps are interchangeable."
    )
    longest = next(r for r in own if r["m"] == largest)
    for name, (t, loss) in windows(longest).items():
        text.append(verdict(f"Loss against steps, m = {largest}, {name}", t, loss))
    text.append(verdict("Held-out loss against n", *columns(samples, "n", lambda r: r["held_out"][-1])))
    text.append(verdict("Held-out loss at its best step, against n", *columns(samples, "n", best_held_out)))
    slow = [r for r in samples if r["loss"][-1] > 1e-6 * r["start"]]
    text.append(verdict("Training loss against n, where training has not ended", *columns(slow, "n", last_loss)))
    text.append(verdict("Held-out loss at its best step, against m", *columns(own, "m", best_held_out)))
    return text
