"""Reads the code of a module's forward: its children in the order of their calls, and weights that it reads itself.

Hooks act on calls. A leaf whose weight is handed to a kernel, such as Mamba's `dt_proj`, is no place for one, and
neither is a leaf that may never be called. The order in which children are registered says little about the order in
which they run (MobileBERT, Bamba).
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from types import FunctionType
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

# Attributes of a weight that are read without computing with it.
FACTS = {"dtype", "device", "shape", "ndim", "is_cuda", "requires_grad"}


def written(cls: type[nn.Module], name: str) -> FunctionType | None:
    """A method of a class without its decorators, also those without `functools.wraps`."""
    method: Any = getattr(cls, name, None)
    function = inspect.unwrap(method)
    if not inspect.isfunction(function):
        return None
    if function.__name__ == name:
        return function
    enclosed = (cell.cell_contents for cell in function.__closure__ or ())
    return next((inner for inner in enclosed if inspect.isfunction(inner) and inner.__name__ == name), None)


def parameters(module: nn.Module) -> set[str]:
    """Names of the arguments of a module's forward."""
    function = written(type(module), "forward")
    return set(inspect.signature(function or module.forward).parameters)


class Code(ast.NodeVisitor):
    """The names in the forward of a class and in the methods that it calls, read in the order of execution.

    Args:
        cls: the class of the module.
    """

    def __init__(self, cls: type[nn.Module]):
        self.cls = cls
        self.order: dict[str, int] = {}  # the attributes of the module -> their places, by their first use
        self.called: set[str] = set()  # those that are called
        self.read: set[str] = set()  # those whose `weight` is read without a call of the module
        # Lists of modules of which each forward runs one, chosen by the caller: `self.adapters[i](x)` with an `i` from
        # outside. Zamba2's blocks have an adapter for every layer and run only their own.
        self.picked: set[str] = set()
        self.words: set[str] = set()  # all names in the code; empty if there is no source
        self.followed: set[str] = set()
        self.owner = "self"
        self.looped: set[str] = set()  # variables of the current method that may change from call to call
        self.follow("forward")

    def follow(self, name: str) -> None:
        """Read a method of the class, unless it was read before."""
        function = written(self.cls, name)
        if name in self.followed or function is None:
            return
        self.followed.add(name)
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError, SyntaxError):
            return
        before = self.owner, self.looped
        arguments = function.__code__.co_varnames[: function.__code__.co_argcount]
        self.owner = next(iter(function.__code__.co_varnames), "self")
        self.looped = set(arguments) if name != "forward" else set()  # a method may be called in a loop
        for statement in tree.body[0].body:  # pyright: ignore[reportAttributeAccessIssue]
            self.visit(statement)
        self.owner, self.looped = before

    def visit_Call(self, node: ast.Call) -> None:
        for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
            # isinstance(self.wo.weight, Tensor) computes nothing
            if not (isinstance(node.func, ast.Name) and node.func.id in {"isinstance", "hasattr"}):
                self.visit(argument)
        self.called |= {name} if (name := self.own(node.func)) else set()
        if isinstance(node.func, ast.Subscript) and (name := self.own(node.func.value)):
            names = {part.id for part in ast.walk(node.func.slice) if isinstance(part, ast.Name)}
            self.picked |= {name} if names and names.isdisjoint(self.looped) else set()
        self.visit(node.func)

    def visit_For(self, node: ast.For) -> None:
        self.visit_loop(node)

    def visit_While(self, node: ast.While) -> None:
        self.visit_loop(node)

    def visit_ListComp(self, node: ast.ListComp) -> None:
        self.visit_loop(node)

    def visit_loop(self, node: ast.AST) -> None:
        """A loop: every variable that is set in it may change."""
        before = self.looped
        stored = (part for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store))
        self.looped = before | {part.id for part in stored}
        self.generic_visit(node)
        self.looped = before

    def visit_Name(self, node: ast.Name) -> None:
        self.words.add(node.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.words.add(node.attr)
        inner = node.value
        if node.attr in FACTS and isinstance(inner, ast.Attribute) and inner.attr == "weight":
            return
        if name := self.own(node):
            self.order.setdefault(name, len(self.order))
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


@cache
def code_of(cls: type[nn.Module]) -> Code:
    """The code of a class of modules; empty where there is no source, as for classes of a notebook."""
    return Code(cls)


def own_children(module: nn.Module) -> dict[str, nn.Module]:
    """The children of a module, without those that tuners have added."""
    if isinstance(module, BaseTunerLayer):
        return {}
    return {
        name: child
        for name, child in module.named_children()
        if hasattr(child, "base_layer") or not isinstance(child, BaseTunerLayer)
    }


def own_modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """`named_modules`, without the modules that tuners have added."""
    yield prefix, module
    for name, child in own_children(module).items():
        yield from own_modules(child, f"{prefix}.{name}" if prefix else name)


def in_order(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """`own_modules` in the order in which forwards use them; those that no forward names come first."""
    yield prefix, module
    places = code_of(type(module)).order
    for name, child in sorted(own_children(module).items(), key=lambda item: places.get(item[0], -1)):
        yield from in_order(child, f"{prefix}.{name}")


def ends_first(model: nn.Module, start: str, end: str) -> bool:
    """Whether the module at `end` runs before the one at `start`; False where the code does not show it."""
    ours, theirs = start.split("."), end.split(".")
    common = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if common is None:  # one is inside the other
        return False
    parent = model.get_submodule(".".join(ours[:common]))
    if isinstance(parent, (nn.ModuleList, nn.Sequential)):
        return int(theirs[common]) < int(ours[common])
    order = code_of(type(parent)).order
    both = ours[common] in order and theirs[common] in order
    return both and order[theirs[common]] < order[ours[common]]
