"""Configs that are changed in place for a model, since peft keeps using the object that it received.

Such a config remembers its original. A second model gets its own config, made from that original.
"""

from typing import Any

ASKED = "_asked"  # attribute of a config; not a field, so it is not saved


def asked_by(config: Any) -> Any | None:
    """The original of a config that was changed; None if it was not, or is a copy of one that was."""
    owner, asked = vars(config).get(ASKED, (None, None))
    return asked if owner == id(config) else None


def become(config: Any, resolved: Any, asked: Any) -> None:
    """Give a config the class and fields of `resolved`, its form for one model, and remember the original `asked`."""
    config.__class__ = type(resolved)
    vars(config).clear()
    vars(config).update(vars(resolved))
    vars(config)[ASKED] = (id(config), asked)
