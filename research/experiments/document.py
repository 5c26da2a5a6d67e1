"""A report as a list of blocks, written as Markdown with files beside it or as one HTML page that holds all."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from research.recording import table


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Table:
    """The first column names the row; rows whose name is in `strong` are ours. A cell may have several lines."""

    head: Sequence[str]
    body: Sequence[Sequence[str]]
    strong: str = ""


@dataclass(frozen=True)
class Figure:
    path: Path
    text: str


Block = Heading | Text | Table | Figure


def markdown(blocks: Sequence[Block]) -> str:
    parts = []
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"{'#' * block.level} {block.text}\n")
        elif isinstance(block, Text):
            parts.append(f"{block.text}\n")
        elif isinstance(block, Figure):
            parts.append(f"![{block.text}]({block.path.name})\n")
        else:
            body = [[f"**{row[0]}**", *row[1:]] if row[0] == block.strong else row for row in block.body]
            head, *body = ([text.replace("\n", "<br>") for text in row] for row in (block.head, *body))
            parts.append(table(head, body))
    return "\n".join(parts)


STYLE = """
:root { --ink: #1d2430; --soft: #5c6675; --line: #dde2e9; --back: #ffffff; --ours: #fdf0ee; --accent: #c0392b }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --soft: #a3adba; --line: #353d49; --back: #161a20; --ours: #3a2422; --accent: #ff8a7a }
  img { background: #ffffff }
}
* { box-sizing: border-box }
body { margin: 0; color: var(--ink); background: var(--back); font: 16px/1.55 system-ui, sans-serif }
main { max-width: 1180px; margin: 0 auto; padding: 24px 20px 80px }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 16px 0 }
h2 { font-size: 1.35rem; margin: 48px 0 8px; padding-top: 16px; border-top: 1px solid var(--line) }
h3 { font-size: 1.08rem; margin: 32px 0 4px }
p { max-width: 46em } a { color: var(--accent) }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: .93rem }
.wide { overflow-x: auto; margin: 12px 0 20px; border: 1px solid var(--line); border-radius: 6px }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums }
th, td { padding: 6px 8px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
td { vertical-align: top } td:first-child { white-space: normal; min-width: 8.5em }
th { color: var(--soft); font-weight: 600; vertical-align: bottom }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--back) }
tr:last-child td { border-bottom: 0 }
tr.ours td { background: var(--ours) } tr.ours td:first-child { font-weight: 600 }
figure { margin: 16px 0 24px } img { display: block; width: 100%; height: auto; border-radius: 6px }
figcaption { color: var(--soft); font-size: .9rem; margin-top: 6px; position: sticky; left: 0 }
@media (max-width: 640px) {
  main { padding: 12px 14px 60px } h1 { font-size: 1.5rem } h2 { margin-top: 36px }
  th, td { padding: 6px 9px }
  td:first-child { max-width: 10em }
  figure { overflow-x: auto } figure img { min-width: 980px }
}
"""


def page(blocks: Sequence[Block]) -> str:
    """HTML without any other file; pictures scroll sideways on a phone, so that they stay readable."""
    titles = [block.text for block in blocks if isinstance(block, Heading) and block.level == 2]
    links = "".join(f'<a href="#{anchor(title)}">{inline(title)}</a>' for title in titles)
    name = next((block.text for block in blocks if isinstance(block, Heading)), "Report")
    body = []
    for block in blocks:
        if isinstance(block, Heading):
            body.append(f'<h{block.level} id="{anchor(block.text)}">{inline(block.text)}</h{block.level}>')
            if block.level == 1:
                body.append(f"<nav>{links}</nav>")
        elif isinstance(block, Text):
            body.append(f"<p>{inline(block.text)}</p>")
        elif isinstance(block, Figure):
            data = base64.b64encode(block.path.read_bytes()).decode()
            body.append(
                f'<figure><img alt="{html.escape(block.text)}" src="data:image/png;base64,{data}">'
                f"<figcaption>{inline(block.text)}</figcaption></figure>"
            )
        else:
            body.append(html_table(block))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(name)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def html_table(block: Table) -> str:
    used = [i for i in range(len(block.head)) if any(row[i] for row in block.body)]
    head = "".join(f"<th>{inline(block.head[i])}</th>" for i in used)
    rows = []
    for row in block.body:
        mark = ' class="ours"' if row[0] == block.strong else ""
        rows.append(f"<tr{mark}>{''.join(f'<td>{inline(row[i])}</td>' for i in used)}</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def inline(text: str) -> str:
    text = html.escape(text, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text).replace("\n", "<br>")


def anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
