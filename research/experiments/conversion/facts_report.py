"""Tables and a figure of facts: what is answered of what could be, by method and bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib import pyplot as plt

from research import pictures
from research.recording import Row, table

COLOURS = (
    "#1f4e79",
    "#c0392b",
    "#2e8b57",
    "#b8860b",
    "#7d3c98",
    "#5d9bd1",
    "#333333",
    "#888888",
    "#d08a7a",
    "#8a5a2b",
    "#000000",
)
COLUMNS = ("method", "MiB held", "recall", "all right", "log-likelihood", "KL gap closed, first 64",
           "KL gap closed, all", "KL, first 64", "KL, all", "made in s", "decode, ms/token", "rows")  # fmt: skip
GROUP = ("document", "seed", "model", "steps", "rows", "length", "source", "held_out", "limit", "hardware", "sha256")


def facts(rows: list[Row], out: Path, written: list[Path]) -> list[str]:
    failed = [row for row in rows if "error" in row]
    own = [
        scored
        for group in by_group(row for row in rows if "error" not in row).values()
        for scored in with_scores(group)
    ]
    if not own:
        return ["No method has been measured beside the full cache and the model without context.\n"]
    text = [
        "Recall: of the questions that the full cache answers and the model without context does not, the share that "
        "is answered, greedily and word for word. KL gap: that of the model without context, in nats per token to the "
        "full cache. Log-likelihood: of the answers of these questions, in nats per answer.\n"
    ]
    text.append(table(COLUMNS, list(lines(own))))
    for name in dict.fromkeys(row["document"] for row in own):
        chosen = [row for row in own if row["document"] == name]
        first = chosen[0]
        kinds = f"{len(first['right'])} questions, {mean(row['asked'] for row in chosen):.0f} of them for recall"
        text.append(f"**{name}**: {first['tokens']:,} tokens (sha256 {first['sha256']}), {kinds}.\n")
        text.append(table(COLUMNS, list(lines(chosen))))
    text += [
        f"Not measured: {r['document']}, {r['method']}, {r['mib']:g} MiB, seed {r['seed']}: {r['error']}\n"
        for r in failed
    ]
    text.append(save(figure(own), out / "facts.png", written))
    return text


def by_group(rows: Iterable[Row]) -> dict[tuple, list[Row]]:
    """Rows that may be compared: of one document, seed and setting."""
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(str(row.get(key)) for key in GROUP)].append(row)
    return groups


def with_scores(group: list[Row]) -> list[Row]:
    """The rows with `recall`, `asked`, `answered` and shares of the KL gaps; none without both ends of the scale."""
    ends = {row["method"]: row for row in group if row["method"] in ("full cache", "no context")}
    if len(ends) < 2:
        return []
    full, none = ends["full cache"], ends["no context"]
    open_ = [i for i, (a, b) in enumerate(zip(full["right"], none["right"], strict=True)) if a and not b]

    def scored(row: Row) -> Row:
        right, likelihood = row["right"], row["likelihood"]
        return row | {
            "asked": len(open_),
            "recall": mean(right[i] for i in open_) if open_ else None,
            "answered": mean(right),
            "of_open": mean(likelihood[i] for i in open_) if open_ else None,
            "closed_first": closed(row["kl_first"], none["kl_first"]),
            "closed": closed(row["kl"], none["kl"]),
        }

    return [scored(row) for row in group]


def closed(kl: float | None, without: float | None) -> float | None:
    return None if kl is None or not without else 1 - kl / without


def lines(rows: list[Row]) -> Iterable[list[str]]:
    """One for each method and number of bytes, means over documents and seeds."""
    for method, mib in dict.fromkeys((row["method"], row["mib"]) for row in rows):
        own = [row for row in rows if (row["method"], row["mib"]) == (method, mib)]
        yield [
            method, show(own, "bytes", lambda x: f"{x / 2**20:.2f}"), show(own, "recall", "{:.0%}".format),
            show(own, "answered", "{:.0%}".format), show(own, "of_open", "{:.2f}".format),
            show(own, "closed_first", "{:.0%}".format), show(own, "closed", "{:.0%}".format),
            show(own, "kl_first", "{:.3f}".format), show(own, "kl", "{:.3f}".format),
            show(own, "made_in_seconds", "{:.1f}".format), show(own, "decode_ms", "{:.1f}".format), f"{len(own)}",
        ]  # fmt: skip


def show(rows: list[Row], name: str, form: Callable[[float], str]) -> str:
    """The mean of what is known; how many rows are not in it."""
    known = [row[name] for row in rows if row[name] is not None]
    unknown = f" ({len(rows) - len(known)} without)" if 0 < len(known) < len(rows) else ""
    return f"{form(mean(known))}{unknown}" if known else "-"


def figure(rows: list[Row]) -> Any:
    """Recall and the KL gap that is closed against the bytes, means over documents and seeds."""
    drawn, panels = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    sized = [row for row in rows if row["mib"]]
    for axes, (key, words) in zip(
        panels,
        (("recall", "recall"), ("closed_first", "KL gap closed, first 64 tokens"), ("closed", "KL gap closed, all")),
        strict=True,
    ):
        for method, colour in zip(dict.fromkeys(row["method"] for row in sized), COLOURS, strict=False):
            points = defaultdict(list)
            for row in sized:
                if row["method"] == method and row[key] is not None:
                    points[row["mib"]].append(row[key])
            sizes = sorted(points)
            axes.plot(sizes, [mean(points[x]) for x in sizes], marker="o", color=colour, label=method,
                      linestyle="-" if method.startswith("state") else "--")  # fmt: skip
        axes.set(xscale="log", xlabel="MiB", ylabel=words, ylim=(-0.1, 1.05))
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return drawn


def save(drawn: Any, path: Path, written: list[Path]) -> str:
    pictures.save(drawn, path)
    written.append(path)
    return f"![{path.stem}]({path.name})\n"
