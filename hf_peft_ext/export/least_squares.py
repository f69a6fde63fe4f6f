"""Begins a LoRA from a least-squares fit of what an adapter adds, leaf by leaf in the order of their calls.

At a leaf with input x let D be the adapter's output less that of the LoRA so far. The fit is the matrix M of rank r
that minimises sum |D - M x|^2 over tokens: reduced-rank regression, Izenman 1975
(https://doi.org/10.1016/0047-259X(75)90042-1). Leaves that read the same tensor are fitted together; those that run
before them have their fit already. At the last leaf of a block D is what the output of the block lacks, carried back
through the norm behind the residual if there is one. So each block also corrects errors of the blocks before it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_peft_ext.export.roles import ModelRole, Roles
from hf_peft_ext.model.calls import own_modules
from hf_peft_ext.model.structure import is_norm, layer_of, layer_paths

BatchTensors = Mapping[str, Tensor]
Hook = Callable[[nn.Module, Any, Any], None]
RIDGE = 1e-2  # of the mean of x^2
SMALLEST_GAMMA = 0.05  # channels that a norm nearly closes are not carried back


class StopForward(Exception):
    """Ends a forward behind the last module that is needed."""


@torch.no_grad()
def fit_least_squares(roles: Roles, batches: Sequence[BatchTensors]) -> None:
    """Set A and B of every leaf to the fit, in place. Where the adapter changes nothing, B stays zero.

    Args:
        roles: an attached model.
        batches: inputs of the model.
    """
    for block, groups in groups_by_block(roles, batches[0]):
        leaves = [path for group in groups for path in group]
        taught = [observe(roles, "adapter", batch, leaves, block) for batch in batches]
        for group in groups:
            ends_block = group is groups[-1] and len(group) == 1
            fit_group(roles, group, batches, taught, block if ends_block else None)
    roles.use("lora")


def groups_by_block(roles: Roles, batch: BatchTensors) -> list[tuple[str | None, list[list[str]]]]:
    """(block, its leaves in the order of their first calls), those that read one tensor together."""
    read: dict[str, Tensor] = {}  # kept, so that no address is used twice

    def note(path: str, module: nn.Module, args: Any, output: Any) -> None:
        read.setdefault(path, args[0])

    with forward_hooks(roles, {path: partial(note, path) for path in roles.leaves}):
        roles.model(**batch)
    layers, blocks = layer_paths(roles.base), dict[str | None, dict[int, list[str]]]()
    for path, x in read.items():
        layer = layer_of(path, layers)
        groups = blocks.setdefault(None if layer is None else layers[layer], {})
        groups.setdefault(x.data_ptr(), []).append(path)
    return [(block, list(groups.values())) for block, groups in blocks.items()]


def fit_group(
    roles: Roles, group: list[str], batches: Sequence[BatchTensors], taught: Sequence["Observation"], block: str | None
) -> None:
    """Fit leaves that read one tensor.

    Args:
        roles: an attached model.
        group: the leaves.
        batches: inputs of the model.
        taught: what the adapter's forward showed, for each batch.
        block: path of the block whose output D is taken from; None for the leaves' own outputs.
    """
    moments: dict[str, tuple[Any, Any]] = {}
    for batch, theirs in zip(batches, taught, strict=True):
        own, mask = observe(roles, "lora", batch, group, block), batch.get("attention_mask")
        for path in group:
            y, target = (of.outputs.get(path if block is None else block) for of in (own, theirs))
            if y is None or target is None or y.shape != target.shape:  # an expert with other tokens
                continue
            x = flat(own.inputs[path], mask)  # (tokens, d_in)
            d = flat((target.float() - y.float()) * (1.0 if block is None else own.scale), mask)  # (tokens, d_out)
            xx, xd = moments.get(path, (0.0, 0.0))
            moments[path] = (xx + x.T @ x, xd + x.T @ d)
    for path, (xx, xd) in moments.items():
        if xd.abs().max() > 0:
            branch = roles.branch(path)
            for parameter, value in zip((branch.A, branch.B), reduced_rank(xx, xd, roles.r), strict=True):
                parameter.copy_(value)


def reduced_rank(
    xx: Tensor,  # shape: (d_in, d_in): the sum of x x^T
    xd: Tensor,  # shape: (d_in, d_out): the sum of x D^T
    r: int,
) -> tuple[Tensor, Tensor]:  # shapes: (r, d_in), (d_out, r)
    """A and B of the M = B A that minimises sum |D - M x|^2 + ridge |M|^2, with rows and columns of equal norms."""
    xx = xx + RIDGE * xx.diagonal().mean() * torch.eye(len(xx), device=xx.device)
    m = torch.linalg.solve(xx, xd).T  # (d_out, d_in)
    explained = m @ xd  # (d_out, d_out): the sum of M x (M x)^T
    _, vectors = torch.linalg.eigh((explained + explained.T) / 2)  # ascending
    b = vectors[:, -r:]  # (d_out, r), or narrower than r
    a = b.T @ m
    norm = a.norm(dim=1).clamp_min(1e-12).sqrt()  # (r,)
    a, b, lacking = a / norm[:, None], b * norm, max(0, r - b.shape[1])
    return torch.cat([a, a.new_zeros(lacking, a.shape[1])]), torch.cat([b, b.new_zeros(len(b), lacking)], 1)


@dataclass
class Observation:
    """What a forward showed.

    Args:
        inputs: path of a leaf -> its input.
        outputs: path of a leaf or block -> its output.
        scale: carries a difference of the block's output back in front of the norm that made it.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    scale: Tensor | float = 1.0


def observe(
    roles: Roles, role: ModelRole, batch: BatchTensors, leaves: Sequence[str], block: str | None
) -> Observation:
    """Run a forward up to the end of the block, or of the leaves if there is none."""
    seen, normed = Observation(), dict[int, tuple[nn.Module, Tensor, Tensor]]()

    def leaf(path: str, module: nn.Module, args: Any, output: Tensor) -> None:
        seen.inputs[path], seen.outputs[path] = args[0], output
        if block is None and len(seen.outputs) == len(leaves):
            raise StopForward

    def norm(module: nn.Module, args: Any, output: Tensor) -> None:
        normed[id(output)] = (module, args[0], output)

    def end(module: nn.Module, args: Any, output: Any) -> None:
        y = output[0] if isinstance(output, tuple) else output
        seen.outputs[str(block)] = y
        if id(y) in normed:
            seen.scale = scale_of(*normed[id(y)][:2])
        raise StopForward

    hooks: dict[str, Hook] = {path: partial(leaf, path) for path in leaves}
    if block is not None:
        norms = (path for path, m in own_modules(roles.base.get_submodule(block), block) if is_norm(m))
        hooks |= dict.fromkeys(norms, norm) | {block: end}
    roles.use(role)
    with forward_hooks(roles, hooks), suppress(StopForward):
        roles.model(**batch)
    return seen


def scale_of(
    norm: Any,
    s: Tensor,  # shape: (batch, length, d): the input of the norm
) -> Tensor:  # shape: (batch, length, d)
    """sigma / gamma: the change of s that changes norm(s) by 1, to first order."""
    s, gamma = s.float(), norm.weight.float()
    is_rms = "rms" in type(norm).__name__.lower()
    sigma = s.square().mean(-1, keepdim=True).sqrt() if is_rms else s.std(-1, keepdim=True, unbiased=False)
    return torch.where(gamma.abs() < SMALLEST_GAMMA, 0.0, sigma / gamma)


def flat(x: Tensor, mask: Tensor | None) -> Tensor:  # shape: (tokens, d)
    """The tokens of a batch in one row, without padding where the mask is theirs."""
    is_mask = mask is not None and mask.shape == x.shape[:2]
    return x.float()[mask.bool()] if is_mask and mask is not None else x.float().flatten(0, -2)


@contextmanager
def forward_hooks(roles: Roles, hooks: Mapping[str, Hook]) -> Iterator[None]:
    """Within, modules of the base model call hooks after their forward."""
    handles = [roles.base.get_submodule(path).register_forward_hook(hook) for path, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
