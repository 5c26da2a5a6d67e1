"""What the documentation names is there: files, commands, and the tree of the package."""

import ast
import importlib.util
import re

import pytest

from .tree import END, GUIDE, PACKAGE, ROOMS, ROOT, START, tree

TEXTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "research").rglob("*.md")]


def test_the_tree_is_that_of_the_package():
    """`python -m tests.tree` writes it."""
    assert GUIDE.read_text().split(START)[1].split(END)[0] == tree()
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ROOMS)


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_commands_are_there(text):
    found = text.read_text()
    for name in re.findall(r"`((?:[a-z_0-9]+/)+[a-z_0-9]+\.(?:py|md|txt))`|(tests/[a-z_/0-9]+\.py)", found):
        path = name[0] or name[1]
        assert any((root / path).is_file() for root in (ROOT, PACKAGE, text.parent)), f"{text.name} names {path}"
    for module in re.findall(r"python -m ([a-z_.]+[a-z])", found):
        assert importlib.util.find_spec(module), f"{text.name} names python -m {module}"
    for link in re.findall(r"\]\(([^)#:]+)\)", found):
        assert (text.parent / link).exists(), f"{text.name} links to {link}"


def test_the_mathematics_is_quoted_as_it_is():
    """The functions of the reference that docs/kernels.md shows, without their docstrings."""
    shown = re.search(r"```python\n(.*?)```", (ROOT / "docs/kernels.md").read_text(), re.DOTALL).group(1)
    reference = ast.parse((PACKAGE / "ops/reference.py").read_text())
    own = {node.name: node for node in reference.body if isinstance(node, ast.FunctionDef)}
    quoted = ast.parse(shown).body
    assert [node.name for node in quoted] == ["token_block", "phi_input", "prefix_block", "merge"]
    for node in quoted:
        del own[node.name].body[0]  # the docstring
        assert ast.unparse(node) == ast.unparse(own[node.name])
