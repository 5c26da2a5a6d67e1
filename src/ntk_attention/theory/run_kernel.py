"""Experiment 1, Lemma 3.1: how far the kernel moves with the prefix, and what it tends to as m grows."""

from __future__ import annotations

from dataclasses import replace
from statistics import median

import torch
from torch import Tensor

from ..progress import Reporter
from .bounds import Sizes, kernel_shift
from .fits import power_law
from .inputs import INPUTS
from .model import initial, kernel, limit_kernel
from .setting import Loader, Row, Setting

RADII = [10 ** (k / 2) for k in range(-8, 1)]  # 1e-4 ... 1


def variants(base: Setting) -> list[tuple[str, int, Setting]]:
    """The base setting with one size changed at a time: (what varies, m, setting)."""
    m = 2 ** min(12, base.largest)
    return [
        *(("m", 2**k, base) for k in range(6, min(base.largest, 16) + 1, 2)),
        *(("d", m, replace(base, d=d)) for d in (2, 4, 8, 16)),
        *(("n", m, replace(base, n=n)) for n in (2, 4, 8, 16, 32)),
        *(("sigma", m, replace(base, sigma=sigma)) for sigma in (0.25, 0.5, 1.0, 1.5)),
    ]


def moves(W: Tensor, X: Tensor, R: float, generator: torch.Generator) -> dict[str, Tensor]:
    """W~ with every |w~_r - w_r| = R: each column in a direction of its own, or all in that of the first input."""
    own = torch.randn(W.shape, dtype=W.dtype, device=W.device, generator=generator)
    return {"own": W + R * own / own.norm(dim=0), "common": W + R * (X[0] / X[0].norm())[:, None]}


def shifts(setting: Setting, m: int, varied: str, generator: torch.Generator) -> list[Row]:
    """|H(W~) - H(W(0))|_F for one draw of W(0) and X and every radius."""
    X = INPUTS[setting.inputs](setting.n, setting.d, generator)
    W, a = initial(setting.d, m, setting.sigma, generator)
    H, sizes = kernel(W, a, X), Sizes.of(W, X)
    rows = []
    for R in RADII:
        bound = kernel_shift(sizes, R).item()
        for direction, moved in moves(W, X, R, generator).items():
            change = torch.linalg.matrix_norm(kernel(moved, a, X) - H).item()
            sizes_of = {"m": m, "d": setting.d, "n": setting.n, "sigma": setting.sigma}
            rows.append(
                {"kind": "shift", "varied": varied, **sizes_of, "direction": direction, "R": R}
                | {"change": change, "norm": H.norm().item(), "bound": bound}
            )
    return rows


def concentration(setting: Setting, m: int, inputs: str, generator: torch.Generator) -> Row:
    """H(W(0)) against its limit for one draw of W(0); the inputs are the same for every m."""
    X = INPUTS[inputs](setting.n, setting.d, setting.generator(99))
    W, a = initial(setting.d, m, setting.sigma, generator)
    H, limit = kernel(W, a, X), limit_kernel(X, setting.sigma)
    return {
        "kind": "concentration",
        "m": m,
        "inputs": inputs,
        "sigma": setting.sigma,
        "distance": ((H - limit).norm() / limit.norm()).item(),
        "smallest": torch.linalg.eigvalsh(H)[0].item(),
        "limit_smallest": torch.linalg.eigvalsh(limit)[0].item(),
    }


def concentrations(base: Setting) -> list[tuple[str, float]]:
    """Inputs and sigma of the starts whose concentration is looked at."""
    return [("random", base.sigma), ("image", base.sigma), ("random", base.sigma / 2)]


def measure(setting: Setting, reporter: Reporter, load_model: Loader) -> list[Row]:
    """All rows. n, d and sigma are those of the base setting, around which one size varies at a time."""
    rows: list[Row] = []
    every = variants(setting)
    reporter.stage("kernel against R", len(every) * setting.draws)
    generator = setting.generator(1)
    for varied, m, variant in every:
        for _ in range(setting.draws):
            rows += shifts(variant, m, varied, generator)
            reporter.advance()
    powers, starts = range(2, setting.largest + 1), concentrations(setting)
    reporter.stage("kernel against m", len(starts) * len(powers) * 2 * setting.draws)
    for inputs, sigma in starts:
        for k in powers:
            for _ in range(2 * setting.draws):
                rows.append(concentration(replace(setting, sigma=sigma), 2**k, inputs, generator))
                reporter.advance()
    return rows


def median_shifts(rows: list[Row], direction: str, **sizes: float) -> tuple[list[float], list[float], list[float]]:
    """R, the median change and the median bound over draws."""
    chosen = [r for r in rows if r["direction"] == direction and all(r[k] == v for k, v in sizes.items())]
    radii = sorted({r["R"] for r in chosen})
    by_radius = [[r for r in chosen if r["R"] == R] for R in radii]
    return radii, *([median(r[key] for r in group) for group in by_radius] for key in ("change", "bound"))  # type: ignore[return-value]


def constants(rows: list[Row], varied: str) -> tuple[list[float], list[float], list[float]]:
    """The varied size, and change / R and bound / R at R = 0.01: medians over draws, of the larger direction."""
    chosen = [r for r in rows if r["kind"] == "shift" and r["varied"] == varied and abs(r["R"] - 0.01) < 1e-9]
    values = sorted({r[varied] for r in chosen})
    out = []
    for key in ("change", "bound"):
        out.append(
            [
                max(
                    median(r[key] / r["R"] for r in chosen if r[varied] == v and r["direction"] == direction)
                    for direction in ("own", "common")
                )
                for v in values
            ]
        )
    return values, *out  # type: ignore[return-value]


def words(rows: list[Row]) -> list[str]:
    """What was seen."""
    shift = [r for r in rows if r["kind"] == "shift"]
    small = [r for r in shift if r["R"] <= 0.0101]
    slopes = {
        name: power_law([r["R"] for r in moved], [r["change"] / r["norm"] for r in moved])
        for name, moved in ((name, [r for r in small if r["direction"] == name]) for name in ("own", "common"))
    }
    linear = all(fit.low <= 1 <= fit.high for fit in slopes.values())
    inside = sum(r["change"] <= r["bound"] for r in shift)
    slack = sorted(r["bound"] / r["change"] for r in small)
    text = [
        f"For R <= 0.01 the kernel's change grows as R to the power {slopes['own']} (columns moved apart) and "
        f"{slopes['common']} (moved together): {'linear, as Lemma 3.1 says' if linear else 'not linear'}.",
        f"{inside} of {len(shift)} moves lie inside our bound, which is {slack[0]:.0f} to {slack[-1]:.0f} times larger "
        f"than the change where R <= 0.01.",
    ]
    for varied in ("m", "d", "n", "sigma"):
        values, change, bound = constants(shift, varied)
        text.append(
            f"Change / R for {varied} = {values[0]:g} to {values[-1]:g}: {change[0]:.3g} to {change[-1]:.3g} "
            f"(the bound's: {bound[0]:.3g} to {bound[-1]:.3g})."
        )
    for inputs, sigma in starts_of(rows):
        text.append(describe_concentration(concentrated(rows, inputs, sigma)))
    return text


def starts_of(rows: list[Row]) -> list[tuple[str, float]]:
    """Inputs and sigma of the starts whose concentration was looked at."""
    return [*dict.fromkeys((r["inputs"], r["sigma"]) for r in rows if r["kind"] == "concentration")]


def concentrated(rows: list[Row], inputs: str, sigma: float) -> list[Row]:
    wanted = ("concentration", inputs, sigma)
    return [r for r in rows if (r["kind"], r.get("inputs"), r["sigma"]) == wanted]


def describe_concentration(rows: list[Row]) -> str:
    largest = max(r["m"] for r in rows)
    tail = [r for r in rows if r["m"] >= largest / 64]
    fit = power_law([r["m"] for r in tail], [r["distance"] for r in tail])
    last = median(r["smallest"] for r in rows if r["m"] == largest)
    half = rows[0]["limit_smallest"] / 2
    above = [m for m in {r["m"] for r in rows} if median(r["smallest"] for r in rows if r["m"] == m) > half]
    return (
        f"{rows[0]['inputs']} inputs, sigma = {rows[0]['sigma']:g}: from m = {largest // 64} on, the distance of "
        f"H(W(0)) from its limit falls as m to the power {fit}; lambda_min is {last:.3g} at m = {largest} and "
        f"{rows[0]['limit_smallest']:.3g} in the limit; the median first passes half of that at "
        f"m = {min(above, default=None)}."
    )
