"""Choosing a default: cells that see training and validation data alone, and tables that compare methods by them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from research.recording import Row

from .document import Block, Heading, Table, Text
from .methods import METHODS

STAGE = "develop"
ROWS = "develop.jsonl"
SIZES = {"": "the size of a full Z", "-quarter": "a quarter of the size", "-4x": "four times the size"}
ABOUT = (
    "Made by `python -m research develop` from `develop.jsonl`, on validation data alone: a method's number on a task "
    "is that of its best rate there, mean over the seeds."
)
SUMMARY = (
    "Rank: mean over the tasks that all methods of the table have, by the loss. Over LoRA: the loss relative to that "
    "of the best LoRA of the table on each task, geometric mean, and the worst; below zero is better. Forgetting: nats "
    "on unrelated text, mean and most."
)
RATES = (
    "How much a rate loses: the loss there over the method's best on the task, mean and worst over the tasks, and on "
    "how many of them the loss was not finite."
)


@dataclass
class Tried:
    """What a method has on one task, by rate."""

    loss: dict[float, float] = field(default_factory=dict)
    right: dict[float, float] = field(default_factory=dict)  # share of exact completions, or of right labels
    forgetting: dict[float, float] = field(default_factory=dict)
    broken: set[float] = field(default_factory=set)  # rates at which a loss was not finite

    @property
    def rate(self) -> float:
        return min(self.loss, key=lambda rate: self.loss[rate])

    @property
    def best(self) -> float:
        return self.loss[self.rate]


Methods = dict[str, dict[str, Tried]]  # by method and task


def collect(rows: Iterable[Row]) -> Methods:
    """Means over the seeds, of the rates that most seeds have tried. Of equal cells the last one counts."""
    cells: dict[tuple[str, str], dict[float, dict[int, Row]]] = {}
    for row in rows:
        by_rate = cells.setdefault((row["method"], row["task"]), {})
        by_rate.setdefault(row["learning_rate"], {})[row["seed"]] = row
    found: Methods = {}
    for (method, task), by_rate in cells.items():
        tried = Tried()
        most = max(map(len, by_rate.values()))
        for rate, by_seed in sorted(by_rate.items()):
            own = list(by_seed.values())
            if any("error" in row for row in own):
                tried.broken.add(rate)
            elif len(own) == most:
                scores = [row["validation"] for row in own]
                tried.loss[rate] = fmean(score["loss"] for score in scores)
                if right := [score.get("exact", score.get("share")) for score in scores if len(score) > 1]:
                    tried.right[rate] = fmean(right)
                if own[0].get("forgetting") is not None:
                    tried.forgetting[rate] = fmean(row["forgetting"] for row in own)
        if tried.loss:
            found.setdefault(method, {})[task] = tried
    return found


def size_of(method: str) -> str:
    """Its suffix of SIZES."""
    return next((suffix for suffix in SIZES if suffix and method.endswith(suffix)), "")


def best_lora(methods: Methods, task: str) -> tuple[float, str] | None:
    """The smallest loss on a task, and whose it is."""
    losses = [(own[task].best, m) for m, own in methods.items() if METHODS[m].family == "lora" and task in own]
    return min(losses) if losses else None


# --- the report ---


def tables(rows: Iterable[Row]) -> list[Block]:
    """None without rows. Methods of one size are compared with each other."""
    found = collect(row for row in rows if row["method"] in METHODS)
    blocks: list[Block] = []
    for suffix, size in SIZES.items():
        methods = {m: found[m] for m in METHODS if m in found and size_of(m) == suffix}
        if methods:
            blocks += [Heading(f"Development: {size}", 3), *of_one_size(methods)]
    return [Heading("Development"), Text(ABOUT), *blocks] if blocks else []


def of_one_size(methods: Methods) -> list[Block]:
    tasks = list(dict.fromkeys(task for own in methods.values() for task in own))
    head = ["method", *tasks]
    losses = [
        [m, *(f"{own[t].best:.4f}{at_end(own[t])}" if t in own else "" for t in tasks)] for m, own in methods.items()
    ]
    rivals = [best_lora(methods, t) for t in tasks]
    losses.append(["best LoRA", *(lora[1] if lora else "" for lora in rivals)])
    right = [[m, *(share(own[t]) if t in own else "" for t in tasks)] for m, own in methods.items()]
    return [
        Text(SUMMARY),
        Table(["method", "rank", "tasks", "over LoRA", "worst", "on", "forgetting", "most"], summary(methods, tasks)),
        Text("Loss at the best rate; ↑ or ↓ where that is the largest or the smallest of those tried."),
        Table(head, losses),
        Text("Share of validation items whose whole completion is right by greedy decoding, or whose label is, in %."),
        Table(head, right),
        Text(RATES),
        sensitivity(methods),
    ]


def at_end(tried: Tried) -> str:
    rates = {*tried.loss, *tried.broken}
    return {max(rates): " ↑", min(rates): " ↓"}.get(tried.rate, "") if len(rates) > 1 else ""


def share(tried: Tried) -> str:
    return f"{100 * tried.right[tried.rate]:.1f}" if tried.rate in tried.right else ""


def summary(methods: Methods, tasks: Sequence[str]) -> list[list[str]]:
    shared = [task for task in tasks if all(task in own for own in methods.values())]
    body = []
    for method, own in methods.items():
        places = [1 + sum(other[t].best < own[t].best for other in methods.values()) for t in shared]
        gaps = {t: math.log(own[t].best / lora[0]) for t in own if (lora := best_lora(methods, t)) and lora[0] > 0}
        forgotten = [tried.forgetting[tried.rate] for tried in own.values() if tried.rate in tried.forgetting]
        worst = max(gaps, key=lambda t: gaps[t], default="")
        body.append([method, f"{fmean(places):.2f}" if places else "", str(len(own))])
        body[-1] += [percent(fmean(gaps.values())), percent(gaps[worst]), worst] if gaps else ["", "", ""]
        body[-1] += [f"{fmean(forgotten):+.3f}", f"{max(forgotten):+.3f}"] if forgotten else ["", ""]
    return sorted(body, key=lambda line: float(line[1] or "inf"))


def percent(log_ratio: float) -> str:
    return f"{100 * math.expm1(log_ratio):+.1f} %"


def sensitivity(methods: Methods) -> Table:
    rates = sorted({rate for own in methods.values() for t in own.values() for rate in {*t.loss, *t.broken}})
    body = []
    for method, own in methods.items():
        line = [method]
        for rate in rates:
            lost = [math.log(tried.loss[rate] / tried.best) for tried in own.values() if rate in tried.loss]
            broken = sum(rate in tried.broken for tried in own.values())
            text = f"{percent(fmean(lost))}, {percent(max(lost))}" if lost else ""
            line.append(f"{text}{f' ({broken} broken)' if broken else ''}".strip())
        body.append(line)
    return Table(["method", *(f"{rate:g}" for rate in rates)], body)
