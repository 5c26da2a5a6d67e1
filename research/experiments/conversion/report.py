"""README.md and the figures of results/conversion, from the rows alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter

from research import pictures
from research.recording import Row, read, table

from .facts_report import facts

COLOURS = ("#1f4e79", "#c0392b", "#2e8b57", "#b8860b", "#7d3c98", "#5d9bd1", "#333333")
HEAD = """# Prefixes that exist become states

Made by `python -m research conversion report` from the JSON lines beside this file, which
`python -m research conversion accuracy|documents|facts|prefix-tuning` writes. What is measured, and how, stands in
`research/experiments/conversion`; the derivation of the bound and what the tables mean in
[docs/conversion.md](../../docs/conversion.md).
"""


def write_report(out: Path) -> list[Path]:
    """README.md and a figure for every kind of rows that is there."""
    text, written = [HEAD], [out / "README.md"]
    kinds = {"accuracy": accuracy, "documents": documents, "facts": facts, "prefix_tuning": prefix_tuning}
    for name, make in kinds.items():
        rows = read(out / f"{name}.jsonl")
        if rows:
            text.append(f"## {name.replace('_', '-')}\n\n{provenance(rows)}\n")
            text += make(rows, out, written)
    if len(text) == 1:
        raise FileNotFoundError(f"{out} has no rows: run an experiment first")
    (out / "README.md").write_text("\n".join(text))
    return written


def provenance(rows: list[Row]) -> str:
    hardware = ", ".join(dict.fromkeys(row["hardware"] for row in rows))
    versions = {f"{name} {version}": None for row in rows for name, version in row["versions"].items()}
    return f"{hardware}; {', '.join(versions)}; seed {', '.join(dict.fromkeys(str(row['seed']) for row in rows))}."


def save(figure: Any, path: Path, written: list[Path]) -> str:
    pictures.save(figure, path)
    written.append(path)
    return f"![{path.stem}]({path.name})\n"


# --- accuracy ---


def accuracy(rows: list[Row], out: Path, written: list[Path]) -> list[str]:
    taylor = [row for row in rows if row["bound"] is not None]
    inside = sum(row["max_error"] <= row["bound"] for row in taylor)
    text = [f"{inside:,} of {len(taylor):,} errors of Taylor states lie inside their bound.\n"]
    dims, bounds = (sorted({row[key] for row in rows}) for key in ("d", "entry_bound"))
    names = list(dict.fromkeys(row["map"] for row in rows))
    colours = dict(zip(names, COLOURS, strict=False))
    for error in ("max_error", "frobenius_error"):
        size = 3.1 * len(dims) + 1, 2.5 * len(bounds) + 0.6
        figure, panels = plt.subplots(
            len(bounds), len(dims), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
        )
        for i, bound in enumerate(bounds):
            for j, d in enumerate(dims):
                own = [r for r in rows if (r["d"], r["entry_bound"], r["L"]) == (d, bound, 128)]
                panel(panels[i][j], own, error, colours)
                panels[i][j].set_title(f"d = {d}, entries up to {bound:g}", fontsize=10)
        for axes in panels[-1]:
            axes.set_xlabel("m")
        for line in panels:
            line[0].set_ylabel("largest error" if error == "max_error" else "Frobenius norm, relative")
        handles = [plt.Line2D([], [], color=colours[name], label=name) for name in names]
        handles.append(plt.Line2D([], [], color="#333333", linestyle=":", label="a-priori bound"))
        figure.legend(handles=handles, loc="outside lower center", ncols=8, frameon=False)
        text.append(save(figure, out / f"accuracy-{error.split('_')[0]}.png", written))
    largest = max(row["m"] for row in rows)
    body = []
    for d, bound in sorted({(row["d"], row["entry_bound"]) for row in rows}):
        line = [f"{d}", f"{bound:g}"]
        for name in names:
            wanted = (d, bound, 128, name, largest)
            found = [r for r in rows if tuple(r[k] for k in ("d", "entry_bound", "L", "map", "m")) == wanted]
            limit = f" ({found[0]['bound']:.1e})" if found and found[0]["bound"] else ""
            line.append(f"{found[0]['max_error']:.1e}{limit}" if found else "")
        body.append(line)
    text.append(f"Largest error at m = {largest:,}, L = 128; in brackets the bound.\n")
    text.append(table(["d", "entries up to", *names], body))
    lengths = sorted({row["L"] for row in rows})
    if len(lengths) > 1:
        body = [
            [f"{L:,}", *(largest_error(rows, L, name, largest) for name in names)]
            for L in lengths
        ]  # fmt: skip
        text.append("Largest error at d = 64, entries up to 0.5, by L.\n")
        text.append(table(["L", *names], body))
    return text


def largest_error(rows: list[Row], L: int, name: str, m: int) -> str:
    found = [r for r in rows if (r["d"], r["entry_bound"], r["L"], r["map"], r["m"]) == (64, 0.5, L, name, m)]
    return f"{found[0]['max_error']:.1e}" if found else ""


def panel(axes: Any, rows: list[Row], error: str, colours: dict[str, str]) -> None:
    for name in dict.fromkeys(row["map"] for row in rows):
        own = sorted((row for row in rows if row["map"] == name), key=lambda row: row["m"])
        scale = [row["frobenius_norm"] if error == "frobenius_error" else 1.0 for row in own]
        axes.plot([r["m"] for r in own], [r[error] / s for r, s in zip(own, scale, strict=True)], color=colours[name])
        bound = "bound" if error == "max_error" else "frobenius_bound"
        if own[0]["bound"] is not None:
            limits = [row[bound] / s for row, s in zip(own, scale, strict=True)]
            axes.plot([r["m"] for r in own], limits, color=colours[name], linestyle=":", linewidth=1)
    axes.set(xscale="log", yscale="log")
    axes.grid(alpha=0.3)


# --- documents ---


def documents(rows: list[Row], out: Path, written: list[Path]) -> list[str]:
    text = []
    rows = sorted(rows, key=lambda row: row["source"] != "samples")  # the default first
    for key in dict.fromkeys((setting(row), row["text"]) for row in rows):
        own = [row for row in rows if (setting(row), row["text"]) == key]
        failed = [f"{row['method']}: {row['error']}" for row in own if "error" in row]
        own = [row for row in own if "error" not in row]
        first = own[0]
        text.append(
            f"**{first['text']}**: {first['tokens']:,} tokens (sha256 {first['sha256']}), {first['held_out']} "
            f"held out; to learn from: {key[0]}, written in {first['study_seconds']} s; {first['steps']} steps of "
            f"distillation; r = d takes the bytes of {first['budget_tokens']} tokens.\n"
        )
        text.append(table(DOCUMENT_COLUMNS, [document_line(row) for row in own]))
        text += [f"Not measured: {line}\n" for line in failed]
    text.append(save(divergences([row for row in rows if "error" not in row]), out / "documents.png", written))
    return text


KINDS = {"samples": "sampled", "chunks": "pieces of the text", "both": "half of them pieces of the text"}


def setting(row: Row) -> str:
    """What calibration learned from."""
    return f"{row['rows']} rows of {row['length']} tokens, {KINDS[row['source']]}"


def divergences(rows: list[Row]) -> Any:
    """KL by method, a panel for each text and setting: of the continuation (full), of its first 64 tokens (hollow)."""
    rows = [row for row in rows if row["kl"] != 0]  # that of the full cache
    methods = list(dict.fromkeys(row["method"] for row in rows))[::-1]
    texts, settings = (list(dict.fromkeys(map(key, rows))) for key in (lambda row: row["text"], setting))
    size = 3.4 * len(texts) + 2.4, (0.28 * len(methods) + 1) * len(settings) + 0.4
    figure, panels = plt.subplots(
        len(settings), len(texts), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for line, given in zip(panels, settings, strict=True):
        for axes, name in zip(line, texts, strict=True):
            own = [row for row in rows if (row["text"], setting(row)) == (name, given)]
            if not own:
                axes.set_axis_off()
                continue
            for row in own:
                colour = COLOURS[1] if row["method"].startswith("state") else COLOURS[0]
                y = methods.index(row["method"])
                axes.plot(row["kl_first_64"], y, "o", markerfacecolor="none", color=colour)
                if row["kl"] is not None:
                    axes.plot(row["kl"], y, "o", color=colour)
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set(xscale="log", xlabel="KL, nats per token")
            axes.set_title(f"{name}\n{given.replace(', ', chr(10))}", fontsize=9)
            axes.set_yticks(range(len(methods)), methods)
            axes.tick_params(labelbottom=True)
            axes.grid(alpha=0.3)
    shown = {"marker": "o", "linestyle": "", "color": "#333333"}
    handles = [
        plt.Line2D([], [], **shown, label=f"{rows[0]['held_out']} tokens after the text"),
        plt.Line2D([], [], **shown, markerfacecolor="none", label="the first 64"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return figure


DOCUMENT_COLUMNS = ("method", "MiB held", "KL", "KL, first 64", "same next token", "perplexity", "needle, written",
                    "needle, of 8", "compare, of 2", "made in s", "decode, ms/token")  # fmt: skip


def document_line(row: Row) -> list[str]:
    kl = "inf" if row["kl"] is None else f"{row['kl']:.3f}"
    return [
        row["method"], f"{row['bytes'] / 2**20:.2f}", kl, f"{row['kl_first_64']:.3f}", f"{row['agreement']:.1%}",
        number(row["perplexity"]), f"{row['needle_exact']:.0%}", f"{row['needle_choice']:.0%}",
        f"{row['compare_choice']:.0%}", f"{row['made_in_seconds']:.1f}", f"{row['decode_ms']:.1f}",
    ]  # fmt: skip


def number(x: float) -> str:
    return f"{x:.2f}" if x < 1e4 else f"{x:.1e}"


# --- prefix tuning ---


def prefix_tuning(rows: list[Row], out: Path, written: list[Path]) -> list[str]:
    lengths = sorted({row["m"] for row in rows} - {0})
    ways = list(dict.fromkeys(row["method"] for row in rows))
    found = {(row["m"], row["method"]): row for row in rows}
    first = rows[0]

    def cell(m: int, way: str) -> str:
        row = found.get((0 if way == "base" else m, way))
        return f"{row['final_number']:.1%}, {row['loss']:.3f}" if row else ""

    text = [
        f"{first['task']}, {first['held_out']} held-out items: right final numbers and loss in nats per token. Prefix "
        f"tuning: {first['train_steps']} steps of {first['batch_size']} items; distillation {first['steps']} steps.\n",
        table(["way", *(f"m = {m:,}" for m in lengths)], [[way, *(cell(m, way) for m in lengths)] for way in ways]),
    ]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for way, colour in zip(ways, COLOURS * 2, strict=False):
        points = [(m, row["loss"]) for m in lengths if (row := found.get((0 if way == "base" else m, way)))]
        points = [(m, loss) for m, loss in points if math.isfinite(loss)]
        style = ":" if way == "base" else "-"
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", linestyle=style, label=way)
    axes.set(xscale="log", yscale="log", xlabel="m", ylabel="held-out loss, nats per token")
    axes.set_xticks(lengths, [f"{m:,}" for m in lengths])
    axes.legend(frameon=False, fontsize=8)
    text.append(save(figure, out / "prefix_tuning.png", written))
    return text
