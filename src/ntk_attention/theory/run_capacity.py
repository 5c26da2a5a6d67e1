"""Experiment 5: how many of m random facts the best state returns, against what no state can exceed.

Keys are random on the sphere, each query is a key times `beta`, so that beta is the largest logit; values are random
signs. Z is solved for, k either weighs all features the same or is solved for with the values known. The sizes here are
the experiment's own; of the setting it takes draws, seed and device, and `largest` where that is below 2^9.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import mean

import torch
from torch import Tensor

from ..ops.features import FeatureMap, feature_map
from ..progress import Reporter
from .capacity import (
    best_normaliser,
    decodable_pairs,
    every_state,
    exact_states,
    generic_pairs,
    nearest_answers,
    nearest_output,
    rank_tail,
    reach,
    sharp_tail,
)
from .inputs import random_inputs
from .setting import Loader, Row, Setting

D = 32  # of keys and of values
SHARP = 32.0
EXACT = 1e-6
BETAS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, SHARP, 64.0)
FACTS = 256  # where beta varies
SIZES = (("anchored", 8), ("anchored", 32), ("anchored", 128), ("positive_random", 32), ("elu", 32))  # phi and r
MAPS = ("anchored", "positive_random", "elu")  # with r = 32
MULTIPLES = (0.5, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 8.0, 16.0)  # of r: m
COUNTED = tuple((r, d_v) for r in (4, 8, 16) for d_v in (1, 2, 3, 8, 16))


def make_map(name: str, r: int, keys: Tensor, seed: int) -> FeatureMap:
    """phi for inputs of the size of `keys` [m, d]; anchored at the first r of them, at other directions beyond m."""
    if name == "elu":
        return feature_map("elu")
    phi = feature_map(name, num_features=r, seed=seed).bind(D)
    if name == "anchored":
        assert isinstance(phi.projection, Tensor)
        given = keys[:r]
        phi.projection = phi.projection.to(keys)
        phi.projection[: len(given)] = given
    return phi


def facts(setting: Setting, name: str, r: int, m: int, beta: float, draw: int) -> Row:
    """One draw of m facts, learned by states of one feature map."""
    generator = setting.generator(7 + draw)
    keys = random_inputs(m, D, generator)
    V = torch.randn(m, D, dtype=torch.float64, generator=generator, device=generator.device).sign()
    S = torch.softmax(beta * keys @ keys.T, dim=1)
    T = S @ V
    x = math.sqrt(beta) * keys
    phi = make_map(name, r, x, draw)
    Phi = phi.scaled(x)[0]  # the scale of a row falls out of F
    row: Row = {"kind": "facts", "map": name, "r": r, "m": m, "beta": beta, "draw": draw, "d_v": D}
    same, solved = (reach(Phi, k) for k in (torch.ones_like(Phi[0]), best_normaliser(Phi, T)))
    F = nearest_output(solved, T)
    row["lost_same"] = 1 - ((same.T @ S).square().sum() / S.square().sum()).item()  # the mean over all V
    row["lost_solved"] = ((F - T).square().sum() / (D * S.square().sum())).item()
    row["exact"] = int(((F - T).abs().amax(dim=1) < EXACT).sum())
    row["right_squares"] = share_right(F, V)
    if beta == SHARP:
        row["right_answers"] = share_right(nearest_answers(same, V), V)
    share = S.diagonal().min().item()
    bounds = {"tail": rank_tail(S, r), "sharp": sharp_tail(m, r, share), "every_state": every_state(m, r)}
    return row | {"share": share, "decodable": decodable_pairs(r, D, m)} | bounds


def share_right(F: Tensor, V: Tensor) -> float:
    """How often a query's own value is that of the largest score, the nearest of all: values have one length."""
    right = (F @ V.T).argmax(dim=1) == torch.arange(len(V), device=V.device)
    return right.double().mean().item()


def counted(setting: Setting, r: int, d_v: int, draw: int) -> Row:
    """The largest m of which random values have an exact state, the sign of the normaliser left free."""
    generator = setting.generator(1007 + draw)
    bound, reached, error = generic_pairs(r, d_v), 0, math.inf
    Phi = torch.rand(bound + 2, r, dtype=torch.float64, generator=generator, device=generator.device)
    V = torch.randn(bound + 2, d_v, dtype=torch.float64, generator=generator, device=generator.device)
    for m in range(1, bound + 3):
        Z, k = exact_states(Phi[:m], V[:m])
        if len(Z) == 0:
            break
        weight = Phi[:m] @ k[0]
        if weight.abs().min() < 1e-9 * weight.abs().max():  # no output at all there
            break
        error = ((Phi[:m] @ Z[0]) / weight[:, None] - V[:m]).abs().max().item()
        reached = m
    return {"kind": "counted", "r": r, "d_v": d_v, "draw": draw, "reached": reached, "bound": bound, "error": error}


def cases(setting: Setting) -> Iterator[tuple[str, int, int, float]]:
    """phi, r, m and beta of every measurement of facts."""
    most = 2 ** min(setting.largest, 9)
    for name, r in SIZES:
        yield from ((name, r, int(r * x), SHARP) for x in MULTIPLES if 4 <= r * x <= most)
    for name, r in SIZES:
        if r == 32:
            yield from ((name, r, FACTS, beta) for beta in BETAS if beta != SHARP)


def measure(setting: Setting, reporter: Reporter, load_model: Loader) -> list[Row]:
    every, rows = list(cases(setting)), []
    reporter.stage("count exact states", len(COUNTED) * setting.draws)
    for r, d_v in COUNTED:
        for draw in range(setting.draws):
            rows.append(counted(setting, r, d_v, draw))
            reporter.advance()
    reporter.stage("recall of facts", len(every) * setting.draws)
    for case in every:
        for draw in range(setting.draws):
            rows.append(facts(setting, *case, draw))
            reporter.advance()
    return rows


def chosen(rows: list[Row], **wanted: object) -> list[Row]:
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def averages(rows: list[Row], x: str, y: str) -> tuple[list[float], list[float]]:
    """The mean of y over draws for every x."""
    places = sorted({row[x] for row in rows})
    return places, [mean(row[y] for row in rows if row[x] == place) for place in places]


def words(rows: list[Row]) -> list[str]:
    """What was seen."""
    count, fact = chosen(rows, kind="counted"), chosen(rows, kind="facts")
    equal = sum(row["reached"] == row["bound"] for row in count)
    few, many = ([row for row in fact if (row["m"] <= row["r"]) == small] for small in (True, False))
    inside = sum(row["lost_same"] >= row["tail"] - 1e-9 for row in fact)
    most = max(row["exact"] / generic_pairs(row["r"], row["d_v"]) for row in many)
    text = [
        f"The largest m of which random values have an exact state is the one counted, r + floor((r - 1) / d_v), "
        f"in {equal} of {len(count)} draws (largest error {max(row['error'] for row in count):.1g}).",
        f"Up to m = r the best state returns {sum(row['exact'] for row in few)} of {sum(row['m'] for row in few)} "
        f"facts to {EXACT:g}; beyond it at most {most:.0%} of the counted number.",
        f"With k chosen before the values {inside} of {len(fact)} states lose as much as the singular values "
        "beyond the r-th say, or more.",
    ]
    for m in (64, 128, 256, 512):
        own = chosen(fact, map="anchored", r=32, m=m, beta=SHARP)
        if own:
            text.append(describe_sharp(own, chosen(fact, r=32, m=m, beta=SHARP)))
    for beta in BETAS:
        own = chosen(fact, beta=beta, m=FACTS, r=32)
        if own:
            lost = ", ".join(f"{name} {mean_of(chosen(own, map=name), 'lost_solved'):.2g}" for name in MAPS)
            text.append(
                f"Largest logit {beta:g}, m = {FACTS}, r = 32: lost {lost}; singular values "
                f"{mean_of(own, 'tail'):.2g}, by the least share of an own key {mean_of(own, 'sharp'):.2g}."
            )
    return text


def mean_of(rows: list[Row], name: str) -> float:
    return mean(row[name] for row in rows)


def describe_sharp(anchored: list[Row], every: list[Row]) -> str:
    right = (f"{name} {mean_of(chosen(every, map=name), 'right_answers'):.0%}" for name in MAPS)
    first = anchored[0]
    return (
        f"Sharp logits, r = 32, m = {first['m']}: {mean_of(anchored, 'lost_solved'):.2f} of anchored's values is lost "
        f"(k before the values: at least {mean_of(anchored, 'tail'):.2f}; any state: {first['every_state']:.2f}) and "
        f"the nearest value is right for {mean_of(anchored, 'right_squares'):.0%}; trained for the answers: "
        f"{', '.join(right)} (no state tells more than {first['decodable']:,} apart)."
    )
