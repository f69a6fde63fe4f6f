"""SparseAdapter: prunes bottleneck adapters before they are trained."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_peft_ext.attach.layer import TunerLayer
from hf_peft_ext.model.modes import evaluating
from hf_peft_ext.pruning.importance import Batch
from hf_peft_ext.sublayers import Bottleneck
from hf_peft_ext.tuners.sparse.select import sum_over_processes
from hf_peft_ext.validation.checks import check

Loss = Callable[[Any, Batch], Tensor]
WITH_DATA = ("snip", "grasp")


def prune_bottlenecks(
    model: PeftModel,
    batches: Iterable[Batch] | None = None,
    adapter_name: str | None = None,
    loss: Loss | None = None,
    seed: int = 0,
) -> None:
    """Prune the bottlenecks of an adapter to its config's `sparsity`: the entries with the lowest scores become zero.

    SparseAdapter, He et al. 2022 (https://arxiv.org/abs/2210.04284). The scores are ranked over the matrices of all
    layers together; biases stay. A `ComposedConfig` has no `pruning`: it is pruned at random. For "grasp" every batch
    is run twice, the second time with the graph of its gradient.

    Args:
        model: a model with an untrained adapter whose config has a `sparsity`.
        batches: mappings of tensors, as the model takes them, for "snip" and "grasp"; all are read.
        adapter_name: the adapter; None for the active one.
        loss: (model, batch) -> the loss; None for the model's own.
        seed: of "random".

    Raises:
        ValueError: the model has no such adapter, or there is no batch.
    """
    name = cast(str, adapter_name or model.active_adapter)
    config, pairs = model.peft_config.get(name), sparse_bottlenecks(model, name)
    check("adapter_name", name, bool(pairs), "is no adapter with a `sparsity` of this model")
    weights = [linear.weight for layer in pairs for linear in (layer.down, layer.up)]
    pruning, sparsity = getattr(config, "pruning", "random"), pairs[0].sparsity
    if pruning in WITH_DATA:
        scores = scored_by_gradient(model, weights, list(batches or ()), loss or own_loss, pruning == "grasp")
    elif pruning == "magnitude":
        scores = [weight.detach().abs() for weight in weights]
    else:
        generator = torch.Generator().manual_seed(seed)
        scores = [torch.rand(w.shape, generator=generator).to(w.device) for w in weights]
    flat = torch.cat([score.flatten() for score in scores])
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[flat.topk(max(1, round((1 - sparsity) * len(flat)))).indices] = True
    masks = [m.view(w.shape) for m, w in zip(kept.split([w.numel() for w in weights]), weights, strict=True)]
    for layer, down, up in zip(pairs, masks[::2], masks[1::2], strict=True):
        layer.prune(down, up)


def sparse_bottlenecks(model: nn.Module, adapter_name: str) -> list[Bottleneck]:
    """The bottlenecks of an adapter that are, or will be, pruned."""
    layers = (m.sublayer_of for m in model.modules() if isinstance(m, TunerLayer))
    own = [sublayers[adapter_name] for sublayers in layers if adapter_name in sublayers]
    return [sublayer for sublayer in own if isinstance(sublayer, Bottleneck) and sublayer.sparsity]


def check_pruned(model: nn.Module, names: Sequence[str] | None = None) -> None:
    """Refuse to save adapters that are still to be pruned.

    Args:
        model: a model with adapters.
        names: the adapters that are saved; None for all.

    Raises:
        ValueError: there is one.
    """
    configs: Any = getattr(model, "peft_config", {})
    waiting = [
        name for name in names or configs if any(not layer.is_pruned for layer in sparse_bottlenecks(model, name))
    ]
    check("adapter_name", waiting[:1], not waiting, "is not pruned to its `sparsity` yet; see `prune_bottlenecks`")


def own_loss(model: Any, batch: Batch) -> Tensor:
    """The loss that the model returns."""
    return model(**batch).loss


def scored_by_gradient(
    model: nn.Module, weights: list[Any], batches: list[Batch], loss: Loss, grasp: bool
) -> list[Tensor]:
    """|w g| (SNIP), or w (H g) (GraSP), with the gradient g of the loss, summed over the batches.

    Raises:
        ValueError: there is no batch.
    """
    check("batches", len(batches), bool(batches), "must hold at least one batch")
    with evaluating(model), pruned_later(model), torch.enable_grad():
        gradients = [torch.zeros_like(weight) for weight in weights]
        for batch in batches:
            for total, g in zip(gradients, torch.autograd.grad(loss(model, batch), weights), strict=True):
                total += g
        for total in gradients:
            sum_over_processes(total)
        if not grasp:
            return [(w.detach() * g).abs() for w, g in zip(weights, gradients, strict=True)]
        products = [torch.zeros_like(weight) for weight in weights]
        for batch in batches:
            with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
                first = torch.autograd.grad(loss(model, batch), weights, create_graph=True)
            inner = torch.stack([(a * g).sum() for a, g in zip(first, gradients, strict=True)]).sum()
            for total, h in zip(products, torch.autograd.grad(inner, weights), strict=True):
                total += h
        for total in products:
            sum_over_processes(total)
        return [w.detach() * h for w, h in zip(weights, products, strict=True)]


@contextmanager
def pruned_later(model: nn.Module) -> Iterator[None]:
    """Within, bottlenecks run although they are not pruned yet."""
    waiting = [m for m in model.modules() if isinstance(m, Bottleneck) and not m.is_pruned]
    for module in waiting:
        module.is_pruned = True
    try:
        yield
    finally:
        for module in waiting:
            module.is_pruned = False
