"""Checks that a folder can be written, by writing: permissions do not show a full or read-only disk."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from hf_peft_ext.validation.checks import check


def check_writable(name: str, folder: str | Path, value: object = None) -> None:
    """Check that a folder can be created and written. Nothing is left behind.

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
