"""Experiment 2, Theorem 3.2: gradient descent for growing m, against what the kernel at the start predicts."""

from __future__ import annotations

import math

import torch

from ..progress import Reporter
from .bounds import certificate
from .fits import power_law
from .inputs import INPUTS, random_inputs
from .model import initial, kernel
from .setting import Loader, Row, Setting
from .training import Start, descend

TARGET = 1e-9  # of the loss at the start, where a run ends
STEPS = 800  # at most
POINTS = 200  # of a loss curve that are kept
STEP_SIZES = (0.25, 0.5, 1.0, 1.5, 1.9, 2.1, 2.5, 4.0, 8.0)  # times 1 / (m lambda_max); linearised, 2 is the limit
STARTS = {"independent": False, "paired": True}  # signs of W(0)


def train(setting: Setting, m: int, start: str, factor: float, draw: int) -> Row:
    """One run with eta = factor / (m lambda_max). Targets of unit norm; inputs and targets are the same for every m."""
    data = setting.generator(7)
    X = INPUTS[setting.inputs](setting.n, setting.d, data)
    Y = random_inputs(setting.n, setting.d, data)
    W, a = initial(setting.d, m, setting.sigma, setting.generator(10 + draw), paired=STARTS[start])
    first = Start.of(W, a, X, Y)
    eta = factor * first.kernel_step()
    run = descend(W, a, X, Y, eta, STEPS, TARGET)
    H, values = kernel(W, a, X), first.values
    proof = certificate(first.sizes, values[0], values[-1], m, first.residual.norm())
    times = torch.unique(torch.linspace(0, len(run.loss) - 1, POINTS).long())
    predicted = first.predicted_loss(eta, times.to(values))
    row = {"kind": "run", "m": m, "start": start, "factor": factor, "draw": draw, "eta": eta, "diverged": run.diverged}
    row |= {"n": setting.n, "d": setting.d, "sigma": setting.sigma, "inputs": setting.inputs}
    row |= {"smallest": values[0].item(), "largest": values[-1].item(), "drift": run.drift, "drift_rms": run.drift_rms}
    row |= {"t": times.tolist(), "loss": [run.loss[t] for t in times.tolist()], "predicted": predicted.tolist()}
    row |= {"careful_step": proof.eta.item() / first.kernel_step(), "certified": bool(proof.holds)}
    row["needed_m"] = proof.needed_m.item()
    row |= {"rate": rate(run.loss), "predicted_rate": None, "kernel_change": None}
    if not run.diverged:
        every = torch.arange(len(run.loss)).to(values)
        row["predicted_rate"] = rate(first.predicted_loss(eta, every).tolist())
        row["kernel_change"] = ((kernel(run.W, a, X) - H).norm() / H.norm()).item()
    return row


def rate(loss: list[float]) -> float | None:
    """How much of the residual a step removes, 1 - |e(t+1)| / |e(t)|, on average over the second half of a run."""
    half = len(loss) // 2
    if half < 2 or not 0 < loss[-1] < math.inf:
        return None
    return 1 - (loss[-1] / loss[half]) ** (0.5 / (len(loss) - 1 - half))


def careful(setting: Setting, m: int, start: str) -> Row:
    """100 steps of the step size of our theorem: the contraction against the kernel's and the theorem's."""
    data = setting.generator(7)
    X = INPUTS[setting.inputs](setting.n, setting.d, data)
    Y = random_inputs(setting.n, setting.d, data)
    W, a = initial(setting.d, m, setting.sigma, setting.generator(10), paired=STARTS[start])
    first = Start.of(W, a, X, Y)
    eta = first.careful_step()
    loss = descend(W, a, X, Y, eta, 100).loss
    lost = 1 - loss[-1] / loss[0]
    predicted = first.predicted_loss(eta, torch.tensor([0.0, 100.0]).to(W))
    return {
        "kind": "careful",
        "m": m,
        "start": start,
        "eta": eta,
        "of_kernel_step": eta / first.kernel_step(),
        "lost": lost,
        "predicted": 1 - (predicted[1] / predicted[0]).item(),
        "guaranteed": -math.expm1(200 * math.log1p(-eta * m * first.values[0].item() / 2)),
    }


def measure(setting: Setting, reporter: Reporter, load_model: Loader) -> list[Row]:
    """All rows; `draws` counts the starts for each m up to 2^12 (beyond, one)."""
    powers = range(2, setting.largest + 1)
    jobs = [
        (2**k, start, 1.0, draw) for start in STARTS for k in powers for draw in range(setting.draws if k <= 12 else 1)
    ]
    sweep = [(2 ** min(k, setting.largest), factor) for k in (6, 12) for factor in STEP_SIZES if factor != 1.0]
    jobs += [(m, "paired", factor, 0) for m, factor in sweep]
    reporter.stage("gradient descent", len(jobs) + len(STARTS))
    rows = []
    for m, start, factor, draw in jobs:
        rows.append(train(setting, m, start, factor, draw) | {"sweep": factor != 1.0})
        reporter.advance()
    for start in STARTS:
        rows.append(careful(setting, 2 ** min(12, setting.largest), start))
        reporter.advance()
    return rows


def by_m(rows: list[Row], start: str) -> list[Row]:
    """The runs with the kernel's step from one kind of start."""
    return [r for r in rows if r["kind"] == "run" and r["start"] == start and r["factor"] == 1.0]


def rate_error(row: Row) -> float:
    """Measured over predicted contraction, less one; infinite where there is none."""
    if row["diverged"] or row["rate"] is None or not row["predicted_rate"]:
        return math.inf
    return row["rate"] / row["predicted_rate"] - 1


def lazy_from(rows: list[Row]) -> int | None:
    """The smallest m from which on every run contracts within 10 % of the kernel's prediction."""
    lazy = None
    for m in sorted({r["m"] for r in rows}, reverse=True):
        if any(abs(rate_error(r)) > 0.1 for r in rows if r["m"] == m):
            return lazy
        lazy = m
    return lazy


def words(rows: list[Row]) -> list[str]:
    """What was seen."""
    text = []
    for start in STARTS:
        runs = by_m(rows, start)
        text += describe_runs(start, runs)
    for m in sorted({r["m"] for r in rows if r.get("sweep")}):
        sweep = [r for r in rows if r["kind"] == "run" and r["m"] == m and r["start"] == "paired" and r["draw"] == 0]
        broken = [r["factor"] for r in sweep if r["diverged"]]
        fine = max((r["factor"] for r in sweep if not r["diverged"] and r["loss"][-1] < r["loss"][0]), default=None)
        text.append(
            f"m = {m}, pairs: descent fell with eta up to {fine} / (m lambda_max); it diverged "
            f"(passed 10 times its start) at {', '.join(map(str, sorted(broken))) or 'none'} of "
            f"{', '.join(map(str, STEP_SIZES))}."
        )
    for r in (r for r in rows if r["kind"] == "careful"):
        text.append(
            f"The careful step of our theorem, m = {r['m']}, {r['start']}: {r['of_kernel_step']:.2g} of the kernel's; "
            f"100 steps remove {r['lost']:.3g} of the loss (the kernel predicts {r['predicted']:.3g}, the theorem, "
            f"were its hypotheses met, {r['guaranteed']:.3g})."
        )
    return text


def describe_runs(start: str, runs: list[Row]) -> list[str]:
    largest = max(r["m"] for r in runs)
    last = next(r for r in runs if r["m"] == largest)
    lazy, text = lazy_from(runs), []
    small = [r for r in runs if r["m"] < r["n"]]
    text.append(
        f"{start} signs: at m = {largest} a step removes {last['rate']:.3g} of the residual where the kernel at the "
        f"start predicts {last['predicted_rate']:.3g} ({rate_error(last):+.1%}); within 10 % of it for every run "
        f"from m = {lazy} on."
    )
    tail = [r for r in runs if r["m"] >= largest / 256 and not r["diverged"]]
    fits = [power_law([r["m"] for r in tail], [r[key] for r in tail]) for key in ("drift", "drift_rms")]
    text.append(
        f"{start} signs: max_r |w_r(t) - w_r(0)| falls as m to the power {fits[0]} (m from {largest // 256}), to "
        f"{last['drift']:.3g}, the root mean square over r as {fits[1]}; the kernel moves by "
        f"{last['kernel_change']:.2%}."
    )
    stuck = [r["loss"][-1] / r["loss"][0] for r in small]
    text.append(
        f"{start} signs, m < n (H is singular): the loss ends at {min(stuck):.2g} to {max(stuck):.2g} of "
        f"its start; at m = {largest} at {last['loss'][-1] / last['loss'][0]:.1g}. Our theorem's hypotheses "
        f"{'hold' if last['certified'] else 'do not hold'} there: they would ask for m of about {last['needed_m']:.1g}."
    )
    return text
