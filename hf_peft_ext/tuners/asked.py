"""Configs that are changed in place when they meet a model, since peft goes on with the object that it was given.

Such a config remembers what it asked for. The next model that it is given to gets a config of its own, made from that.
"""

from typing import Any

ASKED = "_asked"  # attribute of a config; no field, so it is not saved


def asked_by(config: Any) -> Any | None:
    """What a config asked for before it was changed; None if it was not, or is the copy of one that was."""
    owner, asked = vars(config).get(ASKED, (None, None))
    return asked if owner == id(config) else None


def become(config: Any, found: Any, asked: Any) -> None:
    """Change a config, class and fields, into what it comes to on a model."""
    config.__class__ = type(found)
    vars(config).clear()
    vars(config).update(vars(found))
    vars(config)[ASKED] = (id(config), asked)
