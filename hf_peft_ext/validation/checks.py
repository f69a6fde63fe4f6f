"""Checks of values. Each raises a ValueError that names the field, its value and the rule."""

import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

MAX_SEED = 2**63 - 1  # as torch takes it


def is_number(value: object) -> bool:
    """Whether a value is a finite number; a bool is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


def is_hub_id(name: object) -> bool:
    """Whether a name has the form of a repository's id on the Hub."""
    try:
        validate_repo_id(name)  # pyright: ignore[reportArgumentType]
    except HFValidationError:
        return False
    return bool(name)


def check_count(name: str, value: object) -> None:
    """Raise a ValueError unless the value is a positive whole number."""
    check(name, value, type(value) is int and value > 0, "must be a positive whole number")


def check_positive(name: str, value: object) -> None:
    """Raise a ValueError unless the value is a positive, finite number."""
    check(name, value, is_number(value) and cast(float, value) > 0, "must be a positive number")


def check_seed(value: object) -> None:
    """Raise a ValueError unless `seed` is a whole number that torch takes."""
    check("seed", value, type(value) is int and 0 <= value <= MAX_SEED, f"must be a whole number from 0 to {MAX_SEED}")


def check_dropout(name: str, value: object) -> None:
    """Raise a ValueError unless the value is a number in [0, 1)."""
    check(name, value, is_number(value) and 0 <= cast(float, value) < 1, "must lie in [0, 1)")


def check_names(name: str, value: Sequence[str], allowed: Sequence[str]) -> list[str]:
    """Check a list of names.

    Args:
        name: the field, for the error.
        value: the names.
        allowed: the valid names, each at most once.

    Returns:
        The names as a list.

    Raises:
        ValueError: `value` is a single string or empty, or has an unknown or repeated name.
    """
    check(name, value, not isinstance(value, str), "must be a list of names, not a single string")
    check(name, value, len(value) > 0, "must hold at least one name")
    check(name, value, set(value) <= set(allowed), f"must hold {', '.join(allowed)} only")
    check(name, value, len(set(value)) == len(value), "must hold a name once")
    return list(value)


def check(name: str, value: object, holds: bool, rule: str) -> None:
    """Raise a ValueError that names the field, its value and the rule, unless the rule holds."""
    if not holds:
        raise ValueError(f"`{name}` (={value!r}) {rule}.")


def check_writable(name: str, folder: str | Path, value: object = None) -> None:
    """Check that a folder can be created and written, by doing so: permissions do not show a full or read-only disk.

    Nothing is left behind.

    Args:
        name: the field that names the folder, for the error.
        folder: the folder, which may not exist yet.
        value: the field's value, if it is not the folder.

    Raises:
        ValueError: the folder cannot be created or written.
    """
    path = Path(os.path.abspath(folder))
    existing = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    reason = ""
    try:
        with TemporaryDirectory(dir=existing, prefix=".hf_peft_ext-") as probe:
            Path(probe, path.relative_to(existing)).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"{existing}: {error.strerror}"
    check(name, value or str(folder), not reason, f"must lie where files can be written ({reason})")
