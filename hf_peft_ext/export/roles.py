"""One model in three roles: with its adapter (the teacher), with a LoRA (the student), and without both (the base)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_peft_ext.attach.layer import AddOfInput
from hf_peft_ext.export.low_rank_factors import Factors, adapter_layers
from hf_peft_ext.model.modes import frozen
from hf_peft_ext.model.quantization import keep_4bit_trainable
from hf_peft_ext.model.site import Site
from hf_peft_ext.model.sites import find_sites
from hf_peft_ext.model.structure import innermost, leaf_size
from hf_peft_ext.sublayers import LowRank
from hf_peft_ext.validation.checks import check

ModelRole = Literal["adapter", "lora", "base"]
EXPORTED = "exported"
BRANCH = "exported_low_rank"


class Roles:
    """A model with an adapter and a LoRA on the same base weights, of which one acts at a time.

    The LoRA is made of this package's low-rank branches, attached as children of the leaves. Modules that the adapter
    saves whole, such as a classification head, act in all three roles.

    Args:
        model: the model, with the adapter active. Inside `attached` the LoRA is a part of it.
        leaves: paths of the linear leaves that get a LoRA, in the base model.
        r: rank of the LoRA.
    """

    def __init__(self, model: PeftModel, leaves: Sequence[str], r: int):
        self.model, self.base = model, model.get_base_model()
        self.adapter = adapter_layers(self.base)
        self.r, self.leaves = r, list(leaves)
        self.student: dict[str, AddOfInput] = {}  # path of a leaf -> its tuner layer

    @contextmanager
    def attached(self) -> Iterator["Roles"]:
        """Within, the model has the LoRA, is in evaluation mode, and only the LoRA is trained."""
        keep_4bit_trainable(self.base)
        disabled = [(layer, layer._disable_adapters) for layer in self.adapter]
        with frozen(self.model):
            try:
                for path in self.leaves:
                    self.student[path] = attach_branch(self.base, path, self.r)
                self.use("lora")
                yield self
            finally:
                for layer in self.student.values():
                    layer.remove()
                self.student = {}
                for layer, value in disabled:
                    layer._disable_adapters = value

    def use(self, role: ModelRole) -> None:
        """Let one of the three act in the next forwards."""
        for layer in self.adapter:  # peft's own switch would change what is trained, too
            layer._disable_adapters = role != "adapter"
        for layer in self.student.values():
            layer._disable_adapters = role != "lora"

    def branch(self, path: str) -> LowRank:
        """The low-rank branch at a leaf."""
        return self.student[path].sublayer_of[EXPORTED]

    @torch.no_grad()
    def load(self, factors: Mapping[str, Factors]) -> None:
        """Set A and B of each leaf."""
        for path, (a, b) in factors.items():
            branch = self.branch(path)
            for own, value in ((branch.A, a), (branch.B.T, b.T)):
                own.zero_()[: len(value)] = value

    def factors(self) -> dict[str, Factors]:
        """Path of a leaf -> A and B."""
        branches = {path: self.branch(path) for path in self.leaves}
        return {path: Factors(of.A.detach().clone(), of.B.detach().clone()) for path, of in branches.items()}

    def parameters(self) -> list[nn.Parameter]:
        """A and B of all leaves."""
        return [p for layer in self.student.values() for p in layer.sublayer_of[EXPORTED].parameters()]


def attach_branch(base: nn.Module, path: str, r: int) -> AddOfInput:
    """Attach a trainable low-rank branch of rank r to a leaf; in float32, also beside half-precision weights."""
    d_in, d_out = leaf_size(base.get_submodule(path)) or (0, 0)
    layer = AddOfInput(base, Site("target", None, path, "input", d_in, d_out), BRANCH)
    layer.host.add_module(BRANCH, layer)
    layer.put(EXPORTED, LowRank(d_in, d_out, r, alpha=r).float())
    layer.sublayer_of[EXPORTED].float().requires_grad_(True)
    layer._active_adapter = [EXPORTED]
    return layer


def linear_leaves(base: nn.Module, target_modules: Sequence[str] | None = None) -> list[str]:
    """Paths of the linear leaves of the blocks, where a LoRA of peft can act.

    Args:
        base: the base model, with adapters or without.
        target_modules: endings of paths, to take fewer; None for all leaves.

    Raises:
        ValueError: there is no such leaf.
    """
    modules = dict(base.named_modules())
    hosts = dict.fromkeys(site.host for site in find_sites(base) if site.act == "input")
    leaves = [path for path in hosts if is_linear(innermost(modules[path]))]
    if target_modules is not None:
        named = [path for path in leaves if any(f".{path}".endswith(f".{end}") for end in target_modules)]
        check("target_modules", list(target_modules), bool(named), f"must name linear leaves, such as {leaves[0]}")
        return named
    check("model", type(base).__name__, bool(leaves), "must have linear leaves in its blocks; none were found")
    return leaves


def is_linear(module: nn.Module) -> bool:
    """Whether peft's LoRA acts on a leaf as on a matrix: linear leaves, quantized ones included."""
    return isinstance(module, nn.Linear | Conv1D)
