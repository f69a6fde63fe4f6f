"""Removes tokens, passwords and keys from the record of a run, by their names and by their values."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from hf_peft_ext.hub_cards.places import without_places

SECRET = re.compile(r"(^|[_.-])(token|api_?key|password|passwd|secret|credentials?)$", re.IGNORECASE)
NOT_SECRET = re.compile(r"(^|[_.-])(bos|eos|pad|unk|sep|cls|mask|image|audio|video)_token$", re.IGNORECASE)
VALUE = re.compile(r"hf_[A-Za-z0-9]{16,}|(?<=://)[^/@\s]+:[^/@\s]+(?=@)")
HIDDEN = "<hidden>"


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

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {clean(key): clean(item) for key, item in value.items() if not is_secret(str(key))}
        if isinstance(value, (list, tuple, set)):
            return [clean(item) for item in value]
        if isinstance(value, str):
            for token in secrets:
                value = value.replace(token, HIDDEN)
            return VALUE.sub(HIDDEN, value)
        return value

    return clean(value)


def command_line(*tokens: str | None) -> str | None:
    """The command that started this process, without secrets and absolute paths; None in a notebook or a console.

    Args:
        tokens: secret texts.
    """
    if hasattr(sys, "ps1") or "ipykernel" in sys.modules:
        return None
    kept: list[str] = []
    hide_next = False
    for argument in sys.argv[1:]:
        name, equals, _ = argument.partition("=")
        if not hide_next and not (equals and is_secret(name)) and not is_secret(argument):
            kept.append(argument)
        hide_next = argument.startswith("-") and not equals and is_secret(argument)
    return without_secrets(shlex.join(without_places([*program(), *kept])), *tokens)


def program() -> list[str]:
    """The name of the script that was started, or `python -m` and the module."""
    script, spec = sys.argv[0], getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or spec.origin != script:  # another origin: a debugger's module that runs the script
        return [Path(script).name]
    return ["python", "-m", spec.name.removesuffix(".__main__")]
