"""One page of HTML that says what an adapter is and did: nothing of it lies anywhere else."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from .data import METRICS
from .reports import plot_loss, plot_shares, plot_token_shares
from .run_folder import RECORD, read_record

# What the shares are measured on where no text is given.
TEXT = "The capital of France is Paris. Water boils at 100 degrees, and 12 + 7 is 19."
STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2733; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #d8dee6; }
table { border-collapse: collapse; } td, th { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top; }
th { color: #5a6878; font-weight: 500; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
svg { max-width: 100%; height: auto; } .scroll { overflow-x: auto; }
.text { line-height: 2.1; } .text span { padding: .25rem 0; white-space: pre-wrap; border-radius: 2px; }
small { color: #5a6878; }
"""
MOST_SHADE = 0.75  # of the token that looks at the prefix most


NEEDED = (
    "before", "train_items", "validation_items", "test_items", "train_tokens", "steps", "seconds", "hardware",
    "train_loss", "validation_loss",
)  # fmt: skip


def read_run(folder: Path) -> dict[str, Any] | None:
    """The record of the run that made an adapter; None where there is none.

    Raises:
        ValueError: if it is no record, or one of a finished run that lacks what the page shows.
    """
    record = read_record(folder)
    if record is None or "after" not in record:
        return record
    missing = [name for name in NEEDED if name not in record] + ([] if "adapter" in record["settings"] else ["adapter"])
    if missing:
        raise ValueError(
            f"{folder / RECORD} lacks {', '.join(missing)}, which the page shows: expected the record of a run of this "
            "version of the library"
        )
    return record


def page(title: str, facts: Sequence[tuple[str, str]], record: dict[str, Any] | None, seen: Seen | None) -> str:
    """The page, out of what the adapter consists of, the record of its run and its attention to a text."""
    parts = [f"<h1>{escape(title)}</h1>", "<h2>What was adapted</h2>", rows_of(facts)]
    if record is not None and "after" in record:
        parts += ["<h2>Training</h2>", figures_of(record), drawn(lambda stream: plot_loss(record, stream))]
    if seen is not None:
        parts += seen.sections()
    if record is not None:
        parts += ["<h2>Settings</h2>", rows_of(settings_of(record))]
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n'


class Seen:
    """How much attention each token of a text gives to the prefix.

    Args:
        shares: [layers, H, L].
        tokens: their texts.
    """

    def __init__(self, shares: Tensor, tokens: Sequence[str]):
        self.shares, self.tokens = shares, tokens

    def sections(self) -> list[str]:
        by_token = self.shares.mean(dim=(0, 1))
        least, most = by_token.min().item(), by_token.max().item()
        shade = MOST_SHADE / max(most - least, 1e-12)
        spans = [
            f'<span style="background: rgba(31, 119, 180, {shade * (share - least):.3f})" '
            f'title="{share:.1%}">{escape(token)}</span>'
            for token, share in zip(self.tokens, by_token.tolist(), strict=True)
        ]
        mean = self.shares.mean(dim=-1)
        said = (
            f"The prefix takes {mean.mean():.1%} of the attention, from {mean.min():.1%} to {mean.max():.1%} by head."
        )
        return [
            "<h2>Share of the prefix by token</h2>",
            f'<p class="text">{"".join(spans)}</p>',
            f"<p><small>Mean over layers and heads, from {least:.1%}, white, to {most:.1%}.</small></p>",
            drawn(lambda stream: plot_token_shares(self.shares.mean(dim=1), self.tokens, stream)),
            "<h2>Share of the prefix by layer and head</h2>",
            f"<p>{said}</p>",
            drawn(lambda stream: plot_shares(mean, stream)),
        ]


def rows_of(facts: Sequence[tuple[str, str]]) -> str:
    rows = "\n".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts)
    return f'<div class="scroll"><table>\n{rows}\n</table></div>'


def figures_of(record: dict[str, Any]) -> str:
    """The table before and after, and what the data were."""
    before, after = record["before"], record["after"]
    rows = [("loss, nats per token", f"{before['loss']:.3f}", f"{after['loss']:.3f}")]
    for name in METRICS:
        if name in before and name in after:
            rows.append((name.replace("_", " "), f"{before[name]:.1%}", f"{after[name]:.1%}"))
    cells = "\n".join(
        f'<tr><th>{name}</th><td class="number">{old}</td><td class="number">{new}</td></tr>' for name, old, new in rows
    )
    counts = ", ".join(f"{record[f'{name}_items']:,} {name}" for name in ("train", "validation", "test"))
    return (
        f"<p>{counts} items; {record['train_tokens']:,} tokens to train on; {record['steps']:,} steps in "
        f"{record['seconds'] / 60:.1f} minutes on {escape(record['hardware'])}.</p>\n"
        f"<table>\n<tr><th>test items</th><th>before</th><th>after</th></tr>\n{cells}\n</table>"
    )


def settings_of(record: dict[str, Any]) -> list[tuple[str, str]]:
    settings = dict(record["settings"])
    settings |= settings.pop("adapter")
    return [(name.replace("_", " "), str(value)) for name, value in settings.items() if value not in (None, False)]


def drawn(draw: Callable[[IO[str]], None]) -> str:
    """A picture as SVG inside of the page."""
    stream = io.StringIO()
    draw(stream)
    text = stream.getvalue()
    return f'<div class="scroll">{text[text.index("<svg") :]}</div>'


def write_page(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be written to: {error.strerror}") from None
