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
from types import UnionType
from typing import Any, ForwardRef, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from huggingface_hub.dataclasses import type_validator

from hf_peft_ext.validation.checks import MAX_SEED

MAX_CONFIG_BYTES = 2**18  # of the file; the longest seen, with a rank for each module, has a tenth of it
MAX_NUMBER = 2**20  # of any number: ranks, widths, layers, token ids, scalings
MAX_PARAMETERS = 2**42  # of `num_values` and `target_size`, which must fit the model when the adapter is attached
MAX_CHARS = 2**15
MAX_ITEMS = 2**12
MAX_NAMES = 64  # of fields whose every entry costs a regular expression for each module
MAX_DEPTH = 5
# peft builds regular expressions from the entries of these fields, so they must be plain names.
NAME_FIELDS = ("modules_to_save", "layers_pattern")
MODULE_NAME = re.compile(r"[\w.\-]{1,256}", re.ASCII)
IGNORED_FIELDS = ("runtime_config",)  # peft 0.21 drops it from a file and does not write it
# Annotated as whole numbers in peft; their readers take any number.
ANY_NUMBER = ("alpha", "lora_alpha")


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file of at most `MAX_CONFIG_BYTES`.

    Raises:
        ValueError: it is not a regular file, too large, or not strict JSON (no NaN, infinity or duplicate key).
    """
    content = read_start(path, MAX_CONFIG_BYTES + 1)
    if len(content) > MAX_CONFIG_BYTES:
        raise ValueError(f"{path} is longer than {MAX_CONFIG_BYTES} bytes.")
    return parse_json(content, str(path))


def read_start(path: str | Path, length: int) -> bytes:
    """The first bytes of a file.

    Raises:
        ValueError: it is not a regular file, or cannot be read.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} is not a file.")
    try:
        with open(path, "rb") as file:
            return file.read(length)
    except OSError as error:  # such as a link into /proc
        raise ValueError(f"{path} cannot be read: {error}.") from error


def parse_json(content: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `content`; `what` names it in errors. Raises as `read_json`."""

    def refuse_constant(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a number")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            raise ValueError("duplicate key")
        return entries

    try:
        value = json.loads(content, parse_constant=refuse_constant, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError too
        raise ValueError(f"{what} is not strict JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{what} must hold one JSON object.")
    return value


def known_fields(config_cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config file, checked against the fields of its class.

    Other versions of peft and of this package have more fields. An unknown field is left out if it is not used:
    silently if it is null or empty, with a warning if it is false, which may not be its default.

    Raises:
        ValueError: a field is unknown, or its value has another type, is too large, or is not a finite number.
    """
    of_config, hints = {f.name: f for f in fields(config_cls)}, type_hints(config_cls)
    stated = {k: v for k, v in values.items() if k not in IGNORED_FIELDS and (k in of_config or says_something(k, v))}
    unused = sorted(k for k, v in stated.items() if k not in of_config and v is False)
    if unused:
        what = f"`{'`, `'.join(unused)}` (=False) are no fields of {config_cls.__name__}"
        warnings.warn(f"{what} and were left out; the adapter may be of a later version.", stacklevel=2)
    stated = {k: v for k, v in stated.items() if k not in unused}
    for name, value in stated.items():
        if name not in of_config:
            refuse(name, value, f"is not a field of {config_cls.__name__}")
        check_size(name, value, largest=largest_number(name))
        is_any_number = name in ANY_NUMBER and fits(value, float)
        if not (fits(value, hints[name]) or is_default(value, of_config[name]) or is_any_number):
            refuse(name, value, f"must be of type {type_name(hints[name])}")
        if name.endswith("dropout") and not 0 <= value < 1:
            refuse(name, value, "must lie in [0, 1)")
        if name in NAME_FIELDS and value is not None:
            check_module_names(name, [value] if isinstance(value, str) else value)
    return stated


def says_something(name: str, value: Any) -> bool:
    """Whether the value of an unknown field is more than null or empty."""
    return name not in IGNORED_FIELDS and not (value is None or value in ("", [], {}))


def check_module_names(name: str, entries: Sequence[str]) -> None:
    """Refuse entries that are not plain names, or too many of them."""
    if len(entries) > MAX_NAMES:
        refuse(name, entries, f"must have at most {MAX_NAMES} entries")
    for entry in entries:
        if entry and not MODULE_NAME.fullmatch(entry):
            refuse(name, entry, "must name modules by letters, digits, '_', '-' and '.'")


def type_name(hint: Any) -> str:
    """A type as its annotation is written."""
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "").replace("NoneType", "None")


@cache
def type_hints(config_cls: type) -> dict[str, Any]:
    """Field -> type, resolved once for each class."""
    return get_type_hints(config_cls)


def is_default(value: Any, field: Field[Any]) -> bool:
    """Whether a value is the field's default; peft's defaults do not always have the type of their field."""
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return type(value) is type(default) and value == default


def largest_number(name: str) -> int:
    """The largest number that a field may have."""
    if name in ("num_values", "target_size"):
        return MAX_PARAMETERS
    return MAX_SEED if name.endswith(("seed", "prng_key")) else MAX_NUMBER


def check_size(name: str, value: Any, depth: int = 0, largest: int = MAX_NUMBER) -> None:
    """Refuse values, nested ones included, that are larger than an adapter needs."""
    if isinstance(value, (int, float)):
        if not abs(value) <= largest:  # refuses NaN as well
            refuse(name, value, f"must be a finite number of at most {largest}")
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
    """Whether a value from JSON or YAML has a type, by huggingface_hub's `type_validator`.

    Containers and choices are handled here, since JSON has fewer types: a list fits a sequence or tuple, an object
    fits a dataclass with such fields, a value fits its enum, a whole number fits `float`, but 1.0 is not the choice 1.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is Literal:
        return any(type(value) is type(arg) and value == arg for arg in args)
    if origin in (list, Sequence, tuple):
        if not isinstance(value, list):
            return False
        hints = args if origin is tuple else args * len(value)
        return len(value) == len(hints) and all(map(fits, value, hints))
    if origin is dict or is_dataclass(hint):
        if not isinstance(value, dict):
            return False
        hints = dict.fromkeys(value, args[1]) if args else type_hints(hint)
        return all(key in hints and fits(value[key], hints[key]) for key in value)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return isinstance(value, str) and value in [member.value for member in hint]
    if isinstance(hint, (str, ForwardRef)):
        return False  # not resolved; `type_validator` would accept any value
    try:
        type_validator("value", value, int if hint is float and type(value) is int else hint)
    except TypeError:
        return False
    return True


def refuse(name: str, value: Any, rule: str) -> NoReturn:
    """Raise a ValueError that names the field, the value, shortened, and the rule."""
    raise ValueError(f"`{name[:64]}` (={reprlib.repr(value)}) {rule}.")
