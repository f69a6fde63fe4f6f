"""Checks an adapter_config.json against the fields of its config class: known keys, their types, sizes within caps."""

import json
import re
import reprlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

MAX_BYTES = 2**18  # of the file; the longest seen, with a rank for each module, is a tenth of it
MAX_NUMBER = 2**20  # of any number: ranks, widths, layers, token ids, scalings
MAX_CHARS = 2**15
MAX_ITEMS = 2**12
MAX_NAMES = 64  # of fields whose every entry costs a regular expression for each module
MAX_DEPTH = 5
# peft puts the entries of these into regular expressions of its own, so they must be names.
NAMES = ("modules_to_save", "layers_pattern")
NAME = re.compile(r"[\w.\-]{1,256}", re.ASCII)
IGNORED = ("runtime_config",)  # peft 0.21 takes it out when it reads a file, and does not write it
# Annotated as whole numbers in peft, though their readers take any.
ANY_NUMBER = ("alpha", "lora_alpha")


def read_json(path: str | Path, limit: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes.

    Raises:
        ValueError: it is no ordinary file, too large, or not strict JSON: NaN, infinities and repeated keys are not.
    """
    content = read_start(path, limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path} is longer than {limit} bytes.")
    return parse_json(content, str(path))


def read_start(path: str | Path, length: int) -> bytes:
    """The first bytes of a file.

    Raises:
        ValueError: it is no ordinary file, or cannot be read.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} is not a file.")
    try:
        with open(path, "rb") as file:
            return file.read(length)
    except OSError as error:  # a link to something that only looks like a file
        raise ValueError(f"{path} cannot be read: {error}.") from error


def parse_json(content: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `content`; `what` names it in errors. Raises as `read_json`."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a number")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key stands there twice")
        return found

    try:
        value = json.loads(content, parse_constant=refuse, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError too
        raise ValueError(f"{what} is not strict JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{what} must hold one JSON object.")
    return value


def known_fields(config_cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says, checked against the fields of a config class.

    Other versions of peft and of this package have more fields. One that is no field here is left out where it is not
    used: silently if it is null or empty, with a warning if it is false, which may be another value than its default.

    Raises:
        ValueError: a key is no field, or its value has another type, is too large, or is no finite number.
    """
    known, hints = {f.name: f for f in fields(config_cls)}, type_hints(config_cls)
    said = {k: v for k, v in given.items() if k not in IGNORED and (k in known or says_something(k, v))}
    unused = sorted(k for k, v in said.items() if k not in known and v is False)
    if unused:
        what = f"`{'`, `'.join(unused)}` (=False) are no fields of {config_cls.__name__}"
        warnings.warn(f"{what} and were left out; the adapter may be of a later version.", stacklevel=2)
    said = {k: v for k, v in said.items() if k not in unused}
    for name, value in said.items():
        if name not in known:
            refuse(name, value, f"is not a field of {config_cls.__name__}")
        check_size(name, value)
        if not (fits(value, hints[name]) or is_default(value, known[name])):
            number = name in ANY_NUMBER and fits(value, float)
            if not number:
                refuse(name, value, f"must be of type {type_name(hints[name])}")
        if name.endswith("dropout") and not 0 <= value < 1:
            refuse(name, value, "must lie in [0, 1)")
        if name in NAMES and value is not None:
            entries = [value] if isinstance(value, str) else value
            if len(entries) > MAX_NAMES:
                refuse(name, value, f"must have at most {MAX_NAMES} entries")
            for entry in entries:
                if entry and not NAME.fullmatch(entry):
                    refuse(name, entry, "must name modules by letters, digits, '_', '-' and '.'")
    return said


def says_something(name: str, value: Any) -> bool:
    """Whether a field that is not known holds more than null or nothing."""
    return name not in IGNORED and not (value is None or value in ("", [], {}))


def type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "").replace("NoneType", "None")


@cache
def type_hints(config_cls: type) -> dict[str, Any]:
    return get_type_hints(config_cls)


def is_default(value: Any, field: Field[Any]) -> bool:
    """peft's defaults do not always have the type of their field."""
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return type(value) is type(default) and value == default


def check_size(name: str, value: Any, depth: int = 0) -> None:
    """Refuse values, nested ones too, that are larger than an adapter needs."""
    if isinstance(value, (int, float)):
        if not abs(value) <= MAX_NUMBER:  # neither is NaN
            refuse(name, value, f"must be a finite number of at most {MAX_NUMBER}")
    elif isinstance(value, str):
        if len(value) > MAX_CHARS:
            refuse(name, value, f"must have at most {MAX_CHARS} characters")
    elif isinstance(value, (dict, list)):
        if len(value) > MAX_ITEMS or depth == MAX_DEPTH:
            refuse(name, value, f"must have at most {MAX_ITEMS} entries and {MAX_DEPTH} levels")
        entries = [*value, *value.values()] if isinstance(value, dict) else value
        for entry in entries:
            check_size(name, entry, depth + 1)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value out of JSON is of a Python type. A list stands for any sequence, an object for a dataclass."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if hint in (None, NoneType):
        return value is None
    if origin in (Union, UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is Literal:
        return any(type(value) is type(arg) and value == arg for arg in args)
    if origin in (list, Sequence):
        return isinstance(value, list) and all(fits(entry, args[0]) for entry in value)
    if origin is tuple:
        return isinstance(value, list) and len(value) == len(args) and all(map(fits, value, args))
    if origin is dict:
        return isinstance(value, dict) and all(fits(entry, args[1]) for entry in value.values())
    if is_dataclass(hint):
        hints = type_hints(hint) if isinstance(hint, type) else {}
        return isinstance(value, dict) and all(key in hints and fits(value[key], hints[key]) for key in value)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return isinstance(value, str) and value in [member.value for member in hint]
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint


def refuse(name: str, value: Any, rule: str) -> NoReturn:
    """Raise a ValueError that names the field, the value, shortened, and the rule."""
    raise ValueError(f"`{name[:64]}` (={reprlib.repr(value)}) {rule}.")
