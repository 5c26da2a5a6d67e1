"""How an attention module of transformers finds its attention function, read off the source of its class.

A module asks `ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)`. Some
also compare that name with others and take another way for it: mask what an indexer left out, cut sequences apart. The
name that such a module finds in its config, a `RoutedName`, equals that of the implementation it had before, and yet
leads to our function. The others find ours, a plain string, which every compiler can read. Where that other way leads
past the function, as GPT-2's with `reorder_and_upcast_attn` does, there is nothing to route.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import nn
from torch._guards import TracingContext

ROUTE = "ntk_attention"  # name of our function in the attention interface
INTERFACE = "ALL_ATTENTION_FUNCTIONS"
OWN_NAME = "self.config._attn_implementation"
EAGER = "eager_attention_forward"


@dataclass(frozen=True)
class Lookup:
    """How the modules of one class find their attention function."""

    eager: Callable[..., Any] | None  # the one for "eager", each modeling file has its own
    interface: Any  # the mapping that knows the others
    takes_eager_itself: bool  # without asking the mapping: modules of older remote code
    asks_for_flash: bool  # whether the module asks if that is flash attention
    compared: frozenset[str]  # implementations with whose names the module compares
    replaced: frozenset[str]  # implementations that it takes by their own name in some calls
    switches: frozenset[str]  # attributes of the module with which it goes past the function

    def ways_past(self, module: nn.Module) -> frozenset[str]:
        """The implementations, of those with whose names the module compares, under which it goes past the function."""
        return self.compared if self.is_switched(module) else frozenset()

    def is_switched(self, module: nn.Module) -> bool:
        return any(getattr(module, name, False) for name in self.switches)


def lookup_of(cls: Any) -> Lookup | None:
    """How a module class looks its attention function up, by its config's name for it; None if it does not."""
    return _read(cls)


@cache
def _read(cls: Any) -> Lookup | None:
    found: tuple[Any, Any, bool] | None = None  # the first three fields
    compared: set[str] = set()
    replaced: set[str] = set()
    switches: set[str] = set()
    asks_for_flash = False
    for function, tree in functions_of(cls):
        namespace = function.__globals__
        switches |= switches_of(tree)
        for node in ast.walk(tree):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="get_interface"), args=[key, default]):
                    if name == INTERFACE and ast.unparse(key) == OWN_NAME:
                        eager = namespace.get(ast.unparse(default))
                        found = eager, namespace[INTERFACE], False
                case ast.Call(func=ast.Name(id="is_flash_attention_requested")):
                    asks_for_flash = True
                case ast.Subscript(value=ast.Name(id=name), slice=key) if name == INTERFACE:
                    if ast.unparse(key) == OWN_NAME:
                        eager = namespace.get(EAGER)
                        found = eager, namespace[INTERFACE], True
                    elif isinstance(key, ast.Constant) and isinstance(key.value, str):
                        replaced.add(key.value)
                case ast.Compare(left=left, comparators=others):
                    if OWN_NAME in map(ast.unparse, [left, *others]):
                        constants = (c for x in [left, *others] for c in ast.walk(x) if isinstance(c, ast.Constant))
                        compared |= {c.value for c in constants if isinstance(c.value, str)}
    if found is None:
        return None
    if found[2]:
        compared.discard("eager")
    names = [frozenset(x) for x in (compared, replaced, switches)]
    return Lookup(*found, asks_for_flash, *names)


def switches_of(tree: ast.AST) -> set[str]:
    """Attributes of the module in a condition under which it does not call the function that it looked up."""
    assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign | ast.AnnAssign) and node.value]
    targets = [
        target
        for node in assigned
        if node.value is not None and INTERFACE in ast.unparse(node.value)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    ]
    names = set(map(ast.unparse, targets))

    def calls(branch: list[ast.stmt]) -> bool:
        nodes = (node for part in branch for node in ast.walk(part))
        return any(isinstance(node, ast.Call) and ast.unparse(node.func) in names for node in nodes)

    forks = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    tests = [node.test for node in forks if calls(node.orelse) and not calls(node.body)]
    nodes = [node for test in tests for node in ast.walk(test) if isinstance(node, ast.Attribute)]
    return {node.attr for node in nodes if ast.unparse(node.value) == "self"}


def functions_of(cls: type[nn.Module]) -> Iterator[tuple[Any, ast.AST]]:
    """The forward method and the methods that it reaches, with their source."""
    pending, seen = ["forward"], set()
    while pending:
        name = pending.pop()
        for base in cls.__mro__:
            if base is nn.Module:
                break
            function = inspect.unwrap(base.__dict__[name]) if name in base.__dict__ else None
            if not inspect.isfunction(function) or function in seen:
                continue
            seen.add(function)
            tree = source_of(function)
            yield function, tree
            attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
            pending += [
                node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id == "self"
            ]
            if not any(node.attr == name and ast.unparse(node.value).startswith("super(") for node in attributes):
                break  # what it overrides is not reached


def source_of(function: Any) -> ast.AST:
    """Its syntax tree."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # a class that was made without a file: nothing is known of it
        return ast.Module(body=[], type_ignores=[])


class RoutedName(str):
    """The name of an attention implementation, for which the attention interface finds our function."""

    takes_eager_itself: bool  # whether the module has another way for "eager", without the interface

    def __new__(cls, implementation: str, takes_eager_itself: bool = False) -> RoutedName:
        name = super().__new__(cls, implementation)
        name.takes_eager_itself = takes_eager_itself
        return name

    def __eq__(self, other: object) -> bool:
        if self.takes_eager_itself and other == "eager":
            return False
        return str.__eq__(self, other) is True or other == ROUTE

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(ROUTE)


routed_name = lru_cache(RoutedName)  # asked for at every call


class RoutedConfig:
    """The config of a routed module: the model's own, but for the name of the attention function.

    Both have the same attributes, in one `__dict__`: modules may read them at every call, and the user may change them
    between calls. So what is ours is in slots, where nothing that prints or saves a config looks.
    """

    __slots__ = ("ntk_base", "ntk_way")
    ntk_base: Any  # the config that the module had
    ntk_way: Way

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Whoever makes another config of this class, as for a comparison with its defaults, gets a plain one."""
        return cls.__bases__[1](*args, **kwargs)

    @property
    def _attn_implementation(self) -> str:
        return self.ntk_name()

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        self.ntk_base._attn_implementation = value

    def ntk_name(self) -> str:
        return ROUTE

    def __reduce_ex__(self, protocol: Any) -> Any:
        return routed_as, (self.ntk_base, self.ntk_way)

    def __copy__(self) -> Any:
        return routed_as(copy.copy(self.ntk_base), self.ntk_way)

    def __repr__(self) -> str:
        return repr(self.ntk_base)


class ComparedConfig(RoutedConfig):
    """The same for a module that compares the name with others.

    It is read at every call: the user may switch the model between implementations, and the masks change with it.
    """

    __slots__ = ()

    def ntk_name(self) -> str:
        implementation, way = self.ntk_base._attn_implementation, self.ntk_way
        if implementation in way.past:
            raise ValueError(
                f"the attention module computes attention itself under {implementation!r}, where no prefix reaches it: "
                "expected set_attn_implementation('sdpa')"
            )
        # The second where Dynamo asks a property instead of reading it (torch 2.11).
        if not torch.compiler.is_compiling() and TracingContext.try_get() is None:
            return routed_name(implementation, way.takes_eager_itself)
        if implementation in way.compared:
            raise ValueError(
                f"the attention module compares the name of its implementation with {implementation!r}: expected to "
                "run without torch.compile"
            )
        return ROUTE  # compilers know plain strings only


@dataclass(frozen=True)
class Way:
    """How one module finds its function: what of its `Lookup` a `ComparedConfig` needs, without functions, which cannot
    be pickled."""

    compares: bool
    takes_eager_itself: bool
    compared: frozenset[str]
    past: frozenset[str]  # implementations under which it goes past the function


@cache
def routed_class(cls: type, compares: bool) -> type:
    routed = ComparedConfig if compares else RoutedConfig
    return type(cls.__name__, (routed, cls), {"__module__": cls.__module__})


def routed_as(config: Any, way: Way) -> Any:
    base: type = type(config)
    cls: Any = routed_class(base, way.compares)
    routed = object.__new__(cls)
    for name, value in (("__dict__", config.__dict__), ("ntk_base", config), ("ntk_way", way)):
        object.__setattr__(routed, name, value)  # configs of transformers check what is set
    return routed


def routed_config(config: Any, lookup: Lookup, past: frozenset[str] = frozenset()) -> Any:
    """A module's config as one with which it finds our function.

    Args:
        config: of the module.
        lookup: of its class.
        past: implementations under which the module would go past the function; that is refused at the call.
    """
    compares = bool(lookup.compared or lookup.asks_for_flash)
    return routed_as(config, Way(compares, lookup.takes_eager_itself, lookup.compared, past))
