"""Reads and writes dataclasses as JSON, which has no NaN and no infinities."""

from dataclasses import MISSING, fields, is_dataclass
from math import isfinite, nan
from typing import Any, get_args, get_origin

from hf_peft_ext.validation.checks import check
from hf_peft_ext.validation.config_schema import fits, refuse, type_hints


def without_nan(value: Any) -> Any:
    """A copy of JSON-like data with None in place of NaN and infinities."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def read_as(kind: Any, value: Any, file: str, name: str = "") -> Any:
    """Convert parsed JSON into a field's type; dataclasses may be nested in lists.

    Args:
        kind: the type.
        value: what `json.loads` returned.
        file: the file's name, for errors.
        name: the field's name, for errors; "" for the whole file.

    Raises:
        ValueError: the value has another type, or a field of a dataclass is unknown or missing.
    """
    of = next(iter(get_args(kind)), None)
    if is_dataclass(of) and isinstance(value, list):
        return [read_as(of, entry, file, f"{name}[{i}]") for i, entry in enumerate(value)]
    if not (isinstance(kind, type) and is_dataclass(kind)):
        value = with_nan(kind, value)
        if not fits(value, kind):
            refuse(name, value, f"in {file} must be of type {getattr(kind, '__name__', kind)}")
        return value
    check(name or file, value, isinstance(value, dict), "must hold one JSON object")
    names = {f.name for f in fields(kind)}
    unknown = sorted(set(value) - names)
    check(name or file, unknown, not unknown, f"has fields that are not among {', '.join(sorted(names))}")
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    missing = [field for field in needed if field not in value]
    check(name or file, missing, not missing, "must be there")
    inside, hints = f"{name}." if name else "", type_hints(kind)
    return kind(**{key: read_as(hints[key], entry, file, f"{inside}{key}") for key, entry in value.items()})


def with_nan(kind: Any, value: Any) -> Any:
    """The value with NaN where `without_nan` has put None in place of a number."""
    if kind is float:
        return nan if value is None else value
    of = get_args(kind)
    if get_origin(kind) is list and isinstance(value, list):
        return [with_nan(of[0], item) for item in value]
    if get_origin(kind) is dict and isinstance(value, dict):
        return {key: with_nan(of[1], item) for key, item in value.items()}
    return value
