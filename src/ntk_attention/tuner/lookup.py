"""How an attention module of transformers finds its attention function, read off the source of its class.

A module asks `ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)`. Some
also compare that name with others and take another way for it: mask what an indexer left out, cut sequences apart. The
name that such a module finds in its config, a `RoutedName`, equals that of the implementation it had before, and yet
leads to our function. The others find ours, a plain string, which every compiler can read.
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


def lookup_of(cls: Any) -> Lookup | None:
    """How a module class looks its attention function up, by its config's name for it; None if it does not."""
    return _read(cls)


@cache
def _read(cls: Any) -> Lookup | None:
    found: dict[str, Any] | None = None
    compared: set[str] = set()
    replaced: set[str] = set()
    asks_for_flash = False
    for function, tree in functions_of(cls):
        namespace = function.__globals__
        for node in ast.walk(tree):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="get_interface"), args=[key, default]):
                    if name == INTERFACE and ast.unparse(key) == OWN_NAME:
                        eager = namespace.get(ast.unparse(default))
                        found = {"eager": eager, "interface": namespace[INTERFACE], "takes_eager_itself": False}
                case ast.Call(func=ast.Name(id="is_flash_attention_requested")):
                    asks_for_flash = True
                case ast.Subscript(value=ast.Name(id=name), slice=key) if name == INTERFACE:
                    if ast.unparse(key) == OWN_NAME:
                        eager = namespace.get(EAGER)
                        found = {"eager": eager, "interface": namespace[INTERFACE], "takes_eager_itself": True}
                    elif isinstance(key, ast.Constant) and isinstance(key.value, str):
                        replaced.add(key.value)
                case ast.Compare(left=left, comparators=others):
                    if OWN_NAME in map(ast.unparse, [left, *others]):
                        constants = (c for x in [left, *others] for c in ast.walk(x) if isinstance(c, ast.Constant))
                        compared |= {c.value for c in constants if isinstance(c.value, str)}
    if found is None:
        return None
    if found["takes_eager_itself"]:
        compared.discard("eager")
    return Lookup(**found, asks_for_flash=asks_for_flash, compared=frozenset(compared), replaced=frozenset(replaced))


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
    """The config of a routed module: a copy of the model's own, but for the name of the attention function.

    That is read at every call: the user may switch the model between implementations, and the masks change with it.
    """

    ntk_base: Any  # the config that the module had
    ntk_takes_eager_itself: bool
    ntk_compared: frozenset[str]

    @property
    def _attn_implementation(self) -> str:
        implementation = self.ntk_base._attn_implementation
        # The second where Dynamo asks a property instead of reading it (torch 2.11).
        if not torch.compiler.is_compiling() and TracingContext.try_get() is None:
            return routed_name(implementation, self.ntk_takes_eager_itself)
        if implementation in self.ntk_compared:
            raise ValueError(
                f"the attention module compares the name of its implementation with {implementation!r}: expected to "
                "run without torch.compile"
            )
        return ROUTE  # compilers know plain strings only

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        self.ntk_base._attn_implementation = value

    def __reduce_ex__(self, protocol: Any) -> Any:
        return new_routed_config, (type(self.ntk_base),), self.__dict__


def new_routed_config(cls: type) -> Any:
    """An empty one for a class of configs; its attributes come later, in copies and pickles too."""
    routed: Any = routed_class(cls)
    return routed.__new__(routed)


@cache
def routed_class(cls: type) -> type:
    """The one subclass of a class of configs with the name of our function."""
    return type(cls.__name__, (RoutedConfig, cls), {"__module__": cls.__module__})


def routed_config(config: Any, lookup: Lookup) -> Any:
    """A copy of a module's config with which it finds our function."""
    if not (lookup.compared or lookup.asks_for_flash):
        routed = copy.copy(config)
        routed.__dict__.update(_attn_implementation_internal=ROUTE, ntk_base=config)
        return routed
    routed = new_routed_config(type(config))
    routed.__dict__.update(
        config.__dict__,
        ntk_base=config,
        ntk_takes_eager_itself=lookup.takes_eager_itself,
        ntk_compared=lookup.compared,
    )
    return routed
