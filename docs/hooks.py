"""What the site needs beside docs/: tables of results, links that leave docs/, formulas without scripts."""

from __future__ import annotations

import html
import os
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ELSEWHERE = {"CHANGELOG.md": "changelog.md", "README.md": "index.md"}  # in the repository, and on the site
LINK = re.compile(r"(\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^()#:\s]+)(#[^()\s]*)?\)")
BAR = re.compile(r"<mo([^>]*)>(&#x0007C;|\||&#x02016;)</mo>")  # of norms, which have no space around
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add what is made elsewhere in the repository."""
    for path in sorted((ROOT / "results").glob("*/*")):
        if path.name == "README.md" or path.suffix == ".png":
            add(files, path.relative_to(ROOT).as_posix(), path, config)
    for path, name in ELSEWHERE.items():
        add(files, name, ROOT / path, config)
    return files


def add(files: Files, name: str, path: Path, config: Any) -> None:
    files.append(File.generated(config, name, abs_src_path=str(path)))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links are those of the repository; what is no page of the site stays a name, or leads to the repository."""
    source = Path(page.file.abs_src_path)
    if page.is_homepage:
        page.meta["hide"] = ["navigation"]  # a column with nothing but its own name

    def moved(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        path = Path(os.path.normpath(source.parent / target))
        name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else ""
        name = ELSEWHERE.get(name, name.removeprefix("docs/"))
        if files.get_file_from_path(name):
            return f"{text}({os.path.relpath(name, Path(page.file.src_uri).parent)}{anchor})"
        if path.exists() and config.repo_url:
            return f"{text}({config.repo_url.rstrip('/')}/blob/main/{path.relative_to(ROOT).as_posix()}{anchor})"
        return text[1:-1] if path.exists() else link[0]

    return LINK.sub(moved, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas become MathML, which browsers know."""

    def formula(found: re.Match[str]) -> str:
        made = convert(html.unescape(found[2]), display="block" if found[1] == "div" else "inline")
        return BAR.sub(r'<mo\1 lspace="0" rspace="0">\2</mo>', made)

    return FORMULA.sub(formula, content)
