"""Removes what must not be published: tokens, passwords and keys, and absolute paths, which can name a user."""

import os
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import get_token
from huggingface_hub.utils import yaml_dump

PART = r"[^\s/\\'\",;:=()\[\]{}<>|]+"
# An absolute path in a text; the slashes of an address (https://...) or between words (and/or) do not start one.
POSIX = re.compile(rf"(?<![\w/\\.~}}\]>-])(?:~[\w.-]*[/\\]|/(?=\w{PART}/))(?:{PART}/)*(?:{PART})?")
WINDOWS = re.compile(rf"(?<![\w/\\])(?:[A-Za-z]:[/\\]|\\\\(?={PART}\\))(?:{PART}[/\\])*(?:{PART})?")
FILE_URL = re.compile(r"\b(file|sqlite(?:\+\w+)?):///+(?=\S)")  # what follows is a path
WHOLE = re.compile(r"(--?[\w.-]+=|[\w.-]+=)?(?:~[\w.-]*/|/|[A-Za-z]:[/\\]|\\\\)")
SECRET = re.compile(r"(^|[_.-])(token|api_?key|password|passwd|secret|credentials?)$", re.IGNORECASE)
NOT_SECRET = re.compile(r"(^|[_.-])(bos|eos|pad|unk|sep|cls|mask|image|audio|video)_token$", re.IGNORECASE)
VALUE = re.compile(r"hf_[A-Za-z0-9]{16,}|(?<=://)[^/@\s]+:[^/@\s]+(?=@)")
HIDDEN = "<hidden>"


def map_texts(value: Any, change: Callable[[str], str], keep: Callable[[str], bool] = lambda key: True) -> Any:
    """A copy of JSON-like data with other texts.

    Args:
        value: dictionaries, lists, text, numbers.
        change: of each text, keys included.
        keep: which keys of dictionaries are kept.
    """
    if isinstance(value, dict):
        return {map_texts(k, change): map_texts(item, change, keep) for k, item in value.items() if keep(str(k))}
    if isinstance(value, (list, tuple, set)):
        return [map_texts(item, change, keep) for item in value]
    return change(value) if isinstance(value, str) else value


def is_secret(name: str) -> bool:
    """Whether a setting with this name holds a secret: `hub_token` does, `eos_token` does not."""
    plain = name.lstrip("-").replace("-", "_")
    return bool(SECRET.search(plain)) and not NOT_SECRET.search(plain)


def without_secrets(value: Any, *tokens: str | None) -> Any:
    """A copy of JSON-like data without secrets.

    Args:
        value: dictionaries, lists, text, numbers.
        tokens: secret texts, replaced wherever they occur; the Hub's token of this machine is one of them.
    """
    secrets = [token for token in (*tokens, get_token()) if token]

    def hide(text: str) -> str:
        for token in secrets:
            text = text.replace(token, HIDDEN)
        return VALUE.sub(HIDDEN, text)

    return map_texts(value, hide, keep=lambda key: not is_secret(key))


def without_places(value: Any) -> Any:
    """A copy of JSON-like data whose absolute paths are relative to the working directory; others are last parts."""
    return map_texts(value, in_text)


def shared_recipe(recipe: Any) -> bytes:
    """A recipe for publication, as YAML without local paths."""
    return yaml_dump(without_places(recipe), sort_keys=False).encode()


def in_text(text: str) -> str:
    """The text with each absolute path shortened; a path with spaces is recognised if it is the whole text."""
    match = WHOLE.match(text)
    if match and "\n" not in text:
        before, path = match[1] or "", text[len(match[1] or "") :]
        if is_path(path):
            return before + shortened(path)
    if len(Path.home().parts) > 2:  # it may contain spaces, which end a path in the patterns below
        text = text.replace(f"{Path.home()}{os.sep}", f"~{os.sep}")
    text = FILE_URL.sub(lambda scheme: f"{scheme[1]}:/// /", text)
    text = WINDOWS.sub(lambda path: shortened(path[0]), text)
    text = POSIX.sub(lambda path: shortened(path[0]), text)
    return re.sub(r"\b((?:file|sqlite(?:\+\w+)?):///) /?", r"\1", text)


def is_path(text: str) -> bool:
    """Whether a text is a single path: with two folders at least, or of an existing file."""
    if re.search(r"[{}<>|?*]", text) or re.search(r"\s[/\\~-]|\s\w+=", text):
        return False
    return len(re.findall(r"[/\\]", text)) > 1 or text[0] == "~" or (len(text) > 1 and os.path.exists(text))


def shortened(path: str) -> str:
    """A path relative to the working directory; outside of it, its last part."""
    whole = PurePosixPath(os.path.expanduser(path))
    if whole.is_absolute() and len(Path.cwd().parts) > 1 and whole.is_relative_to(Path.cwd()):
        return str(whole.relative_to(Path.cwd()))
    windows = "\\" in path or re.match(r"[A-Za-z]:", path)
    parts = (PureWindowsPath(path) if windows else PurePosixPath(path)).parts
    home = len(parts) == 3 and parts[1] in ("home", "Users")
    return "~" if home else parts[-1] if len(parts) > 1 else "."


def local(name: str | None) -> str | None:
    """The name of a model: "./name" for an absolute path, which cannot be mistaken for an id on the Hub."""
    short = without_places(name)
    return short if short == name else f"./{short}"
