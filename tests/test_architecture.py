"""The walls between the rooms, and how large a file and a function may be: read off the source, nothing is imported."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "ntk_attention"
ROOMS = {  # room: the rooms that it may know; "" is the face of the package
    "ops": set(),
    "progress": set(),
    "tuner": {"ops"},
    "calibration": {"ops", "tuner", "progress"},
    "convert": {"ops", "tuner", "calibration", "progress"},
    "theory": {"ops", "progress"},
    "cli": {"ops", "tuner", "calibration", "convert", "theory", "progress"},
    "vllm": {"ops", "tuner"},
    "": {"ops", "tuner", "calibration"},
}
COME_ALONG = {  # modules that pyproject.toml does not name, with the rooms that may import them
    "triton": ({"ops"}, "comes with torch where there is a GPU; everything runs without"),
    "deepspeed": ({"tuner"}, "imported only where a run uses it"),
    "huggingface_hub": ({"tuner", "cli"}, "comes with transformers"),
    "yaml": ({"cli"}, "comes with transformers"),
    "jinja2": ({"cli"}, "comes with torch"),
    "numpy": ({"theory"}, "comes with matplotlib"),
}
MOST_LINES, MOST_FUNCTION_LINES, MOST_PARAMETERS = 450, 60, 8

# Decorators whose functions have as many parameters as somebody else wants.
FLAT = {
    "jit": "a kernel: the arguments of a launch are pointers, strides and sizes, one by one",
    "compiled": "the same",
    "custom_op": "an operator of torch: its schema knows no structures",
    "register_fake": "the shapes of such an operator, from the same arguments",
    "impl": "the same",
    "command": "the command line: every parameter is an option",
}

# What is too large, and why it stays. An entry that is not needed any more fails: take it out.
OPTIONS = "public: what goes with it are options, by keyword, each with a default and a line in the docstring"
CASE = "a test's case: sizes and options by keyword"
OPERATION = "the arguments of scaled_dot_product_attention, and the prefix"
LARGE_FILES = {}
LONG_FUNCTIONS = {
    "src/ntk_attention/ops/triton/forward_sm90.py::fused_forward": "a kernel whose order of loads is its point",
    "src/ntk_attention/ops/triton/forward_sm90_persistent.py::attend_tiles": "the same",
    "src/ntk_attention/ops/triton/forward.py::fused_forward": "a kernel; its parts that can be apart are in tiles.py",
    "src/ntk_attention/ops/triton/backward.py::prefix_backward": "the same",
    "src/ntk_attention/ops/triton/decode.py::decode": "the same",
}
MANY_PARAMETERS = {
    "src/ntk_attention/convert/distillation.py::distill": OPTIONS,
    "src/ntk_attention/convert/own_text.py::study": OPTIONS,
    "src/ntk_attention/ops/attention.py::ntk_attention": OPERATION,
    "tests/ops/test_attention.py::make_case": CASE,
    "tests/ops/test_strides.py::make_inputs": CASE,
    "tests/reference.py::in_logarithms": OPERATION,
    "tests/reference.py::naive": OPERATION,
}


# --- imports ---


@cache
def modules() -> dict[str, Path]:
    """Every module of the library by its dotted name."""
    found = {}
    for path in sorted((ROOT / "src").rglob("*.py")):
        parts = path.relative_to(ROOT / "src").with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, tree: ast.Module, known: dict[str, Path]) -> Iterator[str]:
    """What a module imports, inside of functions as well: modules of the library in full, of others as they stand."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *(node.module.split(".") if node.module else [])])
            for alias in node.names:
                yield f"{source}.{alias.name}" if f"{source}.{alias.name}" in known else source


@cache
def edges(for_types: bool = True) -> list[tuple[str, str]]:
    """Who imports whom, with or without what stands under `if TYPE_CHECKING`."""
    found = []
    for name, path in modules().items():
        tree = ast.parse(path.read_text())
        if not for_types:
            tree.body = [x for x in tree.body if not (isinstance(x, ast.If) and ast.unparse(x.test) == "TYPE_CHECKING")]
        found += [(name, other) for other in imports(name, path, tree, modules())]
    return found


def is_ours(name: str) -> bool:
    return name.split(".")[0] == PACKAGE


def room_of(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def test_every_module_is_in_a_room():
    assert {room_of(name) for name in modules()} == set(ROOMS), "a new room needs a line in ROOMS"


def test_imports_point_one_way():
    wrong = [
        f"{name} imports {found}"
        for name, found in edges()
        if is_ours(found) and room_of(found) != room_of(name) and room_of(found) not in ROOMS[room_of(name)]
    ]
    assert not wrong, f"ops <- tuner <- calibration <- convert <- cli, theory <- cli, tuner <- vllm: {wrong}"


def test_no_circle():
    """Of imports that run; those for types alone may point back inside of a room."""
    graph: dict[str, set[str]] = {}
    for name, found in edges(for_types=False):
        if is_ours(found) and found != name:
            graph.setdefault(name, set()).add(found)
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_third_parties():
    """The operation needs torch alone, the library what pyproject.toml lists, the command line and vLLM their extras.

    Nothing of tests, research and examples is in that list either.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    library = {imported(line) for line in project["dependencies"]}
    extras = {imported(line) for name in ("cli", "demo") for line in project["optional-dependencies"][name]}
    serving = {imported(line) for line in project["optional-dependencies"]["vllm"]}
    allowed = {"ops": {"torch"}, "cli": library | extras, "theory": library | extras, "vllm": library | serving}
    for name, found in edges():
        top, room = found.split(".")[0], room_of(name)
        if is_ours(found) or top in sys.stdlib_module_names or room in COME_ALONG.get(top, ((), ""))[0]:
            continue
        where = allowed.get(room, library)
        assert top in where, f"{name} imports {top}, its room may import {sorted(where)}"


def test_the_plugin_waits_for_vllm():
    """Its entry imports nothing of vLLM, nor what does, before vLLM calls it."""
    for name in (f"{PACKAGE}.vllm", f"{PACKAGE}.vllm.plugin"):
        path = modules()[name]
        tree = ast.parse(path.read_text())
        tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        found = set(imports(name, path, tree, modules()))
        assert not {x for x in found if x.split(".")[0] == "vllm" or room_of(x) == "vllm"}, f"{name} imports {found}"


def imported(requirement: str) -> str:
    """The module of a distribution."""
    name = requirement.split(";")[0]
    for sign in "[<>=!~ ":
        name = name.split(sign)[0]
    return name.replace("-", "_")


def test_imports_of_all_kinds_are_seen():
    """At the top and in a function, relative and not, of a name and of a module."""
    text = (
        "import torch.nn\nfrom ..ops import state\nfrom ..ops.state import PrefixState\n"
        "def f():\n    from . import b\n    from .. import calibrate\n"
    )
    known = dict.fromkeys(("ntk_attention.ops.state", "ntk_attention.tuner.b"), Path())
    found = list(imports("ntk_attention.tuner.a", Path("a.py"), ast.parse(text), known))
    state = "ntk_attention.ops.state"
    assert found == ["torch.nn", state, state, "ntk_attention.tuner.b", "ntk_attention"]


# --- sizes ---


@cache
def sources() -> dict[str, str]:
    return {
        str(path.relative_to(ROOT)): path.read_text()
        for folder in ("src", "tests", "research", "examples")
        for path in sorted((ROOT / folder).rglob("*.py"))
    }


def functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """All of a file, methods and inner ones as well, with a name that stays when lines move."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}{child.name}", child
            yield from functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.ClassDef):
            yield from functions(child, f"{prefix}{child.name}.")
        else:
            yield from functions(child, prefix)


def all_functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path, text in sources().items():
        yield from functions(ast.parse(text), f"{path}::")


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Those with names; self and cls are none."""
    found = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return len(found) - (bool(found) and found[0].arg in ("self", "cls", "ctx"))


def is_flat(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    decorators = [node.func if isinstance(node, ast.Call) else node for node in function.decorator_list]
    return any(ast.unparse(node).split(".")[-1] in FLAT for node in decorators)


def large_files() -> dict[str, int]:
    return {path: n for path, text in sources().items() if (n := text.count("\n")) > MOST_LINES}


def long_functions() -> dict[str, int]:
    lengths = {name: (f.end_lineno or 0) - f.lineno + 1 for name, f in all_functions()}
    return {name: n for name, n in lengths.items() if n > MOST_FUNCTION_LINES}


def functions_of_many_parameters() -> dict[str, int]:
    return {name: n for name, f in all_functions() if not is_flat(f) and (n := parameters(f)) > MOST_PARAMETERS}


@pytest.mark.parametrize(
    ("found", "allowed", "limit"),
    [
        (large_files, LARGE_FILES, f"{MOST_LINES} lines of a file"),
        (long_functions, LONG_FUNCTIONS, f"{MOST_FUNCTION_LINES} lines of a function"),
        (functions_of_many_parameters, MANY_PARAMETERS, f"{MOST_PARAMETERS} parameters of a function"),
    ],
    ids=["files", "functions", "parameters"],
)
def test_sizes(found, allowed, limit):
    sizes = found()
    over = {name: n for name, n in sizes.items() if name not in allowed}
    assert not over, f"more than {limit}: cut them, or say in the list why not: {over}"
    needless = sorted(set(allowed) - set(sizes))
    assert not needless, f"these keep to {limit} now, take them out of the list: {needless}"
