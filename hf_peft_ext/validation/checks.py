"""Checks of values. Each raises a ValueError that names the field, its value and the rule."""

from collections.abc import Sequence
from typing import cast


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


def check_count(name: str, value: object) -> None:
    check(name, value, type(value) is int and value > 0, "must be a positive whole number")


def check_positive(name: str, value: object) -> None:
    check(name, value, is_number(value) and cast(float, value) > 0, "must be a positive number")


def check_dropout(name: str, value: object) -> None:
    check(name, value, is_number(value) and 0 <= cast(float, value) < 1, "must lie in [0, 1)")


def check_names(name: str, value: Sequence[str], known: Sequence[str], empty: bool = False) -> list[str]:
    """A list of names out of `known`, each at most once; raises otherwise."""
    check(name, value, not isinstance(value, str), "must be a list of names, not a single string")
    check(name, value, empty or len(value) > 0, "must hold at least one name")
    check(name, value, set(value) <= set(known), f"must hold {', '.join(known)} only")
    check(name, value, len(set(value)) == len(value), "must hold a name once")
    return list(value)


def check(name: str, value: object, holds: bool, rule: str) -> None:
    """Raise a ValueError that names the field, its value and the rule."""
    if not holds:
        raise ValueError(f"`{name}` (={value!r}) {rule}.")
