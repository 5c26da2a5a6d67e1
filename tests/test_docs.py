"""README and docs/ are true: Python runs, tutorials run as a whole, commands and options exist, links lead somewhere.

On a page `<!-- not run: why -->` leaves out the block that follows, and `<!-- setup` ... `-->` holds Python that is run
but not shown.
"""

import ast
import json
import os
import re
import shlex
import textwrap
from itertools import pairwise
from typing import NamedTuple

import pytest
import typer
from markdown_it import MarkdownIt
from transformers import AutoTokenizer
from typer.testing import CliRunner

from ntk_attention import __version__
from ntk_attention.cli import models
from ntk_attention.cli.main import app

from .tiny import save_model
from .tree import PACKAGE, ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
TEXTS = [
    *ROOT.glob("*.md"),
    *(path for room in ("docs", "research", "results", "examples") for path in (ROOT / room).rglob("*.md")),
]
MADE = DOCS / "reference/cli.md"
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"  # of the pages; a folder of a tiny model here, which is looked for first
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
COMMAND = typer.main.get_command(app)
# Options of accelerate, vLLM, pytest and of our own modules, which pages name as well.
FOREIGN = {
    "--enable-lora", "--lora-dtype", "--lora-modules", "--max-cpu-loras", "--max-loras", "--max-lora-rank",
    "--fsdp_cpu_ram_efficient_loading false", "--fsdp_offload_params true", "--use_fsdp", "--source both",
}  # fmt: skip


class Part(NamedTuple):
    """A piece of a page that a test looks at."""

    kind: str  # python, shell, code (in a line), link, heading
    text: str
    line: int
    is_run: bool = True


def parts_of(path):
    """The parts of a page, in its order."""
    tokens = MarkdownIt("commonmark").enable("table").parse(path.read_text())
    left_out = False
    for before, token in pairwise([tokens[0], *tokens]):
        line = 1 + (token.map[0] if token.map else 0)
        if token.type == "html_block":
            left_out = left_out or token.content.startswith("<!-- not run:")
            if setup := re.match(r"<!-- setup\n(.*?)-->", token.content, re.DOTALL):
                yield Part("python", setup[1], line)
        elif token.type in ("fence", "code_block"):
            kind = "python" if token.info.startswith("python") else "shell" if token.info in ("", "sh") else "text"
            yield Part(kind, token.content, line, not left_out)
            left_out = False
        elif token.type == "inline":
            yield from inline_parts(token, line)
            if before.type == "heading_open":
                text = "".join(child.content for child in token.children if child.type in ("text", "code_inline"))
                yield Part("heading", text, line)


def inline_parts(token, line):
    for child in token.children:
        if child.type == "code_inline":
            yield Part("code", child.content, line)
        elif child.type == "link_open":
            yield Part("link", child.attrs["href"], line)
        elif child.type == "image":
            yield Part("link", child.attrs["src"], line)


def commands_of(text):
    """The arguments of every call of our command line in a block of shell."""
    for line in text.replace("\\\n", " ").splitlines():
        if not re.search("ntk[-_]attention", line):  # formulas, too, are indented
            continue
        words = shlex.split(line, comments=True)
        for start in (["ntk-attention"], ["-m", "ntk_attention.cli"]):
            for i in range(len(words) - len(start) + 1):
                if words[i : i + len(start)] == start and (i == 0 or start[0] == "-m"):
                    yield [word for word in words[i + len(start) :] if word != "..."]


def parse(arguments):
    """As the command line itself does it; what it does not take raises."""
    name, *rest = arguments
    assert name in COMMAND.commands, f"there is no command {name}"
    with COMMAND.commands[name].make_context(name, rest):
        pass


def ids(path):
    return str(path.relative_to(ROOT))


def runs(path):
    return any(part.kind == "python" and part.is_run for part in parts_of(path))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model that can chat, and takes prompts of pages, whose every byte is a token."""
    folder = save_model(tmp_path_factory.mktemp("model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def place(base, tmp_path, monkeypatch):
    """An empty folder in which the names of models that pages use are the tiny one."""
    (tmp_path / NAME).parent.mkdir()
    (tmp_path / NAME).symlink_to(base)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "embedded_folder", lambda: base)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in PAGES if runs(path)], ids=ids)
def test_a_page_runs_from_top_to_bottom(path, place):
    """Python, and in tutorials the commands, too."""
    names = {"__name__": "__main__"}
    for part in parts_of(path):
        if part.kind == "python" and part.is_run:
            code = compile("\n" * part.line + part.text, ids(path), "exec")
            exec(code, names)
        elif part.kind == "shell" and part.is_run and path.parent.name == "tutorials":
            for arguments in commands_of(part.text):
                result = CliRunner().invoke(app, arguments, input="")
                assert result.exit_code == 0, f"{ids(path)}:{part.line} {arguments}: {result.output[-2000:]}"


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_python_that_is_not_run_is_python(path):
    for part in parts_of(path):
        if part.kind == "python":
            ast.parse(textwrap.dedent(part.text))


@pytest.mark.parametrize("path", [path for path in PAGES if path != MADE], ids=ids)
def test_commands_and_options_are_there(path):
    known = {name for command in COMMAND.commands.values() for option in command.params for name in option.opts}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for part in parts_of(path):
        where = f"{ids(path)}:{part.line}"
        if part.kind == "shell":
            for arguments in commands_of(part.text):
                if "--version" not in arguments and "--install-completion" not in arguments:
                    parse(arguments)
            for target in re.findall(r"^make ([a-z-]+)", part.text, re.MULTILINE):
                assert target in targets, f"{where} names make {target}"
        elif part.kind == "code" and part.text.startswith("ntk-attention "):
            name = part.text.split()[1]
            assert name in COMMAND.commands or name.startswith("--"), f"{where} names the command {name}"
            options = {o for option in getattr(COMMAND.commands.get(name), "params", []) for o in option.opts}
            for option in re.findall(r"--[a-z][a-z-]*", part.text) if name in COMMAND.commands else ():
                assert option in options, f"{where}: {name} has no {option}"
        elif part.kind == "code" and part.text.startswith("--") and part.text not in FOREIGN:
            assert part.text.split()[0] in known, f"{where} names the option {part.text}"


def test_the_page_of_commands_is_that_of_the_command_line():
    """`python -m tests.cli.reference` writes it; typer's versions put the same things into other words."""
    sections = re.split(r"^## (\w+)$", MADE.read_text(), flags=re.MULTILINE)[1:]
    found = dict(zip(sections[::2], sections[1::2], strict=True))
    assert set(found) == set(COMMAND.commands)
    for name, command in COMMAND.commands.items():
        options = {option.opts[0]: option.help or "" for option in command.params if option.opts[0].startswith("--")}
        shown = dict(re.findall(r"^\* `(--[a-z0-9-]+)[^`]*`: (.*)$", found[name].replace("\\[", "["), re.MULTILINE))
        shown.pop("--help")
        assert set(shown) == set(options), name
        for option, said in options.items():
            assert said in shown[option], f"{name} {option}"


def anchors(path):
    """The names that headings get, on GitHub and on the site, which agree on plain ones."""
    for part in parts_of(path):
        if part.kind == "heading":
            yield re.sub(r"[\s]", "-", re.sub(r"[^\w\s-]", "", part.text.strip().lower()))


@pytest.mark.parametrize("path", TEXTS, ids=ids)
def test_links_lead_somewhere(path):
    for part in parts_of(path):
        if part.kind != "link" or re.match(r"[a-z]+:", part.text):
            continue
        name, _, anchor = part.text.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), f"{ids(path)}:{part.line} links to {part.text}"
        if anchor:
            assert anchor in set(anchors(target)), f"{ids(path)}:{part.line}: {part.text} has no such heading"


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_pages_are_the_same_on_github_and_on_the_site(path):
    """Python-Markdown wants an empty line before a list and four columns for a list inside one, and takes an indented
    block after a list for a part of it."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for rule in (r"^(?!- |  |#)\S.*\n- ", r"^ {1,3}- ", r"^(?:- |  (?! )).*\n\n    \S"):
        found = re.search(rule, text, re.MULTILINE)
        assert not found, f"{ids(path)}: {found[0]!r}"


def messages():
    """What the library says, with … for what it puts in."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)


def test_errors_are_quoted_as_they_are_written():
    """Headings of the page on troubles that hold an error; the others are questions of its own."""
    said = "\n".join(messages())
    page = DOCS / "troubleshooting.md"
    own = {"Training does not get better", "The GPU waits", "vLLM finds the base model, but no adapter of ours"}
    own |= {"KeyError: 'NTK_ATTENTION'"}  # PEFT's
    for heading in re.findall(r"^### (.*)$", page.read_text(), re.MULTILINE):
        if heading not in own:
            found = re.search(re.escape(heading).replace("…", "[^\n]*?"), said)
            assert found, f"no error says {heading!r}"


def test_versions_agree():
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1]
    assert cited == __version__
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_page_is_on_the_site():
    """And the site has no page twice; mkdocs itself says the same, where it is installed."""
    named = re.findall(r"^ +- .*?([a-zA-Z/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(named) == len(set(named))
    here = {os.path.relpath(path, DOCS) for path in DOCS.rglob("*.md")}
    elsewhere = {name for name in named if name not in here}
    assert here <= set(named)
    assert elsewhere == {
        "index.md",
        "changelog.md",
        *(f"results/{name}/README.md" for name in ("experiments", "benchmarks", "conversion", "theory")),
    }
