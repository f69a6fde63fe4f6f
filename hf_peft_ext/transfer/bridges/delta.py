"""The delta bridge: a pruned copy carries the change that the adapters make; the large model computes everything else.

The large model runs forward, without gradients. A leaf of the pruned copy then gives, instead of W' x,

    y = y_large[rows kept] + W' (x - x_ref),

where x_ref is the input of the leaf without a change. A norm divides by the norm of the large model's whole residual
stream. So without a change the copy has the large model's values, its logits included. A change passes through slices
of the large model's own weights, and the adapters get their gradient through them.

`around` says what counts as no change:

    "plugged"  the large model with its adapters. x_ref is x itself, detached: the loss is that of the plugged model,
               exactly and at every step; only its gradient passes through the copy.
    "base"     the large model without its adapters. The copy carries their change in its values too, which drift away
               from the plugged model's as the adapters grow.

The adapters read the same channels as in the large model. Of their output the copy has the kept channels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_peft_ext.attach.forward_state import hidden_states
from hf_peft_ext.model.calls import own_modules
from hf_peft_ext.model.modes import preserve_requires_grad
from hf_peft_ext.model.structure import covers, innermost, is_norm, leaf_size
from hf_peft_ext.pruning import PrunedModel
from hf_peft_ext.pruning.channels import RESIDUAL
from hf_peft_ext.transfer.bridges.activations import check_has_weights
from hf_peft_ext.transfer.bridges.bridge import kept_channels, pruned_bridge
from hf_peft_ext.transfer.bridges.held import HeldLeaf, HeldStates, WholeCode, WholeInput
from hf_peft_ext.transfer.bridges.whole_norm import WholeNorm
from hf_peft_ext.transfer.map.adapter_tensors import HEAD, AdapterTensor, AdapterTensors
from hf_peft_ext.transfer.map.projections import Projections
from hf_peft_ext.validation.checks import check

Around = Literal["plugged", "base"]


@contextmanager
def delta_bridge(plugged: PeftModel, pruned: PrunedModel, around: Around = "plugged") -> Iterator[PeftModel]:
    """The pruned copy with the plugged adapters, held to the large model. Training it trains the plugged ones.

        with delta_bridge(plugged, pruned_copy(large, 4)) as model:
            task.loss(model, rows).backward()

    It takes the large model's inputs and gives its logits, in evaluation mode, which both models are put into. Only
    the adapters are trained: the slices are the large model's own weights. After the `with` block the large model has
    no hooks of the bridge.

    Args:
        plugged: what `plug` returned, or any large model with LoRAs or adapters of this package. Each forward of the
            bridge runs it, without gradients.
        pruned: the pruned copy of its base model (`pruning.pruned_copy`), not trained since.
        around: the large model with its adapters ("plugged") or without them ("base").

    Raises:
        ValueError: `around` is unknown, the pruned copy is not of this large model, or that has no weights.
    """
    with hold(AdapterTensors(plugged), pruned, around) as model:
        yield model


@contextmanager
def hold(source: AdapterTensors, pruned: PrunedModel, around: Around) -> Iterator[PeftModel]:
    """As `delta_bridge`, from tensors of the plugged model that were read already."""
    check("around", around, around in get_args(Around), f"must be one of {', '.join(get_args(Around))}")
    large: Any = source.model.get_base_model()
    check_has_weights("plugged", large, "a delta bridge runs it")
    copy = pruned_bridge(source, pruned, Projections("slice", trainable=False, index=kept_channels(pruned)))
    if hasattr(pruned.model, "model_dim"):  # T5 divides by its root in front of a tied head
        pruned.model.model_dim = large.model_dim  # pyright: ignore[reportArgumentType]
    source.model.eval()
    copy.model.eval()
    held = HeldCopy(source, copy, pruned, around)
    try:
        yield copy.model
    finally:
        held.remove()


class HeldCopy:
    """The hooks that hold a pruned copy to the large model.

    Args:
        source: tensors of the plugged model.
        copy: tensors of the pruned copy.
        pruned: the same copy and its kept channels.
        around: see `delta_bridge`.
    """

    def __init__(self, source: AdapterTensors, copy: AdapterTensors, pruned: PrunedModel, around: Around):
        self.plugged, self.model, self.pruned, self.around = source.model, copy.model, pruned, around
        self.large: Any = source.model.get_base_model()
        self.copy: Any = copy.model.get_base_model()
        self.states = HeldStates()
        self.norms: list[WholeNorm] = []
        self.branches: list[Any] = []
        self.handles: list[RemovableHandle] = [
            self.copy.register_forward_pre_hook(self.run_large, with_kwargs=True),
        ]
        large_leaves = dict(own_leaves(self.large))
        trained = tuple(tensor.host for tensor in source if tensor.layer == HEAD)
        for path, leaf in own_leaves(self.copy):
            if not covers(trained, path):
                self.hold_leaf(path, large_leaves[path], leaf)
        of_large, of_copy = source.by_key(), copy.by_key()
        channels = kept_channels(pruned)
        for key, own in of_copy.items():
            self.read_whole(of_large[key], own, of_copy, channels)

    def run_large(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each forward of the copy: run the large model, and for "base" the copy without its adapters."""
        self.rewind_norms()
        if self.states.recording:
            return
        for norm in self.norms:
            norm.statistics.clear()
        self.states.clear()
        with torch.no_grad(), preserve_requires_grad(self.plugged), preserve_requires_grad(self.model):
            if self.around == "plugged":
                self.large(*args, **kwargs)
                return
            with self.plugged.disable_adapter():
                self.large(*args, **kwargs)
            self.states.recording, self.states.reference = True, {}
            try:
                with self.model.disable_adapter():
                    module(*args, **kwargs)
            finally:
                self.states.recording = False
            self.rewind_norms()

    def rewind_norms(self) -> None:
        """Have the norms count their calls from the first again."""
        for norm in self.norms:
            norm.calls = 0

    def remove(self) -> None:
        """Take the hooks off both models."""
        for handle in self.handles:
            handle.remove()
        for norm in self.norms:
            norm.remove()
        for branch in self.branches:
            del branch.project
        self.states.clear()

    def hold_leaf(self, path: str, large: nn.Module, leaf: nn.Module) -> None:
        """Hold a linear leaf, or a norm along the residual stream, to the large model's."""
        kept = self.pruned.kept[RESIDUAL]
        if leaf_size(leaf):
            held = HeldLeaf(self.states, path, self.pruned.rows_of(path))
            self.handles += [large.register_forward_hook(held.record), leaf.register_forward_hook(held.hold)]
        elif is_norm(leaf) and len(leaf.weight) == len(kept) < len(large.weight):  # pyright: ignore
            self.norms.append(WholeNorm(large, leaf, kept))

    def read_whole(
        self, source: AdapterTensor, own: AdapterTensor, of_copy: dict[Any, AdapterTensor], channels: dict[Any, Tensor]
    ) -> None:
        """Let a tensor with an input axis read all channels of the large model."""
        axis = next((axis for axis in own.axes if axis.side == "in"), None)
        if axis is None:
            return
        if own.site is None:  # LoRA's A, a head: leaves that are called
            if isinstance(own.owner, nn.Linear):
                self.read_whole_input(source, own)
            return
        (name,) = axis.rows
        code = WholeCode(self.states, source, own, channels[name, None if name == RESIDUAL else own.layer])
        self.handles.append(self.record_input(own, code))
        owner: Any = own.owner
        if own.name == "weight":
            bias = of_copy[own.adapter, own.host, own.tensor.removesuffix("weight") + "bias", own.sites].owner
            computed: Any = bias.parametrizations["bias"]  # pyright: ignore
            self.handles.append(computed.register_forward_hook(code.widen))
        else:
            owner.project = code.project
            self.branches.append(owner)

    def read_whole_input(self, source: AdapterTensor, own: AdapterTensor) -> None:
        """Hold a leaf of an adapter to the whole input of its host."""
        has_output = any(axis.side == "out" for axis in own.axes)  # the dense layer in front of a classifier
        whole = WholeInput(self.states, source, self.pruned.kept[RESIDUAL] if has_output else None)
        self.handles.append(own.owner.register_forward_hook(whole.hold))
        for model, record in ((self.large, whole.record), (self.copy, whole.record_reference)):
            for module in called_with_input(model, own):
                self.handles.append(module.register_forward_pre_hook(record))

    def record_input(self, own: AdapterTensor, code: WholeCode) -> RemovableHandle:
        """Record the input of a sub-layer of the large model, also while it is disabled."""
        site: Any = own.site
        if site.act in ("output", "norm"):
            host = self.large.get_submodule(site.host)
            return host.register_forward_hook(
                lambda _, args, output: code.record(output[0] if isinstance(output, tuple) else output), prepend=True
            )
        module = self.large.get_submodule(site.reads or site.host)
        return module.register_forward_pre_hook(
            lambda _, args, kwargs: code.record(hidden_states(args, kwargs)), with_kwargs=True
        )


def called_with_input(model: nn.Module, tensor: AdapterTensor) -> list[nn.Module]:
    """The modules that are called with the input of a leaf of an adapter, with and without the adapter."""
    host: Any = model.get_submodule(tensor.host)
    if tensor.layer != HEAD:
        return [host]
    path = tensor.tensor.rpartition(".")[0]
    return [head.get_submodule(path) for head in (host.original_module, host.modules_to_save[tensor.adapter])]


def own_leaves(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Linear leaves and norms, by their paths in the model without tuners."""
    for path, module in own_modules(model):
        if path and (leaf_size(module) or is_norm(module)):
            yield path, innermost(module)
