"""Hooks of the delta bridge: leaves and adapter tensors of the pruned copy, held to the large model's values."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from hf_peft_ext.transfer.map.adapter_tensors import AdapterTensor


class HeldStates:
    """The values of one forward pass.

    Attributes:
        large: path of a module -> the large model's value there.
        reference: path -> the copy's value without a change; None where it is the value itself, detached.
        recording: whether the copy runs without its adapters, to record references.
    """

    def __init__(self) -> None:
        self.large: dict[str, Tensor] = {}
        self.reference: dict[str, Tensor] | None = None
        self.recording = False

    def clear(self) -> None:
        """Forget the values of the last forward pass."""
        self.large.clear()
        self.reference = None

    def unchanged(self, path: str, value: Tensor) -> Tensor:
        """The copy's value at a path without a change, given its value with the change."""
        if self.recording:
            assert self.reference is not None
            self.reference[path] = value
            return value
        return value.detach() if self.reference is None else self.reference[path]


class HeldLeaf:
    """y = y_large[rows] + (W' x - W' x_ref), in a linear leaf of the pruned copy.

    Args:
        path: of the leaf.
        rows: the rows of the large leaf that the copy has; None for all.
    """

    def __init__(self, states: HeldStates, path: str, rows: Tensor | None):
        self.states, self.path, self.rows = states, path, rows

    def record(self, _: nn.Module, args: Any, output: Tensor) -> None:
        """Hook of the large leaf."""
        rows = self.rows
        self.states.large[self.path] = output if rows is None else output[..., rows.to(output.device)]

    def hold(self, _: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Hook of the copy's leaf. The change is computed first: unchanged, the sum is exact in every type."""
        return self.states.large[self.path] + (output - self.states.unchanged(self.path, output))


class WholeInput:
    """A[rows] x_large + (A' x - A' x_ref): LoRA's A or a leaf of a head reads all of the large model's channels.

    Args:
        source: the leaf's weight A in the large model; A' is the copy's.
        rows: the rows of A that the copy has, where the leaf's output is the residual stream; None for all.
    """

    def __init__(self, states: HeldStates, source: AdapterTensor, rows: Tensor | None):
        self.states, self.source, self.rows = states, source, rows
        self.path = f"{source.host} {source.tensor}"

    def record(self, _: nn.Module, args: Any) -> None:
        """Hook in the large model, of the module with this input."""
        self.states.large[self.path] = args[0]

    def record_reference(self, _: nn.Module, args: Any) -> None:
        """Hook in the copy, of the module with this input."""
        if self.states.recording:
            self.states.unchanged(self.path, args[0])

    def hold(self, leaf: Any, args: Any, output: Tensor) -> Tensor:
        """Hook of the leaf in the copy."""
        weight, bias, x = self.source.value, leaf.bias, self.states.large[self.path]
        weight = weight if self.rows is None else weight[self.rows.to(weight.device)]
        reference = self.states.reference
        ref = args[0].detach() if reference is None else reference[self.path].to(args[0].dtype)
        return F.linear(x.to(weight.dtype), weight, bias) + (output - F.linear(ref, leaf.weight, bias))


class WholeCode:
    """A sub-layer of this package reads all of the large model's channels: A x_large + A' (x - x_large[kept]).

    Args:
        source, own: A in the large model and A' in the copy.
        kept: the channels of x_large that the copy has.
    """

    def __init__(self, states: HeldStates, source: AdapterTensor, own: AdapterTensor, kept: Tensor):
        self.states, self.source, self.own, self.kept = states, source, own, kept
        self.path = f"{source.host} {source.tensor}"

    def record(self, x: Tensor) -> None:
        """The input of the sub-layer in the large model."""
        self.states.large[self.path] = x

    def unseen(self) -> Tensor:  # shape: (batch, length, r)
        """The part of A x_large from the channels that the copy lacks."""
        weight, own, x = self.source.value, self.own.value, self.states.large[self.path]
        kept = x[..., self.kept.to(x.device)]
        return F.linear(x.to(weight.dtype), weight) - F.linear(kept.to(own.dtype), own)

    def widen(self, _: nn.Module, args: Any, bias: Tensor) -> Tensor:  # shape: (batch, length, r)
        """Hook of the computed bias of a bottleneck or a gate: each token has its own bias."""
        return bias + self.unseen()

    def project(
        self, x: Tensor, weight: Tensor, visible: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:  # shapes: (batch, length, r), gate
        """In place of `project` of a low-rank branch, which has no bias."""
        branch: Any = self.own.owner
        z, gate = type(branch).project(branch, x, weight, visible)
        return z + self.unseen(), gate
