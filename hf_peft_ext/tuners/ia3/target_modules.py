"""Names modules as peft's configs do: by a list of endings where that is exact, else by a regular expression."""

import re
from collections.abc import Iterable, Iterator, Sequence

Ending = tuple[str, ...]  # its parts, each a regular expression


def module_names(groups: Sequence[Sequence[str]], others: Iterable[str]) -> Sequence[set[str] | str]:
    """What selects the modules of each group and no others: endings for all groups, or an expression for each.

    Layer numbers are left open wherever that is exact, so that a deep model needs no more names than a shallow one.

    Args:
        groups: paths of modules; no module is in two groups.
        others: the paths of the model that are in no group.
    """
    everything = {*others, *(path for group in groups for path in group)}
    found = [shortest_endings(group, everything - set(group)) for group in groups]
    if all(part == re.escape(part) for endings in found for ending in endings for part in ending):
        plain = [{".".join(ending) for ending in endings} for endings in found]
        # in (IA)^3, peft compares `feedforward_modules` letter by letter: "proj" would be an ending of "k_proj" too
        mixed = (path.endswith(tuple(names)) for i, names in enumerate(plain) for j, group in enumerate(groups)
                 for path in group if i != j)  # fmt: skip
        if not any(mixed):
            return plain
    return [expression(endings) if endings else set() for endings in found]


def either(names: Sequence[set[str] | str]) -> set[str] | str:
    """What selects the modules of all groups of `module_names`."""
    expressions = [name for name in names if isinstance(name, str)]
    return "|".join(expressions) if expressions else set().union(*names)


def shortest_endings(paths: Sequence[str], others: Iterable[str]) -> list[Ending]:
    """The shortest endings that select the paths and none of the others."""
    alike: dict[Ending, list[str]] = {}
    for path in paths:
        alike.setdefault(opened(path), []).append(path)
    found: dict[Ending, None] = {}
    for group in alike.values():
        exact = (ending for ending in candidates(group) if not selects_any(ending, others))
        ending = next(exact, None)
        found |= dict.fromkeys([ending] if ending else [tuple(map(re.escape, path.split("."))) for path in group])
    return list(found)


def opened(path: str) -> Ending:
    """The path with its numbers left open."""
    return tuple(r"\d+" if part.isdigit() else re.escape(part) for part in path.split("."))


def candidates(paths: list[str]) -> Iterator[Ending]:
    """Endings of paths that differ in their numbers only, the shortest first: with any number, then with their own."""
    columns = [list(dict.fromkeys(column)) for column in zip(*(path.split(".") for path in paths), strict=True)]
    own = tuple(re.escape(c[0]) if len(c) == 1 else f"({'|'.join(sorted(c, key=int))})" for c in columns)
    for length in range(1, len(own) + 1):
        yield opened(paths[0])[-length:]
        yield own[-length:]


def selects_any(ending: Ending, paths: Iterable[str]) -> bool:
    pattern = re.compile(expression([ending]))
    return any(pattern.fullmatch(path) for path in paths)


def expression(endings: Sequence[Ending]) -> str:
    """The endings as one regular expression for whole paths."""
    each = [r"\.".join(ending) for ending in endings]
    return rf"(.*\.)?({'|'.join(each)})"
