"""The order of a module's hooks.

Hooks are taken out and put in again. torch's `prepend=True` moves them by `OrderedDict.move_to_end`, and before torch
2.12 torch.compile does not see that: it reads the order in which they were put in.
"""

from typing import Any

from torch.utils.hooks import RemovableHandle


def move_first(hooks: Any, handle: RemovableHandle) -> None:
    """Let a hook run before the others.

    Args:
        hooks: the OrderedDict in which the module has its hooks of this kind.
        handle: the handle of the hook.
    """
    for key in [key for key in hooks if key != handle.id]:
        hooks[key] = hooks.pop(key)


def move_last(hooks: Any, handle: RemovableHandle) -> None:
    """Let a hook run after the others."""
    hooks[handle.id] = hooks.pop(handle.id)
