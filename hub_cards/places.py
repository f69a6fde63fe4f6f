"""What a published record leaves out of paths: the folders of one machine, which tell who its user is."""

import os
import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub.utils import yaml_dump

PART = r"[^\s/\\'\",;:=()\[\]{}<>|]+"
# An absolute path among other text; a slash of an address (https://...) or between words (and/or) begins none.
POSIX = re.compile(rf"(?<![\w/\\.~}}\]>-])(?:~[\w.-]*[/\\]|/(?=\w{PART}/))(?:{PART}/)*(?:{PART})?")
WINDOWS = re.compile(rf"(?<![\w/\\])(?:[A-Za-z]:[/\\]|\\\\(?={PART}\\))(?:{PART}[/\\])*(?:{PART})?")
FILE = re.compile(r"\b(file|sqlite(?:\+\w+)?):///+(?=\S)")  # what follows is a path
WHOLE = re.compile(r"(--?[\w.-]+=|[\w.-]+=)?(?:~[\w.-]*/|/|[A-Za-z]:[/\\]|\\\\)")


def without_places(value: Any) -> Any:
    """A copy of JSON-like data in which absolute paths are relative to where the run was, or, outside of it, names."""
    if isinstance(value, dict):
        return {without_places(key): without_places(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_places(item) for item in value]
    return in_text(value) if isinstance(value, str) else value


def shared_recipe(recipe: Any) -> bytes:
    """A recipe as it is published: YAML without local paths."""
    return yaml_dump(without_places(recipe), sort_keys=False).encode()


def in_text(text: str) -> str:
    """The text with each absolute path shortened. One with spaces is found where it is all of it."""
    found = WHOLE.match(text)
    if found and "\n" not in text:
        before, path = found[1] or "", text[len(found[1] or "") :]
        if is_path(path):
            return before + shortened(path)
    if len(Path.home().parts) > 2:  # it may have spaces, which end a path in the patterns below
        text = text.replace(f"{Path.home()}{os.sep}", f"~{os.sep}")
    text = FILE.sub(lambda scheme: f"{scheme[1]}:/// /", text)
    text = WINDOWS.sub(lambda path: shortened(path[0]), text)
    text = POSIX.sub(lambda path: shortened(path[0]), text)
    return re.sub(r"\b((?:file|sqlite(?:\+\w+)?):///) /?", r"\1", text)


def is_path(text: str) -> bool:
    """Whether a text is one path as a whole: two folders at least, or something that is there."""
    if re.search(r"[{}<>|?*]", text) or re.search(r"\s[/\\~-]|\s\w+=", text):
        return False
    return len(re.findall(r"[/\\]", text)) > 1 or text[0] == "~" or (len(text) > 1 and os.path.exists(text))


def shortened(path: str) -> str:
    """A path relative to the working directory, or its last part."""
    whole = PurePosixPath(os.path.expanduser(path))
    if whole.is_absolute() and len(Path.cwd().parts) > 1 and whole.is_relative_to(Path.cwd()):
        return str(whole.relative_to(Path.cwd()))
    windows = "\\" in path or re.match(r"[A-Za-z]:", path)
    parts = (PureWindowsPath(path) if windows else PurePosixPath(path)).parts
    home = len(parts) == 3 and parts[1] in ("home", "Users")
    return "~" if home else parts[-1] if len(parts) > 1 else "."


def local(name: str | None) -> str | None:
    """The name of a model that lies in a folder: "./name" of an absolute path, so that it is no id on the Hub."""
    short = without_places(name)
    return short if short == name else f"./{short}"
