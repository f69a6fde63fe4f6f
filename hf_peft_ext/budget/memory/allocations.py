"""A record of all tensors of a training step: when each storage is allocated and freed, and what it holds.

torch's own `MemTracker` does the same for modules. It has no class for logits, and it cannot tell afterwards which
tensors autograd kept; both are needed here.
"""

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ITEM = torch.ops.aten._local_scalar_dense.default


@dataclass(eq=False)
class StorageLife:
    """The life of a storage.

    Args:
        bytes: its size.
        born: the event at which it was allocated.
        label: what it holds.
        died: the event at which it was freed; None if it never was.
    """

    bytes: int
    born: int
    label: str
    died: int | None = None

    def lives_at(self, event: int) -> bool:
        """Whether it is allocated after an event."""
        return self.born <= event and (self.died is None or event < self.died)


class Allocations(TorchDispatchMode):
    """Records the storages that operators return within the context; the tensors may be fake.

    Args:
        block: sizes are rounded up to a multiple of it, as the device's allocator does.

    Attributes:
        label: the label of storages that are allocated from now on.
    """

    def __init__(self, block: int = 1):
        super().__init__()
        self.block, self.label = block, ""
        self.lives: list[StorageLife] = []
        self.living: dict[int, tuple[StorageLife, weakref.ref]] = {}  # by the address of the storage
        self.events = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ITEM and args[0].dtype == torch.bool:
            return True  # rows without padding: "are all tokens visible?", "is no row packed?"
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.allocation_of(value)
        return result

    def allocation_of(self, tensor: Tensor) -> StorageLife:
        """The allocation of a tensor, recorded now if it is new."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self.living:
            self.events += 1
            size = -(-storage.nbytes() // self.block) * self.block
            life = StorageLife(size, self.events, self.label)
            self.lives.append(life)
            self.living[address] = life, weakref.ref(storage, lambda _: self.free(address))
        return self.living[address][0]

    def free(self, address: int) -> None:
        """Record that a storage was freed."""
        self.events += 1
        self.living.pop(address)[0].died = self.events

    def relabel(self, tensors: Iterable[Tensor], label: str) -> None:
        """Say what tensors hold."""
        for tensor in tensors:
            self.allocation_of(tensor).label = label

    def relabel_living(self, old: str, new: str) -> None:
        """Give another label to what is allocated at present."""
        for life, _ in self.living.values():
            if life.label == old:
                life.label = new

    def peak(self) -> Counter[str]:
        """Label -> bytes, at the event with the largest sum."""
        changes = [(life.born, life.bytes) for life in self.lives]
        changes += [(life.died, -life.bytes) for life in self.lives if life.died is not None]
        total = largest = peak_event = 0
        for event, change in sorted(changes):
            total += change
            if total > largest:
                largest, peak_event = total, event
        sizes: Counter[str] = Counter()
        for life in self.lives:
            if life.lives_at(peak_event):
                sizes[life.label] += life.bytes
        return sizes
