"""What a hook reads of a running forward: the arguments of its module, and values handed on by earlier modules.

Two threads may run one model, and copies of a model (`nn.DataParallel`) share their hooks. So hooks hold no tuner
layer and no tensor: they find the layer on the module that they are called with, and hand values on through `FORWARD`,
which belongs to the current thread.
"""

import itertools
import threading
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.utils.weak import WeakTensorKeyDictionary

from hf_peft_ext.model.structure import given_cache


class ForwardState(threading.local):
    """The state of the forward that runs in the current thread.

    Attributes:
        values: what was handed on and not yet taken, by key (see `new_key`).
        row_adapters: the adapter of each row, in a batch that mixes them; None in others.
        derived: tensors that all layers of a model share, by the mask or bias they were computed from. They are
            dropped together with it.
    """

    def __init__(self) -> None:
        self.values: dict[str | None, Any] = {}
        self.row_adapters: list[str] | None = None
        self.derived: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def hand_on(self, key: str, value: Any) -> None:
        """Keep a value until a later module of this forward takes it.

        When gradient checkpointing computes a block anew, in a backward, it may stop before that module runs, and the
        hooks of the block itself do not run. Values that are left then are dropped at the end of the backward.
        """
        self.values[key] = value
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            Variable._execution_engine.queue_callback(partial(self.values.pop, key, None))


FORWARD = ForwardState()
_numbers = itertools.count()


def new_key(name: str) -> str:
    """A key for `FORWARD.values` that no other layer has."""
    return f"{name}#{next(_numbers)}"


def hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tensor that a module reads: its first argument, positional or by name."""
    return args[0] if args else kwargs["hidden_states"]


def cached_tokens(attention: Any, kwargs: dict[str, Any]) -> int:
    """Number of tokens in the cache before this forward."""
    cache = given_cache(kwargs)
    layer = getattr(attention, "layer_idx", getattr(attention, "layer_id", 0))
    return 0 if cache is None else int(cache.get_seq_length(layer))
