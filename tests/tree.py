"""The tree of the package in CONTRIBUTING.md: one line for each file, the first of its docstring.

python -m tests.tree      # writes it anew
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/ntk_attention"
GUIDE = ROOT / "CONTRIBUTING.md"
ROOMS = ("ops", "tuner", "calibration", "convert", "cli", "theory", "vllm")  # in the order of the imports
START, END = "<!-- the tree: python -m tests.tree -->\n", "<!-- the tree ends -->\n"


def tree() -> str:
    """Markdown: what lies in no room, and the rooms, each with its files."""
    lines = [f"- `{f.name}`: {said(f)}" for f in sorted(PACKAGE.glob("*.py")) if f.name != "__init__.py"]
    lines += [""] if lines else []
    for room in ROOMS:
        lines += [f"**`{room}/`**: {said(PACKAGE / room / '__init__.py')}", ""]
        files = sorted((PACKAGE / room).rglob("*.py"))
        lines += [f"- `{f.relative_to(PACKAGE)}`: {said(f)}" for f in files if f.name != "__init__.py"]
        lines.append("")
    return "\n".join(lines)


def said(file: Path) -> str:
    """The first line of a module's docstring."""
    text = ast.get_docstring(ast.parse(file.read_text()))
    assert text, f"{file} has no docstring"
    return text.splitlines()[0]


if __name__ == "__main__":
    before, rest = GUIDE.read_text().split(START)
    GUIDE.write_text(before + START + tree() + END + rest.split(END)[1])
