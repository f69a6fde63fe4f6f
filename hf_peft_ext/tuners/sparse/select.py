"""Selects the entries of a sparse adapter: by squared gradients, or by a first phase that trains all of them."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn

from hf_peft_ext.model.modes import frozen
from hf_peft_ext.model.quantization import keep_4bit_trainable
from hf_peft_ext.model.structure import innermost
from hf_peft_ext.pruning.importance import Batch, LogLikelihood, log_likelihood_of_labels, wide
from hf_peft_ext.tuners.sparse.config import SparseConfig
from hf_peft_ext.tuners.sparse.deltas import DenseDelta, SparseDelta
from hf_peft_ext.tuners.sparse.layer import SparseLayer
from hf_peft_ext.tuners.sparse.targets import SparseTarget, is_packed
from hf_peft_ext.tuners.sparse.tuner import random_indices, sparse_layers
from hf_peft_ext.validation.checks import check


def select_sparse_parameters(
    model: PeftModel,
    batches: Iterable[Batch] | None = None,
    adapter_name: str | None = None,
    log_likelihood: LogLikelihood | None = None,
) -> None:
    """Select the entries that a sparse adapter trains, by squared gradients or at random. Its values become zero.

    "fisher" needs a number of float32 for each parameter that may be selected, on the model's device, and the
    gradient of one parameter at a time. An example is run alone, so that its gradient can be squared.

    Args:
        model: a model with a sparse adapter.
        batches: mappings of tensors with a first axis of examples, `labels` included, for "fisher".
        adapter_name: the adapter; None for the active one.
        log_likelihood: (base model, batch of one example) -> log p(y | x); None for that of integer `labels`, or minus
            the model's loss where labels are numbers.

    Raises:
        ValueError: the model has no such adapter, its method needs a first phase (`sparse_search`), or there is no
            example.
    """
    layer, name, config = sparse_adapter(model, adapter_name)
    delta = cast(SparseDelta, layer.deltas_of[name])
    rule = "needs a first phase: train in `with sparse_search(model)`, or by a trainer of `hf_peft_ext.trainers`"
    check("selection", config.selection, config.selection in ("fisher", "random"), rule)
    if config.selection == "random":
        delta.select(random_indices(len(delta.values), delta.size, config.seed).to(delta.indices.device))
        return
    check("batches", batches, batches is not None, 'must be given for selection="fisher"')
    base = model.get_base_model()
    scores = squared_gradients(
        base, layer, name, batches or (), config.num_samples, log_likelihood or default_log_likelihood
    )
    delta.select(scores.topk(len(delta.values)).indices)


@contextmanager
def sparse_search(model: PeftModel, adapter_name: str | None = None) -> Iterator[DenseDelta]:
    """Within, all entries are trained; at the end, the k that moved most are selected ("lottery_ticket", "diff").

    Each parameter that may be selected has a difference in float32, its gradient, and the optimizer's moments; for
    "diff" a gate with as many numbers again. Build the optimizer inside, and another one afterwards. "lottery_ticket"
    sets all trained parameters back at the end; "diff" keeps the selected values.

    Args:
        model: a model with a sparse adapter.
        adapter_name: the adapter; None for the active one.

    Yields:
        The dense differences; add their `penalty(config)` to the loss.

    Raises:
        ValueError: the model has no such adapter, or its method has no such phase.
    """
    layer, name, config = sparse_adapter(model, adapter_name)
    has_phase = config.selection in ("lottery_ticket", "diff")
    check("selection", config.selection, has_phase, "has no first phase; call `select_sparse_parameters`")
    delta = cast(SparseDelta, layer.deltas_of[name])
    others = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad and p is not delta.values]
    delta.search = DenseDelta(layer.targets_of[name], config.selection == "diff", delta.values.device)
    delta.search.train(model.training)
    delta.values.requires_grad_(False)
    try:
        yield delta.search
        moved = delta.search.flat()
        indices = moved.abs().topk(len(delta.values)).indices
        delta.select(indices, moved[indices] if config.selection == "diff" else None)
        if config.selection == "lottery_ticket":
            for parameter, start in others:
                parameter.data.copy_(start)
    finally:
        delta.search = None
        delta.values.requires_grad_(True)


def sparse_adapter(model: nn.Module, adapter_name: str | None) -> tuple[SparseLayer, str, SparseConfig]:
    """The layer, name and config of a sparse adapter.

    Raises:
        ValueError: the model has no such adapter.
    """
    configs = getattr(model, "peft_config", {})
    name = adapter_name or getattr(model, "active_adapter", "default")
    layers = [layer for layer in sparse_layers(model) if name in layer.deltas_of]
    check("adapter_name", name, bool(layers) and name in configs, "is no sparse adapter of this model")
    return layers[0], name, configs[name]


def unselected_adapters(model: nn.Module) -> list[str]:
    """The names of the sparse adapters without selected entries."""
    deltas = ((name, delta) for layer in sparse_layers(model) for name, delta in layer.deltas_of.items())
    return [name for name, delta in deltas if not delta.is_selected]


def check_selected(model: nn.Module, names: Sequence[str] | None = None) -> None:
    """Refuse to save sparse adapters without selected entries.

    Args:
        model: a model with adapters.
        names: the adapters that are saved; None for all.

    Raises:
        ValueError: there is one.
    """
    missing = [name for name in unselected_adapters(model) if names is None or name in names]
    rule = "has no selected entries to save; see `select_sparse_parameters` and `sparse_search`"
    check("adapter_name", missing[:1], not missing, rule)


def default_log_likelihood(model: Any, batch: Batch) -> Tensor:
    """log p(labels | inputs) for integer labels, else minus the loss of the model."""
    labels = batch.get("labels")
    if labels is not None and labels.is_floating_point():
        return -model(**batch).loss
    return log_likelihood_of_labels(model, batch)


def squared_gradients(
    base: nn.Module,
    layer: SparseLayer,
    adapter_name: str,
    batches: Iterable[Batch],
    num_samples: int,
    log_likelihood: LogLikelihood,
) -> Tensor:  # shape: (size of all targets,)
    """The mean over examples of the squared gradient of log p(y | x), for each entry of all targets.

    Raises:
        ValueError: there is no example.
    """
    keep_4bit_trainable(base)
    targets = layer.targets_of[adapter_name]
    device, seen = layer.deltas_of[adapter_name].values.device, 0
    scores = torch.zeros(targets[-1].stop, device=device)
    with frozen(base), ExitStack() as stack, torch.enable_grad():
        for target in targets:
            stack.enter_context(watched(base, target, scores[target.start : target.stop].view(target.shape)))
        for example in examples(batches):
            if seen == num_samples:
                break
            moved = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in example.items()}
            log_likelihood(base, moved).sum().backward()
            seen += 1
    check("batches", None, seen > 0, "must hold at least one example")
    return sum_over_processes(scores) / seen


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of a tensor over the processes of a group, in place."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def examples(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Batches of one example; a batch whose tensors have different first axes is taken as one."""
    for batch in batches:
        sizes = {len(x) if isinstance(x, Tensor) and x.ndim else None for x in batch.values()}
        size = sizes.pop() if len(sizes) == 1 else None
        if size is None:
            yield batch
        for i in range(size or 0):
            yield {key: x[i : i + 1] for key, x in batch.items()}


@contextmanager
def watched(base: nn.Module, target: SparseTarget, scores: Tensor) -> Iterator[None]:
    """Within, each backward adds the squared gradient of a target to `scores`."""
    modules = [(innermost(base.get_submodule(path)), name) for path, name in target.uses]
    module, name = modules[0]
    if name == "weight" and is_packed(module):
        handle = module.register_forward_hook(partial(square_of_packed, scores))
        try:
            yield
        finally:
            handle.remove()
        return
    parameter = module.get_parameter(name)
    parameter.requires_grad_(True)
    embedding: Any = module if isinstance(module, nn.Embedding) and len(modules) == 1 else None
    before = embedding.sparse if embedding is not None else False
    if embedding is not None:
        embedding.sparse = True  # only the rows of the batch
    handle = parameter.register_post_accumulate_grad_hook(partial(add_square, scores))
    try:
        yield
    finally:
        handle.remove()
        if embedding is not None:
            embedding.sparse = before


@torch.no_grad()
def add_square(scores: Tensor, parameter: Tensor) -> None:
    """Add the squared gradient of a parameter, and drop the gradient."""
    gradient = cast(Tensor, parameter.grad)
    parameter.grad = None
    if gradient.is_sparse:
        gradient = gradient.coalesce()
        scores.index_add_(0, gradient.indices()[0], wide(gradient.values()).square().to(scores.device))
    else:
        scores += wide(gradient).square().to(scores.device)


def square_of_packed(scores: Tensor, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    """Have the backward add the squared gradient of a quantized weight, g^T x, of a batch with one example."""
    x = wide(args[0].detach()).flatten(0, -2)  # (length, d_in)

    def add(g: Tensor) -> None:
        scores.add_((wide(g).flatten(0, -2).T @ x).square())

    if output.requires_grad:
        output.register_hook(add)
