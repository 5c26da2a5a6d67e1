"""The tables of the report."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean

from research.recording import Row

from .budgets import TOLERANCE
from .document import Block, Heading, Table
from .methods import METHODS
from .statistics import Result, best_of, difference, same_passages
from .tasks import Task

OURS = "ntk"
LORA = ("lora-attention", "lora-mlp", "lora-all", "lora-qv", "dora", "dora-mlp", "rslora-all", "pissa-mlp", "pissa-all")
PREFIXES = ("prefix", "prefix-text", "prefix-memory", "prefix-1", "prefix-10", "prefix-100")
MIB = 2**20

Results = dict[str, dict[str, Result]]


def in_order(own: Iterable[Result]) -> list[Result]:
    """As the registry has them."""
    places = {name: i for i, name in enumerate(METHODS)}
    return sorted((result for result in own if result.method in places), key=lambda result: places[result.method])


def label(method: str) -> str:
    return METHODS[method].label


def value(task: Task, x: float | None) -> str:
    if x is None:
        return ""
    return f"{100 * x:.1f} %" if task.higher_is_better else f"{x:.4f}"


def spread(result: Result) -> str:
    """Mean ± deviation."""
    if result.mean is None:
        return ""
    if result.deviation is None:
        return value(result.task, result.mean)
    deviation = f"{100 * result.deviation:.1f}" if result.task.higher_is_better else f"{result.deviation:.4f}"
    return f"{value(result.task, result.mean)} ± {deviation}"


def problem(result: Result) -> str:
    """Why there is no mean."""
    if result.diverged:
        return f"diverges with {len(result.diverged)} of {len(result.diverged) + len(result.finals)} seeds"
    return next((row["error"] for row in result.selected if "error" in row), "not yet")


def percent(x: float | None) -> str:
    return "" if x is None else f"{100 * x:+.1f} %"


def summary(results: Results) -> Table:
    head = ["task", "metric", "seeds", "ours", "LoRA", "prefix", "as published", "full", "over LoRA", "over prefix"]
    body = []
    for name, own in results.items():
        ours = own.get(OURS)
        rivals = [best_of(own, LORA), best_of(own, PREFIXES), own.get("ntk-published"), own.get("full")]
        found = [mean_so_far(result) for result in (ours, *rivals)]
        if not any(found):
            continue
        task = next(iter(own.values())).task
        gains = [difference(ours, rival) if ours and rival else None for rival in rivals[:2]]
        arrow = "↑" if task.higher_is_better else "↓"
        body.append(
            [
                name,
                f"{task.metric} {arrow}",
                str(len(ours.finals)) if ours else "",
                *(text or "not yet" for text in found),
                *(percent(gain.relative) if gain else "" for gain in gains),
            ]
        )
    return Table(head, body)


def mean_so_far(result: Result | None) -> str:
    """With the number of seeds where some are missing; empty without any."""
    if result is None or result.mean is None:
        return ""
    text, seeds = value(result.task, result.mean), len(result.finals)
    return text if result.complete else f"{text} ({seeds} seed{'s' if seeds > 1 else ''})"


def verdict(results: Results) -> str:
    """What the rows say about ours against others, by task group and by task, where all seeds of all have run."""
    groups: dict[str, list[float]] = {}
    above = {"every prefix method that has run": [0, 0, 0], "the published start": [0, 0, 0]}
    unfinished = []
    partly: dict[str, list[str]] = {what: [] for what in above}
    for name, own in results.items():
        ours = own.get(OURS)
        if ours is None or ours.mean is None or not ours.complete:
            unfinished.append(name)
            continue
        if lora := finished_best(own, LORA):
            gain = difference(ours, lora)
            assert gain is not None
            groups.setdefault(ours.task.group, []).append(gain.relative)
        else:
            unfinished.append(name)
        for what, names in zip(above, (PREFIXES, ("ntk-published",)), strict=True):
            if (rival := finished_best(own, names)) and (gain := difference(ours, rival)):
                above[what][0] += gain.mean > 0
                above[what][1] += 1
                above[what][2] += bool(rival.at_end)
            elif any(own[method].finals for method in names if method in own):
                partly[what].append(name)
    sentences = (
        [f"Not counted, since some seeds are missing or diverge: {', '.join(unfinished)}."] if unfinished else []
    )
    for what, (won, of, at_end) in above.items():
        untuned = f"; on {at_end} of these the best rate of the other is at an end of those tried" if at_end else ""
        left_out = f" ({', '.join(partly[what])} not counted, where seeds are missing)" if partly[what] else ""
        sentences += [f"It is above {what} on {won} of {of} tasks{left_out}{untuned}."] if of else []
    if not groups:
        return " ".join(["Ours and the LoRAs have not all run on any task yet.", *sentences])
    level = [group for group, gains in groups.items() if sum(gains) >= 0]
    worst = min(gain for gains in groups.values() for gain in gains)
    first = (
        f"Ours is at least level with the best LoRA in {len(level)} of {len(groups)} task groups "
        f"({', '.join(level) or 'none'}), by the mean of the group's tasks; on its worst task it is at "
        f"{percent(worst)} to LoRA."
    )
    return " ".join([first, *sentences])


def finished_best(own: dict[str, Result], names: Iterable[str]) -> Result | None:
    """The best of those that have begun, if all of them have run to the end."""
    begun = [name for name in names if name in own and (own[name].selected or own[name].finals)]
    return best_of(own, begun) if all(own[name].complete for name in begun) else None


def describe(task: Task) -> str:
    shots = getattr(task, "shots", None)
    return (
        f"{task.model} on {task.data}{f', {shots} examples of each class' if shots else ''}; {task.steps} steps of "
        f"{task.batch_size}; test metric: {task.metric}, {'higher' if task.higher_is_better else 'lower'} is better."
    )


def task(own: dict[str, Result]) -> Table:
    head = [
        "method",
        "trainable",
        "test",
        "seeds",
        "rate",
        "forgetting",
        "step, ms",
        "memory, MiB",
        "file, MiB",
        "run, s",
    ]
    size = own[OURS].any_row.get("trainable_parameters", 0) if OURS in own else 0
    body = []
    for result in in_order(own.values()):
        if METHODS[result.method].ablation or (result.mean is None and not result.selected):
            continue
        row = result.any_row
        trained = row.get("trainable_parameters")
        equal = " =" if size and trained and abs(trained / size - 1) <= TOLERANCE and result.method != OURS else ""
        memory = result.timed.get("peak_memory_bytes") if result.timed else result.average("peak_memory_bytes")
        forgetting = result.average("forgetting")
        elsewhere = "" if OURS not in own or same_passages(own[OURS], result) else " ≠"
        seconds = result.average("training_seconds")
        body.append(
            [
                label(result.method),
                "" if trained is None else f"{trained:,}{equal}",
                spread(result) or problem(result),
                f"{len(result.finals)}{f', {len(result.tested)} rates' if len(result.tested) > 1 else ''}",
                f"{result.rate:g} {result.at_end}".strip() if result.rate else "",
                "" if forgetting is None else f"{forgetting:+.3f}{elsewhere}",
                f"{result.timed['step_milliseconds']:.1f}" if result.timed else "",
                f"{memory / MIB:,.0f}" if memory else "",
                f"{row['adapter_bytes'] / MIB:,.2f}" if "adapter_bytes" in row else "",
                "" if seconds is None else f"{seconds:.0f}",
            ]
        )
    return Table(head, body, label(OURS))


def beside(results: Results) -> list[Block]:
    """Parts of a test, and tests of other data, of the final runs that saw them."""
    blocks: list[Block] = []
    for name, own in results.items():
        found = {result.method: mean_beside(result) for result in in_order(own.values())}
        columns = sorted({column for means in found.values() for column in means})
        body = [
            [label(method), *(f"{100 * means[column]:.1f}" if column in means else "" for column in columns)]
            for method, means in found.items()
            if means
        ]
        if body:
            blocks += [Heading(f"Beside {name}, in %", 3), Table(["method", *columns], body, label(OURS))]
    return blocks


def mean_beside(result: Result) -> dict[str, float]:
    rows = [row["beside"] for row in result.finals.values() if "beside" in row]
    return {column: fmean(row[column] for row in rows) for column in (rows[0] if rows else ())}


def paired(results: Results) -> list[Block]:
    blocks: list[Block] = []
    for name, own in results.items():
        body = []
        for result in in_order(own.values()):
            gain = difference(own[OURS], result) if OURS in own and result.method != OURS else None
            if gain:
                unit = 100 if result.task.higher_is_better else 1
                digits = 1 if unit == 100 else 4
                widths = [f"± {unit * w:.{digits}f}" if w is not None else "" for w in (gain.by_seeds, gain.by_items)]
                body.append(
                    [
                        label(result.method),
                        f"{unit * gain.mean:+.{digits}f}",
                        *widths,
                        percent(gain.relative),
                        str(gain.seeds),
                    ]
                )
        if body:
            unit_name = "points" if own[OURS].task.higher_is_better else "nats"
            blocks.append(Heading(f"Ours on {name} minus", 3))
            blocks.append(Table(["method", unit_name, "by seeds", "by items", "relative", "seeds"], body))
    return blocks


def rates(results: Results) -> list[Block]:
    blocks: list[Block] = []
    for name, own in results.items():
        selected = [result for result in in_order(own.values()) if result.validation]
        tried = sorted({rate for result in selected for rate in result.validation})
        body = []
        for result in selected:
            cells = []
            for rate in tried:
                score = result.validation.get(rate)
                text = validation(score) if score else "fails" if rate in result.validation else ""
                cells.append(f"**{text}**" if rate == result.rate else text)
            body.append([label(result.method), *cells])
        if body:
            what = "accuracy" if own[selected[0].method].task.has_head else "loss"
            blocks += [Heading(f"Rates on {name}", 3), Table([f"validation {what}", *(f"{r:g}" for r in tried)], body)]
    return blocks


def validation(score: dict[str, float]) -> str:
    return f"{100 * score['share']:.1f} %" if "share" in score else f"{score['loss']:.4f}"


def ablations(results: Results) -> list[Block]:
    blocks: list[Block] = []
    for name, own in results.items():
        body = []
        for result in in_order(own.values()):
            question = METHODS[result.method].ablation
            if (question or result.method == OURS) and result.mean is not None:
                gain = difference(result, own[OURS]) if question and OURS in own else None
                trained = result.any_row["trainable_parameters"]
                body.append(
                    [
                        label(result.method),
                        question,
                        f"{trained:,}",
                        spread(result),
                        percent(gain.relative) if gain else "",
                    ]
                )
        if len(body) > 1:
            head = ["variant", "question", "trainable", "test", "over the default"]
            blocks += [Heading(f"Variants on {name}", 3), Table(head, body, label(OURS))]
    return blocks


def provenance(rows: list[Row]) -> list[Block]:
    """How many rows were made where, with what."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["commit"], row["hardware"], in_lines(row["versions"])), []).append(row)
    body = []
    for made, own in groups.items():
        jobs = sorted({row.get("jobs", 1) for row in own})
        together = str(jobs[0]) if len(jobs) == 1 else f"{jobs[0]} to {jobs[-1]}"
        body.append([*made, together, str(len(own)), f"{sum(row.get('seconds', 0) for row in own) / 60:,.0f}"])
    return [Table(["commit", "hardware", "versions", "side by side", "cells", "minutes of cells"], body)]


def in_lines(versions: dict[str, str]) -> str:
    """Three packages a line."""
    found = [f"{name} {version}" for name, version in versions.items()]
    return ",\n".join(", ".join(found[i : i + 3]) for i in range(0, len(found), 3))
