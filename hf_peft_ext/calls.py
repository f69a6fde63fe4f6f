"""Reads the code of a module's forward: its children in the order of their calls, and weights that it reads itself.

Hooks act on calls. A leaf whose weight is handed to a kernel, as Mamba's `dt_proj`, is no place for one; and the order
in which children are registered says little about the order in which they run (MobileBERT, Bamba).
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

# What may be read of a weight without computing with it.
FACTS = {"dtype", "device", "shape", "ndim", "is_cuda", "requires_grad"}


class Code(NamedTuple):
    """What the forward of a class says, with the methods that it calls.

    Args:
        order: the attributes of the module, by their first use.
        called: those that are called.
        read: those whose `weight` is computed with otherwise.
        words: all names in the code; empty if there is no source.
    """

    order: tuple[str, ...]
    called: frozenset[str]
    read: frozenset[str]
    words: frozenset[str]


@cache
def code_of(cls: type[nn.Module]) -> Code:
    """The code of a class of modules; nothing where there is no source, as for classes of a notebook."""
    reader = Reader(cls)
    reader.follow("forward")
    return Code(tuple(dict.fromkeys(reader.order)), *map(frozenset, (reader.called, reader.read, reader.words)))


def written(cls: type[nn.Module], name: str) -> FunctionType | None:
    """A method as it is written, without decorators, be they some that do not say what they wrap."""
    found: Any = getattr(cls, name, None)
    function = inspect.unwrap(found)
    if not inspect.isfunction(function):
        return None
    if function.__name__ == name:
        return function
    held = (cell.cell_contents for cell in function.__closure__ or ())
    return next((inner for inner in held if inspect.isfunction(inner) and inner.__name__ == name), None)


def parameters(module: nn.Module) -> set[str]:
    """Names of the arguments of a module's forward."""
    function = written(type(module), "forward")
    return set(inspect.signature(function or module.forward).parameters)


class Reader(ast.NodeVisitor):
    """Walks through a forward in the order in which it runs: arguments before the call that takes them."""

    def __init__(self, cls: type[nn.Module]):
        self.cls = cls
        self.order: list[str] = []
        self.called: set[str] = set()
        self.read: set[str] = set()
        self.words: set[str] = set()
        self.followed: set[str] = set()
        self.owner = "self"

    def follow(self, name: str) -> None:
        function = written(self.cls, name)
        if name in self.followed or function is None:
            return
        self.followed.add(name)
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError, SyntaxError):
            return
        owner, self.owner = self.owner, next(iter(function.__code__.co_varnames), "self")
        for statement in tree.body[0].body:  # pyright: ignore[reportAttributeAccessIssue]
            self.visit(statement)
        self.owner = owner

    def visit_Call(self, node: ast.Call) -> None:
        for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
            # isinstance(self.wo.weight, Tensor) computes nothing
            if not (isinstance(node.func, ast.Name) and node.func.id in {"isinstance", "hasattr"}):
                self.visit(argument)
        self.called |= {name} if (name := self.own(node.func)) else set()
        self.visit(node.func)

    def visit_Name(self, node: ast.Name) -> None:
        self.words.add(node.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.words.add(node.attr)
        inner = node.value
        if node.attr in FACTS and isinstance(inner, ast.Attribute) and inner.attr == "weight":
            return
        if name := self.own(node):
            self.order.append(name)
            self.follow(name)
        elif node.attr == "weight" and (name := self.own(inner)):
            self.read.add(name)
        else:
            self.visit(inner)

    def own(self, node: ast.AST) -> str | None:
        """The name of an attribute of the module itself."""
        if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)):
            return None
        return node.attr if node.value.id == self.owner else None


def own_children(module: nn.Module) -> dict[str, nn.Module]:
    """The children of a module, without what tuners have put in."""
    if isinstance(module, BaseTunerLayer):
        return {}
    return {
        name: child
        for name, child in module.named_children()
        if hasattr(child, "base_layer") or not isinstance(child, BaseTunerLayer)
    }


def own_modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """named_modules, without what tuners have put in."""
    yield prefix, module
    for name, child in own_children(module).items():
        yield from own_modules(child, f"{prefix}.{name}" if prefix else name)


def in_order(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """own_modules, in the order in which forwards use them. Those that no forward names come first."""
    yield prefix, module
    places = {name: place for place, name in enumerate(code_of(type(module)).order)}
    for name, child in sorted(own_children(module).items(), key=lambda item: places.get(item[0], -1)):
        yield from in_order(child, f"{prefix}.{name}")


def ends_first(model: nn.Module, start: str, end: str) -> bool:
    """Whether the module at `end` has run when the one at `start` begins, as far as the code tells."""
    ours, theirs = start.split("."), end.split(".")
    common = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if common is None:  # one lies in the other
        return False
    parent = model.get_submodule(".".join(ours[:common]))
    if isinstance(parent, (nn.ModuleList, nn.Sequential)):
        return int(theirs[common]) < int(ours[common])
    order = code_of(type(parent)).order
    known = ours[common] in order and theirs[common] in order
    return known and order.index(theirs[common]) < order.index(ours[common])
