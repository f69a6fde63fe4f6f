"""peft's tuner of (IA)^3, that knows two things more: what a `TFewConfig` means, and batches that mix adapters."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import peft
import torch
from peft.tuners.ia3.layer import IA3Layer, _ConvNd
from torch import Tensor, nn

from hf_peft_ext.attach.mixed_batch import check_adapter_names, check_unmerged, each_row, mixed_batch
from hf_peft_ext.model.quantization import keep_4bit_trainable
from hf_peft_ext.tuners.ia3.config import meet


class IA3Model(peft.IA3Model):
    """Takes the place of `peft.IA3Model`, so that `TFewConfig` and `adapter_names` work wherever (IA)^3 does."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Attach an adapter. With a `TFewConfig`, every error is raised before the model is changed.

        Raises:
            ValueError: see `tuners.ia3.config.resolve_targets`.
        """
        self.peft_config[adapter_name], kept = meet(model, cast(Any, self.peft_config[adapter_name]))
        keep_4bit_trainable(model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        for path, rows in kept.items():
            layer = model.get_submodule(path)
            layer.register_forward_pre_hook(partial(keep_at_one, adapter_name, rows))
            layer.register_state_dict_pre_hook(partial(keep_at_one, adapter_name, rows))

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        check_adapter_names(names, self.peft_config)
        layers = {path: m for path, m in self.model.named_modules() if isinstance(m, IA3Layer)}
        check_unmerged(layers.values())
        self._check_not_recomputed()
        check_no_experts(layers, names)
        rows = Rows(names)
        with ExitStack() as stack:
            stack.enter_context(mixed_batch(self.model, names, args, kwargs))
            for layer in layers.values():
                if not layer.disable_adapters:
                    stack.enter_context(scaled_by_row(layer, rows))
            yield

    def _check_not_recomputed(self) -> None:
        """Refuse gradient checkpointing, which runs the blocks again in the backward without the rows' names."""
        recomputed = any(getattr(m, "gradient_checkpointing", False) and m.training for m in self.model.modules())
        if recomputed and torch.is_grad_enabled():
            raise ValueError("`adapter_names` cannot be trained under gradient checkpointing; switch it off.")


def check_no_experts(layers: dict[str, Any], names: Sequence[str]) -> None:
    """Refuse vectors on experts of a mixture: they receive single tokens, whose rows are not known.

    Raises:
        ValueError: an adapter of the batch has such a vector.
    """
    for path, layer in layers.items():
        if "experts" in path.split(".") and not layer.ia3_l.keys().isdisjoint(names):
            raise ValueError(f"`adapter_names` (={list(names)}) cannot be mixed at {path}, which reads single tokens.")


class Rows:
    """The adapter of each row of a batch.

    Args:
        names: the adapter of each row.
    """

    def __init__(self, names: Sequence[str]):
        self.names, self.adapters = names, list(dict.fromkeys(names))
        self.cached: dict[tuple[int, torch.device], Tensor] = {}

    def index(self, rows: int, device: torch.device) -> Tensor:
        """The index in `adapters` of the adapter of each row that a module reads, shape: (rows,)."""
        if (rows, device) not in self.cached:
            places = [self.adapters.index(name) for name in each_row(self.names, rows)]
            self.cached[rows, device] = torch.tensor(places, device=device)
        return self.cached[rows, device]


@contextmanager
def scaled_by_row(layer: Any, rows: Rows) -> Iterator[None]:
    """Within, a layer of (IA)^3 scales each row of its batch by the vector of that row's adapter."""

    def scale(
        x: Tensor,  # shape: (rows, ..., d), or (rows, d, ...) where the layer is a convolution
    ) -> Tensor:  # shape: as x
        vectors = [layer.ia3_l[name].flatten() if name in layer.ia3_l else None for name in rows.adapters]
        first = next((vector for vector in vectors if vector is not None), None)
        if first is None:
            return x
        table = torch.stack([torch.ones_like(first) if v is None else v for v in vectors])  # shape: (adapters, d)
        shape = [len(x), *(1 for _ in x.shape[1:])]
        shape[1 if isinstance(layer, _ConvNd) else -1] = table.shape[1]
        return (x * table[rows.index(len(x), x.device)].view(shape)).to(x.dtype)

    def before(layer: nn.Module, args: tuple[Any, ...]) -> Any:
        return (scale(args[0]), *args[1:])

    def after(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return scale(output)

    active = layer._active_adapter
    handle = layer.register_forward_pre_hook(before) if layer.is_feedforward else layer.register_forward_hook(after)
    layer._active_adapter = []
    try:
        yield
    finally:
        layer._active_adapter = active
        handle.remove()


@torch.compiler.disable  # it cannot trace a hook on a vector
def keep_at_one(adapter_name: str, rows: Tensor, layer: Any, *_: Any) -> None:
    """Keep these rows of an adapter's vector at one while it is trained: they get no gradient, and no weight decay."""
    vector = layer.ia3_l[adapter_name] if adapter_name in layer.ia3_l else None
    if vector is None or not vector.requires_grad:
        return
    rows = rows.to(vector.device)
    vector.data.index_fill_(0, rows, 1.0)
    if not hasattr(vector, "keeps_rows"):  # a copy of the vector has no hook, and no mark either
        vector.keeps_rows = vector.register_hook(lambda gradient: gradient.index_fill(0, rows, 0.0))
