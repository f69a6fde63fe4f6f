"""Runs a training step on fake tensors and records what is allocated."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, fields
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames
from transformers.utils import import_utils

from hf_peft_ext.budget.experts import GroupedProducts
from hf_peft_ext.budget.fake_model import errors_of_fake_runs
from hf_peft_ext.budget.memory.allocations import Allocations
from hf_peft_ext.budget.memory.build import FakeCopies, without_warnings
from hf_peft_ext.budget.memory.gpu_kernels import GpuKernels
from hf_peft_ext.budget.memory.settings import MemorySettings

BLOCKS = {"cuda": 512, "cpu": 1}  # bytes that the allocator rounds up to
IN_FORWARD = "forward"  # label of what the forward pass allocates, until it is known whether autograd keeps it


def trace_step(model: nn.Module, base: set[int], settings: MemorySettings) -> Counter[str]:
    """Run forward, loss, backward and optimizer of a model on fake tensors.

    Args:
        model: the model on the meta device.
        base: the ids of the base model's tensors.
        settings: the settings.

    Returns:
        Part of the estimate -> bytes, at the peak.

    Raises:
        ValueError: the model does not run on fake tensors, for example because its forward pass depends on values.
    """
    allocations = Allocations(BLOCKS[settings.device])
    fake = FakeTensorMode(allow_non_fake_inputs=True)  # projections of a bridge index rows by real tensors
    with without_warnings(), eager_rules(settings), fake, torch.device("cpu"):
        copies = FakeCopies()
        copies.replace_in(model)
        for tensor in copies.originals:
            label = "weights" if id(tensor) in base else "adapter_weights"
            allocations.relabel([copies.copies[id(tensor)]], label)
        allocations.relabel(copies.constants, "quantization_constants")
        batch = training_batch(model, settings)
        with ExitStack() as stack:
            stack.enter_context(errors_of_fake_runs("model_or_config", type(model).__name__))
            stack.enter_context(GroupedProducts())
            if settings.device == "cuda":
                stack.enter_context(GpuKernels(settings.attention))
            stack.enter_context(allocations)
            optimizer = initialized_optimizer(model, allocations, settings)
            run_step(model, batch, allocations, settings)
            del optimizer  # its states lived until here
    return allocations.peak()


def initialized_optimizer(model: nn.Module, allocations: Allocations, settings: MemorySettings) -> Any:
    """The optimizer after a step on gradients of zero: its states exist, as in every step but the first."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(model, trained, settings)
    allocations.label = "gradients"
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    allocations.label = "temporaries"
    if hasattr(optimizer, "init_state"):  # bitsandbytes: its kernels take pointers, which fake tensors lack
        for i, group in enumerate(optimizer.param_groups):
            for j, parameter in enumerate(group["params"]):
                optimizer.init_state(group, parameter, i, j)
    else:
        optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    allocations.relabel(states, "optimizer_states")
    optimizer.zero_grad()
    return optimizer


def make_optimizer(model: nn.Module, trained: list[nn.Parameter], settings: MemorySettings) -> Any:
    """The Trainer's optimizer of this name.

    Raises:
        ValueError: it cannot be made.
    """
    # not TrainingArguments itself: it would set up devices, also of training that goes on in this process
    defaults = {f.name: None if f.default is MISSING else f.default for f in fields(TrainingArguments)}
    arguments: Any = SimpleNamespace(**defaults | {"optim": OptimizerNames(settings.optimizer)})
    try:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments, cast(Any, model))
        with unset_fake_temporarily():  # bitsandbytes computes tables of codes
            optimizer = optimizer_class(trained, **options)
    except (ImportError, ValueError, RuntimeError) as error:
        rule = f"must be an optimizer that can be made here: {error}"
        raise ValueError(f"`optimizer` (={settings.optimizer!r}) {rule}") from error
    for group in optimizer.param_groups:
        if settings.device == "cuda" and group.get("foreach", True) is None and not group.get("fused"):
            group["foreach"] = True  # torch's choice on a GPU
    return optimizer


def run_step(model: Any, batch: dict[str, Tensor], allocations: Allocations, settings: MemorySettings) -> None:
    """Forward, loss and backward pass; each allocation gets its label."""
    allocations.label = IN_FORWARD
    remove = watch_head(model, allocations)
    with torch.autocast("cpu", settings.compute_dtype, enabled=settings.autocast is not None):
        loss = model(**batch).loss
    remove()
    allocations.relabel_living(IN_FORWARD, "activations")
    if allocations.label == IN_FORWARD:  # no head of a language model
        allocations.label = "temporaries"
        allocations.relabel([loss], "logits_and_loss")
    loss.backward()
    trained = (parameter.grad for parameter in model.parameters() if parameter.grad is not None)
    allocations.relabel(trained, "gradients")


def watch_head(model: Any, allocations: Allocations) -> Callable[[], None]:
    """Label what is allocated from the head's forward pass until its backward pass is done.

    Returns:
        A function that removes the hook.
    """
    head = getattr(model, "get_base_model", lambda: model)().get_output_embeddings()
    if head is None:
        return lambda: None

    def after_head(gradient: Tensor) -> None:
        allocations.label = "temporaries"

    def before_head(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        allocations.label = "logits_and_loss"
        if arguments and arguments[0].requires_grad:
            arguments[0].register_hook(after_head)

    return head.register_forward_pre_hook(before_head).remove


def training_batch(model: Any, settings: MemorySettings) -> dict[str, Tensor]:
    """Token ids and labels, by the arguments of the model's forward; rows have no padding."""
    base = getattr(model, "get_base_model", lambda: model)()
    name, length = type(base).__name__, settings.length

    def ids(*shape: int) -> Tensor:
        return torch.empty(settings.batch, *shape, dtype=torch.long)

    if name.endswith("ForQuestionAnswering"):
        return {"input_ids": ids(length), "start_positions": ids(), "end_positions": ids()}
    if name.endswith("ForSequenceClassification"):
        return {"input_ids": ids(length), "labels": ids()}
    encodes = base.config.is_encoder_decoder
    return {"input_ids": ids(length), "labels": ids(settings.target_length or length if encodes else length)}


@contextmanager
def eager_rules(settings: MemorySettings) -> Iterator[None]:
    """Let libraries do with fake tensors what they do with real ones, within the context.

    transformers makes whole masks while it traces, which an eager run leaves out. bitsandbytes has other products in
    8 bits on a CPU.
    """
    replaced: list[tuple[Any, str, Any]] = [(import_utils, "is_fake_tensor", lambda tensor: False)]
    if settings.device == "cuda" and settings.quantization is not None:
        from bitsandbytes.autograd import _functions

        replaced.append((_functions, "MatMul8bitFp", _functions.MatMul8bitLt))
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    try:
        for owner, name, value in replaced:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
