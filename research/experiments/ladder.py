"""The first table: from the paper's method to ours, beside the best LoRA of equal size and full fine-tuning."""

from __future__ import annotations

from collections.abc import Iterable
from string import ascii_lowercase

from .document import Block, Heading, Table, Text
from .statistics import Difference, Result, best_of, difference, same_passages
from .tables import LORA, OURS, Results, label, problem, spread

TITLE = "The paper's ladder"
STEPS = {"as published": "ntk-published", "attention alone, calibrated": "attention-alone", "the default": OURS}
BEST = "the best LoRA"
ABOVE = {"full fine-tuning": "full"}
ABOUT = (
    "In a cell: the test metric, mean and standard deviation over the seeds; the learning rate that validation data "
    "chose, with an arrow where it is at an end of those tried, and the forgetting, in nats on unrelated data (≠: on "
    "other passages than the default's); letters of the commits that the test runs are of, and of the runs that chose "
    "the rate where these are of others. The best LoRA is the best of its kind and size on the test data, which "
    "favours it. Bold is the better one of the default and the best LoRA, only where the seeds tell the two apart: the "
    "95 % interval of their paired difference leaves out zero. The last row has it, turned so that plus is better. The "
    "default of encoders is attention alone, too, with less of it held by the prefix at the start."
)


def ladder(results: Results) -> list[Block]:
    """A table of the tasks that write text and one of classifiers, none without rows."""
    commits: dict[str, str] = {}
    blocks: list[Block] = []
    kinds = {"Models that write text": False, "Classifiers": True}
    for title, has_head in kinds.items():
        own = {name: found for name, found in results.items() if any_of(found).task.has_head == has_head}
        own = {name: found for name, found in own.items() if any(m in found for m in (*STEPS.values(), "full"))}
        if own:
            blocks += [Heading(title, 3), of_tasks(own, commits), Text(without_rows(own))]
    if not blocks:
        return []
    letters = ", ".join(f"{letter} is `{commit}`" for commit, letter in commits.items())
    several = " Numbers of different letters are of different code." if len(commits) > 1 else ""
    return [Heading(TITLE), Text(ABOUT), *blocks, Text(f"Commits: {letters}.{several}")]


def any_of(own: dict[str, Result]) -> Result:
    return next(iter(own.values()))


def of_tasks(results: Results, commits: dict[str, str]) -> Table:
    body = {name: [name] for name in (*STEPS, BEST, *ABOVE, f"the default less {BEST}")}
    for own in results.values():
        ours, lora = own.get(OURS), best_of(own, LORA)
        gain = difference(ours, lora) if ours and lora else None
        better = None if gain is None or not told_apart(gain) else ours if gain.mean > 0 else lora
        for name, method in {**STEPS, **ABOVE}.items():
            body[name].append(cell(own.get(method), ours, better, commits))
        named = cell(lora, ours, better, commits)
        body[BEST].append(f"{label(lora.method)}\n{named}" if lora else named)
        body[f"the default less {BEST}"].append(shown(gain, ours) if gain and ours else "not known")
    head = [f"{any_of(own).task.name}\n{metric(any_of(own))}" for own in results.values()]
    return Table(["", *head], list(body.values()))


def metric(result: Result) -> str:
    return f"{result.task.metric} {'↑' if result.task.higher_is_better else '↓'}"


def told_apart(gain: Difference) -> bool:
    return gain.by_seeds is not None and abs(gain.mean) > gain.by_seeds


def shown(gain: Difference, ours: Result) -> str:
    unit, digits, name = (100, 1, "points") if ours.task.higher_is_better else (1, 4, "nats")
    width = "" if gain.by_seeds is None else f" ± {unit * gain.by_seeds:.{digits}f}"
    return f"{unit * gain.mean:+.{digits}f}{width}\n{name}"


def cell(result: Result | None, ours: Result | None, better: Result | None, commits: dict[str, str]) -> str:
    if result is None or not (result.finals or result.diverged):
        return "not run" if result is None or not result.selected else "not tested yet"
    if result.mean is None:
        return problem(result)
    seeds = "" if result.complete else f"\n{len(result.finals)} of {len(result.task.final_seeds)} seeds"
    score = f"**{spread(result)}**" if result is better else spread(result)
    forgetting = result.average("forgetting")
    elsewhere = " ≠" if ours and not same_passages(ours, result) else ""
    second = f"{result.rate:g}{result.at_end}" + ("" if forgetting is None else f", {forgetting:+.2f}{elsewhere}")
    tested = letters_of((row["commit"] for row in result.finals.values()), commits)
    chosen = letters_of((row["commit"] for row in result.selected), commits)
    of = tested if chosen in ("", tested) else f"{tested}, rate {chosen}"
    return f"{score}{seeds}\n{second}\n{of}"


def letters_of(found: Iterable[str], commits: dict[str, str]) -> str:
    """One for each commit, in the order in which the table meets them."""
    wanted = list(dict.fromkeys(found))
    for commit in wanted:
        n = len(commits)
        commits.setdefault(commit, ascii_lowercase[n % 26] * (1 + n // 26))
    return " ".join(letter for commit, letter in commits.items() if commit in wanted)


def without_rows(results: Results) -> str:
    """Which LoRAs the best is not of, so that nothing is missing in silence."""
    lacks = {m: [name for name, own in results.items() if m not in own or own[m].mean is None] for m in LORA}
    everywhere = [label(m) for m, names in lacks.items() if len(names) == len(results)]
    parts = [f"{'; '.join(everywhere)} on any of these tasks"] if everywhere else []
    parts += [f"{label(m)} on {', '.join(names)}" for m, names in lacks.items() if 0 < len(names) < len(results)]
    if not parts:
        return "Every LoRA of equal size has run on every one of these tasks."
    return f"Of equal size too, but without rows: {'; '.join(parts)}."
