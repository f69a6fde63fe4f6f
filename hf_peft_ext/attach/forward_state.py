"""What one module of a forward hands to a later one. Kept for the current thread, never on a module.

Two threads may run one model, and copies of a model (`nn.DataParallel`) share their hooks. So hooks hold no tuner
layer and no tensor: they find the layer on the module they are called with, and hand values on through `FORWARD`.
"""

import itertools
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.utils.weak import WeakTensorKeyDictionary


class ForwardState(threading.local):
    """The state of the forward that runs in the current thread.

    Attributes:
        values: what was handed on and not yet taken, by key (see `new_key`).
        row_adapters: the adapter of each row, in a batch that mixes them; None in others.
        derived: tensors made of masks and biases that the layers of a model share. They die with their source.
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.row_adapters: list[str] | None = None
        self.derived: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def hand_on(self, key: str, value: Any) -> None:
        """Keep a value until a later module of this forward takes it.

        When gradient checkpointing computes a block anew, in a backward, it may stop before that module runs, and the
        hooks of the block itself do not run. What is left then is dropped at the end of the backward.
        """
        self.values[key] = value
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            Variable._execution_engine.queue_callback(partial(self.values.pop, key, None))


FORWARD = ForwardState()
_numbers = itertools.count()


def new_key(name: str) -> str:
    """A key for `FORWARD.values` that no other layer has."""
    return f"{name}#{next(_numbers)}"


def derive(source: Tensor, name: Any, make: Callable[[Tensor], Tensor]) -> Tensor:
    """make(source), computed once for all layers that are given the same source.

    The result must not be a view of the source. It is computed anew where the source needs a gradient, since a forward
    under gradient checkpointing runs twice, and where operations are recorded (torch.compile, CUDA graphs).

    Args:
        source: a mask or a bias.
        name: tells the results made of one source apart.
        make: from the source to the result.
    """
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    recorded = recorded or (source.is_cuda and torch.cuda.is_current_stream_capturing())
    if recorded or source.requires_grad or source.is_inference():  # inference tensors count no versions
        return make(source)
    version, results = FORWARD.derived.get(source) or (-1, {})
    if version != source._version:
        results = {}
        FORWARD.derived[source] = source._version, results
    if name not in results:
        results[name] = make(source)
    return results[name]
