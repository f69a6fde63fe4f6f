"""Selects the entries of sparse adapters, and prunes bottlenecks, before a trainer trains them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from hf_peft_ext.tuners.prune_bottlenecks import prune_bottlenecks, sparse_bottlenecks
from hf_peft_ext.tuners.sparse.deltas import DenseDelta
from hf_peft_ext.tuners.sparse.select import select_sparse_parameters, sparse_search, unselected_adapters
from hf_peft_ext.validation.checks import check

PRUNING_BATCHES = 32
# Settings of the first phase: it leaves no checkpoint and no evaluation
FIRST_PHASE = {"save_strategy": "no", "eval_strategy": "no", "load_best_model_at_end": False, "push_to_hub": False}


def select_before_training(trainer: Any, train: Callable[[], Any]) -> None:
    """Select the entries of the active adapter, if it is a sparse one without them; prune it, if it waits for that.

    - "fisher": by the trainer's loss on single examples of its training data, in their order.
    - "lottery_ticket", "diff": by a first training of all entries, with the trainer's arguments and the method's
      penalty; `search_epochs` may be another number of epochs. Its optimizer is dropped. The logs are those of a
      training run of its own.
    - `BottleneckConfig(sparsity=...)`: by the trainer's loss on the first `PRUNING_BATCHES` batches.

    Args:
        trainer: an adapter's trainer.
        train: its training.

    Raises:
        ValueError: the trainer has a `model_init`, or no training data.
    """
    model = trainer.peft_model
    name = model.active_adapter
    devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
    unpruned = any(not bottleneck.is_pruned for bottleneck in sparse_bottlenecks(model, name))
    if unpruned or name in unselected_adapters(model):
        rule = "must be None for a sparse adapter: it would be replaced after its entries were selected"
        check("model_init", "a function", trainer.model_init is None, rule)
    if unpruned:
        with torch.random.fork_rng(devices):
            prune_bottlenecks(model, islice(prepared(trainer), PRUNING_BATCHES), name, partial(loss_of, trainer))
    if name not in unselected_adapters(model):
        return
    config = model.peft_config[name]
    if config.selection == "fisher":
        with torch.random.fork_rng(devices):  # the order of training does not change
            select_sparse_parameters(model, prepared(trainer), name, minus_loss(trainer))
        return
    with sparse_search(model, name) as search, penalized(trainer, search, config), first_phase(trainer, config):
        train()
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.model_wrapped = trainer.model
    clock = trainer.recorder.clock
    clock.resume(clock.step_time, clock.train_time, clock.peak_memory)


def prepared(trainer: Any) -> Iterator[Mapping[str, Any]]:
    """The training batches on the trainer's device."""
    for batch in trainer.get_train_dataloader():
        yield trainer._prepare_inputs(batch)


def loss_of(trainer: Any, model: Any, batch: Any) -> Tensor:
    """The trainer's loss of a batch."""
    with trainer.compute_loss_context_manager():
        return trainer.compute_loss(model, dict(batch))


def minus_loss(trainer: Any) -> Callable[[Any, Any], Tensor]:
    """log p(y | x) of an example, as minus the trainer's loss."""
    return lambda base, example: -loss_of(trainer, trainer.peft_model, example)


@contextmanager
def penalized(trainer: Any, search: DenseDelta, config: Any) -> Iterator[None]:
    """Within, the trainer's loss has the method's penalty, which is logged as `penalty`."""
    original = trainer.compute_loss

    def compute_loss(model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        result = original(model, inputs, return_outputs, **kwargs)
        loss, *outputs = result if return_outputs else (result,)
        term = search.penalty(config)
        if model.training and trainer.loss_terms.is_scaled(kwargs.get("num_items_in_batch")):
            term = term / trainer.current_gradient_accumulation_steps
        trainer.add_loss_terms(penalty=term)
        return (loss + term, *outputs) if return_outputs else loss + term

    trainer.compute_loss = compute_loss
    try:
        yield
    finally:
        del trainer.compute_loss


@contextmanager
def first_phase(trainer: Any, config: Any) -> Iterator[None]:
    """Within, the trainer saves and evaluates nothing, and trains for the epochs of the first phase."""
    args, changed = trainer.args, dict(FIRST_PHASE)
    if config.search_epochs is not None:
        changed |= {"num_train_epochs": config.search_epochs, "max_steps": -1}
    before = {name: getattr(args, name) for name in changed}
    vars(args).update(changed)
    try:
        yield
    finally:
        vars(args).update(before)
