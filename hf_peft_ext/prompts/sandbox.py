"""Jinja for prompts: it reads the fields of a row, and can do nothing else.

Templates come from strangers. A part of Jinja is let through: texts, `{{ fields }}`, their items and slices, a few
filters, tests, comparisons, `if` and `for`. There are no calls, so no code runs; there is no arithmetic, nor a way to
name a value, so nothing grows out of bounds unseen. What is let through runs in Jinja's immutable sandbox.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import StrictUndefined, TemplateError, Undefined, UndefinedError, meta, nodes, pass_context
from jinja2.filters import FILTERS
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SOURCE = 10_000  # characters of a template
MAX_TEXT = 1_000_000  # characters of what it renders, or of what a filter makes
MAX_PASSES = 1_000  # through all loops of a template, together
PASSES = "passes so far"  # kept beside the fields, under a name that no template can spell

ALLOWED = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.Name, nodes.Const, nodes.List, nodes.Tuple),
    *(nodes.Dict, nodes.Pair),
    *(nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.Filter, nodes.Test, nodes.Keyword, nodes.Neg),
    *(nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.CondExpr, nodes.If, nodes.For),
)


def join(values: Any, separator: str = "") -> str:
    """Texts in a row. Unlike Jinja's own, it refuses to print what is not a text or a number."""
    texts = [printed(value) for value in values]
    bounded(sum(map(len, texts)) + len(separator) * len(texts))
    return separator.join(texts)


def replace(text: str, old: str, new: str) -> str:
    """`str.replace` with a limit on the length of the result."""
    bounded(len(text) + text.count(old) * len(new))
    return text.replace(old, new)


def rstrip(text: str, characters: str | None = None) -> str:
    """`str.rstrip`, which Jinja has no filter for."""
    return text.rstrip(characters)


@pass_context
def counted(context: Context, values: Any) -> Iterator[Any]:
    """What a loop goes through, each pass counted. Put around it by `parse`; templates cannot call it themselves."""
    for value in values:
        if next(context[PASSES]) > MAX_PASSES:
            raise ValueError(f"its loops are gone through more than {MAX_PASSES:,} times")
        yield value


def bounded(length: int) -> None:
    """Refuse a text that would have more than `MAX_TEXT` characters.

    Raises:
        ValueError: `length` is larger than that.
    """
    if length > MAX_TEXT:
        raise ValueError(f"it makes a text of more than {MAX_TEXT:,} characters")


def printed(value: Any) -> Any:
    """What `{{ value }}` may be: a text or a number. None, lists and methods are slips that nobody would notice."""
    if isinstance(value, str | int | float | Undefined):
        return str(value)
    raise TypeError(f"it prints a {type(value).__name__}; only texts and numbers can be printed")


class Sandbox(ImmutableSandboxedEnvironment):
    """Fields of a mapping come before its methods: `{{ row.items }}` is the field."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        """The item of a mapping with this name, or else the attribute."""
        if isinstance(obj, Mapping) and attribute in obj:
            return obj[attribute]
        return super().getattr(obj, attribute)


ENVIRONMENT = Sandbox(undefined=StrictUndefined, finalize=printed, autoescape=False, keep_trailing_newline=True)
ENVIRONMENT.globals = {}
OWN: dict[str, Callable[..., Any]] = {"join": join, "replace": replace, "rstrip": rstrip}
TAKEN = ("trim", "lower", "upper", "capitalize", "title", "first", "last", "length", "default", "truncate")
ENVIRONMENT.filters = {**{name: FILTERS[name] for name in TAKEN}, **OWN}
ENVIRONMENT.filters["passes counted"] = counted


@lru_cache(maxsize=1024)
def parse(source: str) -> tuple[Any, frozenset[str]]:
    """A Jinja text as a compiled template, and the names of the fields that it reads.

    Raises:
        ValueError: it is too long, is no Jinja, or holds what prompts may not hold. The message is the end of a
            sentence that begins with whose text it is.
    """
    if len(source) > MAX_SOURCE:
        raise ValueError(f"must have at most {MAX_SOURCE:,} characters, not {len(source):,}")
    try:
        tree = ENVIRONMENT.parse(source)
        for node in list(tree.find_all(nodes.Node)):
            check_node(node)
        fields = frozenset(meta.find_undeclared_variables(tree))
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, "passes counted", [], [], None, None, lineno=loop.lineno)
        return ENVIRONMENT.from_string(tree), fields
    except TemplateError as error:
        raise ValueError(f"is not valid Jinja: {error} (line {getattr(error, 'lineno', 1)})") from error
    except (RecursionError, SyntaxError, MemoryError) as error:  # of Python, for what Jinja has made of it
        raise ValueError("is nested too deeply") from error


def check_node(node: nodes.Node) -> None:
    """Raise a ValueError unless prompts may hold this part of Jinja."""

    def refuse(what: str) -> NoReturn:
        raise ValueError(f"must not hold {what} (line {node.lineno})")

    if not isinstance(node, ALLOWED):
        refuse(f"Jinja's {type(node).__name__}: no calls, arithmetic, assignments, macros or imports")
    if isinstance(node, nodes.Filter) and node.name not in (*TAKEN, *OWN):
        refuse(f"the filter {node.name!r}; it may hold {', '.join((*TAKEN, *OWN))}")
    if isinstance(node, nodes.For) and node.recursive:
        refuse("a recursive loop")
    if isinstance(node, nodes.Getattr) and node.attr.startswith("_"):
        refuse(f"{node.attr!r}, the inside of an object")


def render(source: str, row: Mapping[str, Any]) -> str:
    """The text that a Jinja text makes of a row.

    Raises:
        ValueError: as of `parse`; or it fails on this row, or reaches a limit. The message is the end of a sentence.
    """
    template, _ = parse(source)
    texts, length = [], 0
    try:
        for text in template.generate({**row, PASSES: itertools.count(1)}):
            length += len(text)
            bounded(length)
            texts.append(text)
    except UndefinedError as error:
        fields = ", ".join(map(str, row)) or "none"
        raise ValueError(f"cannot be rendered: {error.message}; the row has the fields {fields}") from error
    except Exception as error:  # whatever a stranger's template makes of a stranger's row
        raise ValueError(f"cannot be rendered: {str(error) or type(error).__name__}") from error
    return "".join(texts)
