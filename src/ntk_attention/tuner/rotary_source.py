"""Where an attention module of transformers puts positions into its queries, read off the source of its class.

A forward method calls a function of its modeling file, as `apply_rotary_pos_emb(query_states, key_states, cos, sin)`,
with tables that it got or makes. What leads to the tables, and the call itself, are made functions of their own here:
the model's code says what its rotation is, and no convention of it stands in this library.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from .lookup import INTERFACE, functions_of

ROTATES = re.compile(r"rotary|rotate|rope", re.IGNORECASE)
QUERY = re.compile(r"q(_.*)?|quer(y|ies)(_.*)?")
# Queries, keys and values: of them tables take a dtype and a device, for which the hidden states stand in.
DATA = re.compile(r"(q|k|v|kv|quer(y|ies)|keys?|values?)(_(?!length|len).*)?")
PROBE, KEY = "ntk_query", "ntk_key"

Condition = tuple[ast.expr, bool]  # and whether it holds


class UnreadableError(Exception):
    """A call whose tables the source does not tell simply enough."""


@dataclass(frozen=True)
class Parameter:
    """One of a forward method, which a caller may give by place or by name."""

    name: str
    place: int
    default: Any

    def of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[self.place] if self.place < len(args) else kwargs.get(self.name, self.default)


@dataclass(frozen=True)
class RotarySource:
    """One call in a forward method that rotates the query.

    Args:
        name: of the function that is called.
        refused: why it cannot be read; what comes after is of no use then.
        is_reached: by a module, as far as the module alone says it.
        parameters: of the forward method, which `tables` takes after the module.
        tables: what is given to the function beside queries and keys; None for a call that does not rotate.
        turn: the call itself, of the module, a query, a key and the tables.
        table_names: how the forward method calls the tables.
        is_last: whether the rotated numbers are the last ones of a query that is put together of parts.
        after: attributes of the module in what changes the query after it was rotated.
        cuts: whether the module calls its attention function several times, for one piece of the queries after another.
    """

    name: str
    refused: str | None
    is_reached: Callable[[nn.Module], bool]
    parameters: tuple[Parameter, ...] = ()
    tables: Callable[..., tuple[Any, ...] | None] = lambda *_: None
    turn: Callable[..., Any] = lambda *_: None
    table_names: tuple[str, ...] = ()
    is_last: bool = False
    after: tuple[str, ...] = ()
    cuts: bool = False


@cache
def rotary_sources(cls: Any) -> tuple[RotarySource, ...]:
    """The calls with which the modules of a class rotate their queries; none where they have no rotary positions."""
    found: list[RotarySource] = []
    forward = inspect.unwrap(cls.forward)
    for function, tree in functions_of(cls):
        definitions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        if not definitions:
            continue
        method = Method(cls, function, definitions[0])
        for call, conditions, place in method.rotary_calls():
            found.append(method.source_of(call, conditions, place, in_forward=function is forward))
    return tuple(found)


class Method:
    """The source of a method, statement by statement."""

    def __init__(self, cls: type, function: Any, definition: ast.FunctionDef):
        self.cls, self.function, self.definition = cls, function, definition
        self.statements = list(flat(definition.body, ()))
        signature = list(inspect.signature(function).parameters.values())[1:]
        usual = [p for p in signature if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.parameters = {
            p.name: Parameter(p.name, i, None if p.default is p.empty else p.default) for i, p in enumerate(usual)
        }
        self.var_keyword = next((p.name for p in signature if p.kind == p.VAR_KEYWORD), None)

    def rotary_calls(self) -> Iterator[tuple[ast.Call, tuple[Condition, ...], int]]:
        """Calls that rotate a query, what they are conditional on, and the place of their statements."""
        for place, (statement, conditions) in enumerate(self.statements):
            for node in ast.walk(statement):
                if not isinstance(node, ast.Call) or not node.args:
                    continue
                match node.func:
                    case ast.Name(id=name) if is_rotation(name) and any(map(QUERY.fullmatch, loads(node.args[0]))):
                        yield node, conditions, place
                    case ast.Attribute(value=ast.Name(id="self"), attr=name) if is_rotation(name):
                        # Children that make tables are called such, too; methods rotate.
                        if inspect.isfunction(getattr(self.cls, name, None)):
                            yield node, conditions, place

    def source_of(
        self, call: ast.Call, conditions: tuple[Condition, ...], place: int, *, in_forward: bool
    ) -> RotarySource:
        name = ast.unparse(call.func)
        own = [c for c in conditions if all(map(self.is_global, loads(c[0]) - {"self"}))]
        others = [c for c in conditions if c not in own]
        is_reached: Any = self.compiled("is_reached", ["self"], [], ast.unparse(joined(own)))
        if isinstance(call.func, ast.Attribute):
            return RotarySource(name, "a method of its own rotates them", is_reached)
        if not in_forward:
            return RotarySource(name, "not its forward method rotates them", is_reached)
        if not isinstance(call.args[0], ast.Name):
            return RotarySource(name, f"it rotates {ast.unparse(call.args[0])} alone", is_reached)
        if not self.hands_keywords_on():
            return RotarySource(name, "it does not hand its keyword arguments on to its attention function", is_reached)
        try:
            return self.read(call, others, place, is_reached)
        except UnreadableError as error:
            return RotarySource(name, str(error), is_reached)

    def read(self, call: ast.Call, others: list[Condition], place: int, is_reached: Any) -> RotarySource:
        """The parts of a call; conditions are those that do not hang on the module alone.

        Raises:
            UnreadableError: if they are not simple.
        """
        given = [*call.args, *(keyword.value for keyword in call.keywords)]
        read = {name for x in given for name in loads(x) if not self.is_global(name)} - {"self"}
        states = sorted(name for name in read if DATA.fullmatch(name))
        names = sorted(read.difference(states))
        names.sort(key=lambda name: ("cos" not in name, "sin" not in name))
        before, needed_before = self.slice(set().union(*(loads(test) for test, _ in others)), place, others)
        body, needed = self.slice(set(names), place, others)
        parameters = [self.parameters[name] for name in sorted(needed | needed_before) if name in self.parameters]
        hidden = next(iter(self.parameters.values()))
        stand_ins = [name for name in sorted(needed | needed_before) if name not in self.parameters]
        if stand_ins:
            parameters = [hidden, *(p for p in parameters if p is not hidden)]
        lines = [f"{name} = {hidden.name}" for name in stand_ins]
        lines += [*before, f"if not ({ast.unparse(joined(others))}): return None", *body]
        arguments = ["self", *(p.name for p in parameters)]
        tables: Any = self.compiled("tables", arguments, lines, f"({', '.join(names)},)")
        lines = [f"{name} = {PROBE if QUERY.fullmatch(name) else KEY}" for name in states]
        turn: Any = self.compiled("turn", ["self", PROBE, KEY, *names], lines, ast.unparse(call))
        target = self.target(call, place)
        return RotarySource(
            ast.unparse(call.func),
            None,
            is_reached,
            tuple(parameters),
            tables,
            turn,
            tuple(names),
            self.is_last(target),
            tuple(sorted(self.attributes_after(target, place))),
            self.cuts(),
        )

    def slice(self, needed: set[str], place: int, conditions: list[Condition]) -> tuple[list[str], set[str]]:
        """The statements before a place that make these names, and the names that they begin with."""
        lines: list[str] = []
        needed = {name for name in needed if not self.is_global(name)}
        here = {ast.unparse(test) for test, _ in self.statements[place][1]}
        for statement, own in reversed(self.statements[:place]):
            made = stores(statement)
            wanted = {name for name in needed & made if name in self.parameters or not DATA.fullmatch(name)}
            if not wanted:
                continue
            if not isinstance(statement, ast.Assign) or not {ast.unparse(test) for test, _ in own} <= here:
                raise UnreadableError(f"{' and '.join(sorted(wanted))} are made in several ways")
            lines.insert(0, ast.unparse(statement))
            needed = (needed - made) | {x for x in loads(statement.value) if not self.is_global(x)}
        needed.discard("self")
        if unknown := sorted(x for x in needed if x not in self.parameters and not DATA.fullmatch(x)):
            raise UnreadableError(f"{' and '.join(unknown)} are of unknown origin")
        return lines, needed

    def compiled(self, name: str, arguments: list[str], lines: list[str], result: str) -> Callable[..., Any]:
        """A function of the class's own statements, in the namespace of its file."""
        text = "\n    ".join([f"def {name}({', '.join(arguments)}):", *lines, f"return {result}"])
        made: dict[str, Any] = {}
        exec(compile(text, f"<positions of {self.cls.__name__}>", "exec"), self.function.__globals__, made)
        function: Callable[..., Any] = made[name]
        return function

    def is_global(self, name: str) -> bool:
        is_local = name in self.parameters or any(name in stores(statement) for statement, _ in self.statements)
        return not is_local and (name in self.function.__globals__ or hasattr(builtins, name))

    def attention_calls(self, inside: ast.AST) -> list[ast.Call]:
        """Calls of the function that it looks up in the attention interface."""
        looked_up = {name for s, _ in self.statements if INTERFACE in ast.unparse(s) for name in stores(s)}
        calls = [node for node in ast.walk(inside) if isinstance(node, ast.Call)]
        return [node for node in calls if ast.unparse(node.func) in looked_up]

    def cuts(self) -> bool:
        """Whether it calls its attention function in a loop."""
        loops = [node for node in ast.walk(self.definition) if isinstance(node, ast.For | ast.ListComp)]
        return any(self.attention_calls(loop) for loop in loops)

    def hands_keywords_on(self) -> bool:
        """Whether its attention function gets its keyword arguments."""
        found = self.attention_calls(self.definition)
        return bool(found) and all(
            any(k.arg is None and ast.unparse(k.value) == self.var_keyword for k in node.keywords) for node in found
        )

    def target(self, call: ast.Call, place: int) -> str | None:
        """The name that the rotated query gets."""
        match self.statements[place][0]:
            case (
                ast.Assign(targets=[ast.Tuple(elts=[ast.Name(id=name), *_])]) | ast.Assign(targets=[ast.Name(id=name)])
            ):
                return name
        return None

    def is_last(self, target: str | None) -> bool:
        """Whether the rotated part is the last one of those that a query is put together of."""
        for node in ast.walk(self.definition):
            match node:
                case ast.Call(func=ast.Attribute(attr="cat"), args=[ast.Tuple(elts=parts) | ast.List(elts=parts), *_]):
                    names = [ast.unparse(part) for part in parts]
                    if target in names[1:]:
                        return True
        return False

    def attributes_after(self, target: str | None, place: int) -> set[str]:
        """Attributes of the module in the statements that change the query after it was rotated."""
        queries, found = {target}, set[str]()
        made: dict[str, set[str]] = {}  # other names that are set meanwhile, with the attributes that they come from
        for statement, _ in self.statements[place + 1 :]:
            nodes = [node for node in ast.walk(statement) if isinstance(node, ast.Attribute)]
            own = {node.attr for node in nodes if ast.unparse(node.value) == "self"}
            own = own.union(*(made.get(name, set()) for name in loads(statement)))
            changed = {name for name in stores(statement) if QUERY.fullmatch(name)}
            if changed and queries & loads(statement):
                queries |= changed
                found |= own
            else:
                made |= dict.fromkeys(stores(statement), own)
        return found


def is_rotation(name: str) -> bool:
    return bool(ROTATES.search(name)) and "half" not in name


def flat(
    body: Iterable[ast.stmt], conditions: tuple[Condition, ...]
) -> Iterator[tuple[ast.stmt, tuple[Condition, ...]]]:
    """Simple statements in their order, with the conditions that they stand under."""
    for statement in body:
        if isinstance(statement, ast.If):
            yield from flat(statement.body, (*conditions, (statement.test, True)))
            yield from flat(statement.orelse, (*conditions, (statement.test, False)))
        elif isinstance(statement, ast.With | ast.For | ast.While):
            yield from flat(statement.body, conditions)
        else:
            yield statement, conditions


def joined(conditions: Iterable[Condition]) -> ast.expr:
    """All of them as one expression."""
    parts = [test if holds else ast.UnaryOp(ast.Not(), test) for test, holds in conditions]
    return ast.BoolOp(ast.And(), parts) if len(parts) > 1 else parts[0] if parts else ast.Constant(True)


def loads(node: ast.AST) -> set[str]:
    """Names that are read."""
    return named_in(node, ast.Load)


def stores(node: ast.AST) -> set[str]:
    """Names that are set."""
    return named_in(node, ast.Store)


def named_in(node: ast.AST, context: type[ast.expr_context]) -> set[str]:
    """Names in this context, without those that belong to a comprehension."""
    targets = [x.target for x in ast.walk(node) if isinstance(x, ast.comprehension)]
    own = {x.id for target in targets for x in ast.walk(target) if isinstance(x, ast.Name)}
    return {x.id for x in ast.walk(node) if isinstance(x, ast.Name) and isinstance(x.ctx, context)} - own
