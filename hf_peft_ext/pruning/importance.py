"""Importance scores of the rows and columns of a model's projections.

    fisher       score of w = 1/N sum_i (d log p(y_i | x_i) / dw)^2   true labels; needs gradients
    activation   score of a channel = 1/N sum_i mean over tokens of x^2    inputs for columns, outputs for rows
    magnitude    score of w = w^2                                          needs no data

A row's score is the sum over the row, a column's the sum over the column. Fisher is Eq. 1 of the plug-in paper (Jin et
al. 2023) with the mean over examples, not over batches, and without storing weight gradients: an example's gradient is
G = g^T x, of its inputs x (length, d_in) and its output gradients g (length, d_out), so that

    row sums of G^2 = columnwise sums of g * (x x^T) g,     column sums of G^2 = columnwise sums of x * (g g^T) x,

which needs length^2 numbers an example instead of d_in d_out. Weights may be frozen or 4-bit.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from hf_peft_ext.model.calls import own_modules
from hf_peft_ext.model.modes import frozen
from hf_peft_ext.model.quantization import keep_4bit_trainable, plain_weight
from hf_peft_ext.model.sites import find_sites, input_embeddings
from hf_peft_ext.model.structure import covers, innermost, leaf_size
from hf_peft_ext.validation.checks import check

Kind = Literal["fisher", "activation", "magnitude"]
Batch = Mapping[str, Tensor]
LogLikelihood = Callable[[Any, Batch], Tensor]


@dataclass
class Importance:
    """Scores of rows and columns.

    Args:
        kind: how they were computed.
        rows: path of a linear leaf, or of an embedding of tokens -> a score for each channel of its output.
        columns: path of a linear leaf -> a score for each channel of its input.
        examples: number of examples in the average.
        peak_memory: peak bytes during the computation: on a GPU torch's allocations, on a CPU the resident size of the
            process, which includes earlier peaks; None where the system does not report it.
    """

    kind: Kind
    rows: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    examples: int = 0
    peak_memory: int | None = None

    def add(self, path: str, rows: Tensor | None, columns: Tensor | None) -> None:
        """Add scores to those of a module; None leaves a table unchanged."""
        for table, scores in ((self.rows, rows), (self.columns, columns)):
            if scores is not None:
                table[path] = table[path] + scores if path in table else scores


def importance(
    model: PreTrainedModel,
    batches: Iterable[Batch] | None = None,
    kind: Kind = "fisher",
    log_likelihood: LogLikelihood | None = None,
) -> Importance:
    """The importance of every row and column of the linear leaves of a model, and of its token embeddings' channels.

    Args:
        model: any transformers model, quantized or not. It is not changed.
        batches: mappings of tensors, as the model takes them, with `labels` for "fisher". Not needed for "magnitude".
        kind: "fisher", "activation" or "magnitude".
        log_likelihood: (model, batch) -> log p(y | x) of each example, for "fisher"; None for that of `labels`: class
            indices, or tokens with -100 where none is predicted.

    Where a weight is used twice, such as an embedding tied to the head, each use counts separately, except for
    "magnitude".

    Raises:
        ValueError: `kind` is unknown, there is no example, labels are missing or are not indices, or the input of a
            leaf has no axis of examples (as in the experts of a mixture).
    """
    check("kind", kind, kind in get_args(Kind), f"must be one of {', '.join(get_args(Kind))}")
    totals = Importance(kind)
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if kind == "magnitude":
        add_magnitudes(model, totals)
    else:
        check("batches", batches, batches is not None, f"must be given for {kind}")
        keep_4bit_trainable(model)
        with frozen(model):
            for batch in batches or ():
                batch = {key: value.to(device) for key, value in batch.items()}
                add_batch(model, batch, totals, log_likelihood or log_likelihood_of_labels)
        check("batches", batches, totals.examples > 0, "must hold at least one example")
        for scores in (*totals.rows.values(), *totals.columns.values()):
            scores.div_(totals.examples)
    totals.peak_memory = peak_memory(device)
    return totals


def add_batch(model: PreTrainedModel, batch: Batch, totals: Importance, log_likelihood: LogLikelihood) -> None:
    """Add the scores of the examples of one batch, by gradients or by activations."""
    examples = len(next(iter(batch.values())))
    if totals.kind == "fisher":
        add_fisher(model, batch, examples, totals, log_likelihood)
    else:
        add_activations(model, batch, examples, totals)
    totals.examples += examples


def log_likelihood_of_labels(model: PreTrainedModel, batch: Batch) -> Tensor:
    """log p(labels | inputs) of each example, shape: (batch,); a sum over the tokens where labels are tokens.

    Raises:
        ValueError: the batch has no labels, or they are not indices.
    """
    check("batches", sorted(batch), "labels" in batch, 'must have "labels", or `log_likelihood` must be given')
    labels = batch["labels"]
    check("labels", labels.dtype, not labels.is_floating_point(), "must be indices; else give `log_likelihood`")
    # T5 derives the decoder's input from the labels; the others need not compute a loss
    inputs = batch if model.config.is_encoder_decoder else {k: v for k, v in batch.items() if k != "labels"}
    logits = model(**inputs).logits
    if labels.ndim == 2 and type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        logits, labels = logits[:, :-1], labels[:, 1:]
    scores = -F.cross_entropy(wide(logits.flatten(0, -2)), labels.flatten(), ignore_index=-100, reduction="none")
    return scores.view(len(labels), -1).sum(dim=1)


def add_fisher(
    model: PreTrainedModel, batch: Batch, examples: int, totals: Importance, log_likelihood: LogLikelihood
) -> None:
    """The squared gradients of the examples of one batch, summed over rows and columns."""

    def watch_leaf(path: str, x: Tensor, output: Tensor) -> None:
        if output.requires_grad:
            x = by_example(path, x.detach(), examples)
            output.register_hook(lambda g: totals.add(path, *squared_sums(x, by_example(path, g, examples))))

    def watch_embedding(path: str, ids: Tensor, output: Tensor) -> Tensor:
        same = (ids[:, :, None] == ids[:, None]).to(wide(output).dtype)  # x x^T of one-hot inputs

        def add(g: Tensor) -> None:
            totals.add(path, (wide(g) * (same @ wide(g))).sum(dim=(0, 1)), None)

        output = output.detach().requires_grad_()  # gradients start here, since all weights are frozen
        output.register_hook(add)
        return output

    with torch.enable_grad(), hooked(leaves(model), watch_leaf), hooked(token_embeddings(model), watch_embedding):
        log_likelihood(model, batch).sum().backward()


def squared_sums(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The row sums and column sums of G^2, G = g^T x, of each example, summed over examples.

    Args:
        x: inputs, shape: (examples, length, d_in).
        g: gradients of the outputs, shape: (examples, length, d_out).
    """
    x, g = wide(x), wide(g)
    rows = (g * (x @ x.mT @ g)).sum(dim=(0, 1))  # shape: (d_out,)
    columns = (x * (g @ g.mT @ x)).sum(dim=(0, 1))  # shape: (d_in,)
    return rows.clamp(min=0), columns.clamp(min=0)  # rounding may make a sum of squares negative


def add_activations(model: PreTrainedModel, batch: Batch, examples: int, totals: Importance) -> None:
    """The mean square, over an example's tokens, of the inputs and outputs of each leaf."""
    masks = TokenMasks(model, batch)

    def watch(path: str, x: Tensor, output: Tensor) -> None:
        def mean_square(y: Tensor) -> Tensor:
            y = wide(by_example(path, y, examples))
            return (masks.weights(path, y) * y.square()).sum(dim=(0, 1))

        totals.add(path, mean_square(output), None if x.dtype == torch.long else mean_square(x))

    with torch.no_grad(), hooked([*leaves(model), *token_embeddings(model)], watch):
        model(**batch)


class TokenMasks:
    """Weights of the tokens of a batch, zero on padding, for the encoder and the decoder of a model."""

    def __init__(self, model: PreTrainedModel, batch: Batch):
        two = bool(model.config.is_encoder_decoder)
        encoder = model.get_encoder() if two else None
        self.encoder = tuple(path for path, module in model.named_modules() if two and module is encoder)
        self.encoder += tuple(site.host for site in find_sites(model) if two and site.of_encoder)
        self.inputs = batch.get("attention_mask")
        labels = batch.get("labels")
        targets = batch.get("decoder_attention_mask", labels != -100 if labels is not None else None)
        self.outputs = targets if two else self.inputs

    def weights(self, path: str, y: Tensor) -> Tensor:
        """1 / number of tokens at each token, 0 at padding, shape: (examples, length, 1)."""
        mask = self.inputs if covers(self.encoder, path) else self.outputs
        if mask is None or mask.shape != y.shape[:2]:  # a pooled vector, or no padding
            mask = y.new_ones(y.shape[:2])
        return (mask / mask.sum(dim=1, keepdim=True).clamp(min=1)).unsqueeze(-1).to(y.dtype)


def add_magnitudes(model: PreTrainedModel, totals: Importance) -> None:
    """The squares of the weights, dequantized one leaf at a time; of tied weights the first counts."""
    seen: set[Any] = set()
    for path, module in [*leaves(model), *token_embeddings(model)]:
        if module.weight in seen:
            continue
        seen.add(module.weight)
        squares = wide(plain_weight(module)).square()  # shape: (d_out, d_in)
        if isinstance(module, (Conv1D, nn.Embedding)):
            squares = squares.T
        totals.add(path, squares.sum(dim=1), None if isinstance(module, nn.Embedding) else squares.sum(dim=0))


def leaves(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The linear leaves of a model, inside any tuner layers around them."""
    return [(path, innermost(module)) for path, module in own_modules(model) if leaf_size(module)]


def token_embeddings(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The embeddings of tokens: T5 has one for each stack, tied to each other."""
    weight = getattr(input_embeddings(model), "weight", None)
    return [(path, module) for path, module in own_modules(model)
            if isinstance(module, nn.Embedding) and module.weight is weight]  # fmt: skip


@contextmanager
def hooked(modules: Iterable[tuple[str, nn.Module]], hook: Callable[[str, Tensor, Tensor], Any]) -> Iterator[None]:
    """Call hook(path, input, output) at each forward of these modules."""

    def at(path: str, module: nn.Module) -> RemovableHandle:
        def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Any:
            return hook(path, inputs[0], output)

        return module.register_forward_hook(after)

    handles = [at(path, module) for path, module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def by_example(path: str, y: Tensor, examples: int) -> Tensor:
    """The input or output of a leaf with an axis of examples, shape: (examples, length, d).

    Raises:
        ValueError: the first axis is not the examples.
    """
    if examples > 1 and y.shape[0] != examples:
        raise ValueError(f"`model` runs {path} on {tuple(y.shape)}, without an axis of {examples} examples, so their "
                         "gradients cannot be separated; use batches of one example.")  # fmt: skip
    return y.reshape(examples, -1, y.shape[-1])


def wide(y: Tensor) -> Tensor:
    """At least single precision: squares of gradients exceed the range of 16 bits."""
    return y.to(torch.promote_types(y.dtype, torch.float32))


def peak_memory(device: torch.device) -> int | None:
    """Peak bytes so far: torch's allocations on a GPU, else the resident size of the process; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
