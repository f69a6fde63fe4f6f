"""A restricted Jinja for prompts: templates may only read the fields of a row.

Templates may be untrusted. Allowed are texts, `{{ fields }}`, their items and slices, a few filters, tests,
comparisons, `if` and `for`. Without calls no code runs. Without arithmetic and assignments sizes stay bounded.
Templates run in Jinja's immutable sandbox.
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
MAX_TEXT = 1_000_000  # characters of a rendered template, or of a filter's result
MAX_PASSES = 1_000  # of all loops of a template together
PASSES = "passes so far"  # stored with the fields; templates cannot name it, because it has spaces

ALLOWED = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.Name, nodes.Const, nodes.List, nodes.Tuple),
    *(nodes.Dict, nodes.Pair),
    *(nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.Filter, nodes.Test, nodes.Keyword, nodes.Neg),
    *(nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.CondExpr, nodes.If, nodes.For),
)


def join(values: Any, separator: str = "") -> str:
    """Jinja's filter `join`, for texts and numbers only.

    Raises:
        TypeError: a value is neither text nor number.
        ValueError: the result is too long.
    """
    texts = [printed(value) for value in values]
    check_length(sum(map(len, texts)) + len(separator) * len(texts))
    return separator.join(texts)


def replace(text: str, old: str, new: str) -> str:
    """The filter `replace`.

    Raises:
        ValueError: the result is too long.
    """
    check_length(len(text) + text.count(old) * len(new))
    return text.replace(old, new)


def rstrip(text: str, characters: str | None = None) -> str:
    """The filter `rstrip`: remove white space, or these characters, from the end."""
    return text.rstrip(characters)


@pass_context
def counted(context: Context, values: Any) -> Iterator[Any]:
    """The values of a loop, whose passes are counted. `parse` adds it to each loop; templates cannot call it.

    Raises:
        ValueError: all loops of the template together have too many passes.
    """
    for value in values:
        if next(context[PASSES]) > MAX_PASSES:
            raise ValueError(f"its loops have more than {MAX_PASSES:,} passes")
        yield value


def check_length(length: int) -> None:
    """Refuse texts of more than `MAX_TEXT` characters.

    Raises:
        ValueError: the text is longer.
    """
    if length > MAX_TEXT:
        raise ValueError(f"its text has more than {MAX_TEXT:,} characters")


def printed(value: Any) -> Any:
    """The text of `{{ value }}`. Only texts and numbers are printed; None, lists and methods are usually mistakes.

    Raises:
        TypeError: the value is neither text nor number.
    """
    if isinstance(value, str | int | float | Undefined):
        return str(value)
    raise TypeError(f"it prints a {type(value).__name__}; only texts and numbers can be printed")


class Sandbox(ImmutableSandboxedEnvironment):
    """A sandbox in which fields of a mapping precede its methods: `{{ row.items }}` is the field."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        """The field or attribute of an object."""
        if isinstance(obj, Mapping) and attribute in obj:
            return obj[attribute]
        return super().getattr(obj, attribute)


ENVIRONMENT = Sandbox(undefined=StrictUndefined, finalize=printed, autoescape=False, keep_trailing_newline=True)
ENVIRONMENT.globals = {}
OWN: dict[str, Callable[..., Any]] = {"join": join, "replace": replace, "rstrip": rstrip}
JINJA_FILTERS = ("trim", "lower", "upper", "capitalize", "title", "first", "last", "length", "default", "truncate")
ENVIRONMENT.filters = {**{name: FILTERS[name] for name in JINJA_FILTERS}, **OWN}
ENVIRONMENT.filters["passes counted"] = counted


@lru_cache(maxsize=1024)
def parse(source: str) -> tuple[Any, frozenset[str]]:
    """Compile a template, and find the names of the fields that it reads.

    Raises:
        ValueError: it is too long, is not valid Jinja, or uses a part of Jinja that is not allowed. The message is a
            sentence without its subject.
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
    except (RecursionError, SyntaxError, MemoryError) as error:  # from Python, when it compiles Jinja's code
        raise ValueError("is nested too deeply") from error


def check_node(node: nodes.Node) -> None:
    """Refuse parts of Jinja that are not allowed.

    Raises:
        ValueError: the node is not allowed.
    """

    def refuse(part: str) -> NoReturn:
        raise ValueError(f"must not hold {part} (line {node.lineno})")

    if not isinstance(node, ALLOWED):
        refuse(f"Jinja's {type(node).__name__}: no calls, arithmetic, assignments, macros or imports")
    if isinstance(node, nodes.Filter) and node.name not in (*JINJA_FILTERS, *OWN):
        refuse(f"the filter {node.name!r}; it may hold {', '.join((*JINJA_FILTERS, *OWN))}")
    if isinstance(node, nodes.For) and node.recursive:
        refuse("a recursive loop")
    if isinstance(node, nodes.Getattr) and node.attr.startswith("_"):
        refuse(f"{node.attr!r}, a private attribute")


def render(source: str, row: Mapping[str, Any]) -> str:
    """Render a template with the fields of a row.

    Raises:
        ValueError: see `parse`; or rendering fails on this row, or exceeds a limit. The message is a sentence without
            its subject.
    """
    template, _ = parse(source)
    texts, length = [], 0
    try:
        for text in template.generate({**row, PASSES: itertools.count(1)}):
            length += len(text)
            check_length(length)
            texts.append(text)
    except UndefinedError as error:
        fields = ", ".join(map(str, row)) or "none"
        raise ValueError(f"cannot be rendered: {error.message}; the row has the fields {fields}") from error
    except Exception as error:  # untrusted templates and rows can cause any error
        raise ValueError(f"cannot be rendered: {str(error) or type(error).__name__}") from error
    return "".join(texts)
