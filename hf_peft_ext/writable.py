"""Whether a folder can be written, found out by writing: permissions say nothing of a full or read-only disk."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from .placement import check


def check_writable(name: str, folder: str | Path, value: object = None) -> None:
    """Raise where a folder cannot be made, or nothing can be written in it. It is not made, and nothing is left.

    Args:
        name: the field that names the folder, for the error.
        folder: need not be there.
        value: what the field holds, where that is not the folder.

    Raises:
        ValueError: it cannot be written.
    """
    path = Path(os.path.abspath(folder))
    there = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    reason = ""
    try:
        with TemporaryDirectory(dir=there, prefix=".hf_peft_ext-") as probe:
            Path(probe, path.relative_to(there)).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"{there}: {error.strerror}"
    check(name, value or str(folder), not reason, f"must lie where files can be written ({reason})")
