"""How much each row and column of a model's projections matters.

    fisher       score of w = 1/N sum_i (d log p(y_i | x_i) / dw)^2   true labels; needs gradients
    activation   score of a channel = 1/N sum_i mean over tokens of x^2    inputs for columns, outputs for rows
    magnitude    score of w = w^2                                          needs no data

A row's score is the sum over the row, a column's the sum over the column. Fisher is Eq. 1 of the plug-in paper (Jin et
al. 2023) with the mean over examples, not over batches, and without a weight gradient ever being stored: an example's
gradient is G = g^T x, of its inputs x (length, d_in) and its output gradients g (length, d_out), so that

    row sums of G^2 = columnwise sums of g * (x x^T) g,     column sums of G^2 = columnwise sums of x * (g g^T) x,

which needs length^2 numbers an example instead of d_in d_out. Frozen and 4-bit weights are as good as any.
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

from hf_peft_ext.model.modes import frozen
from hf_peft_ext.model.quantization import keep_4bit_trainable, plain_weight
from hf_peft_ext.model.sites import find_sites
from hf_peft_ext.model.structure import covers, innermost, leaf_size, own_modules
from hf_peft_ext.validation.checks import check

Kind = Literal["fisher", "activation", "magnitude"]
Batch = Mapping[str, Tensor]
LogLikelihood = Callable[[Any, Batch], Tensor]


@dataclass
class Importance:
    """Scores of rows and columns.

    Args:
        kind: how they were made.
        rows: path of a linear leaf, or of an embedding of tokens -> a score for each channel of its output.
        columns: path of a linear leaf -> a score for each channel of its input.
        examples: over how many examples they were averaged.
        peak_memory: bytes held at most while they were made: on a GPU what torch had allocated, on a CPU the resident
            size of the process, which counts what ran before; None where the system does not tell.
    """

    kind: Kind
    rows: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    examples: int = 0
    peak_memory: int | None = None

    def add(self, path: str, rows: Tensor | None, columns: Tensor | None) -> None:
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
        model: any transformers model, quantised or not. It is left as it was.
        batches: mappings of tensors, as the model takes them, with `labels` for "fisher". Not needed for "magnitude".
        kind: "fisher", "activation" or "magnitude".
        log_likelihood: (model, batch) -> log p(y | x) of each example, for "fisher"; None for that of `labels`: class
            indices, or tokens with -100 where none is predicted.

    Where a weight is used twice, as an embedding tied to the head, each use counts by itself, but for "magnitude".

    Raises:
        ValueError: `kind` is unknown, there is no example, labels are missing or are no indices, or a leaf sees tokens
            without their examples (as the experts of a mixture do).
    """
    check("kind", kind, kind in get_args(Kind), f"must be one of {', '.join(get_args(Kind))}")
    found = Importance(kind)
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if kind == "magnitude":
        add_magnitudes(model, found)
    else:
        check("batches", batches, batches is not None, f"must be given for {kind}")
        keep_4bit_trainable(model)
        with frozen(model):
            for batch in batches or ():
                batch = {key: value.to(device) for key, value in batch.items()}
                examples = len(next(iter(batch.values())))
                if kind == "fisher":
                    add_fisher(model, batch, examples, found, log_likelihood or log_likelihood_of_labels)
                else:
                    add_activations(model, batch, examples, found)
                found.examples += examples
        check("batches", batches, found.examples > 0, "must hold at least one example")
        for table in (found.rows, found.columns):
            for scores in table.values():
                scores.div_(found.examples)
    found.peak_memory = peak_memory(device)
    return found


def log_likelihood_of_labels(model: PreTrainedModel, batch: Batch) -> Tensor:
    """log p(labels | inputs) of each example, shape: (batch,); a sum over the tokens where labels are tokens."""
    check("batches", sorted(batch), "labels" in batch, 'must have "labels", or `log_likelihood` must be given')
    labels = batch["labels"]
    check("labels", labels.dtype, not labels.is_floating_point(), "must be indices; else give `log_likelihood`")
    # T5 makes the decoder's input of the labels; the others need not compute a loss
    inputs = batch if model.config.is_encoder_decoder else {k: v for k, v in batch.items() if k != "labels"}
    logits = model(**inputs).logits
    if labels.ndim == 2 and type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        logits, labels = logits[:, :-1], labels[:, 1:]
    scores = -F.cross_entropy(wide(logits.flatten(0, -2)), labels.flatten(), ignore_index=-100, reduction="none")
    return scores.view(len(labels), -1).sum(dim=1)


def add_fisher(
    model: PreTrainedModel, batch: Batch, examples: int, found: Importance, log_likelihood: LogLikelihood
) -> None:
    """The squared gradients of the examples of one batch, summed over rows and columns."""

    def watch_leaf(path: str, x: Tensor, output: Tensor) -> None:
        if output.requires_grad:
            x = by_example(path, x.detach(), examples)
            output.register_hook(lambda g: found.add(path, *squared_sums(x, by_example(path, g, examples))))

    def watch_embedding(path: str, ids: Tensor, output: Tensor) -> Tensor:
        same = (ids[:, :, None] == ids[:, None]).to(wide(output).dtype)  # x x^T of one-hot inputs

        def add(g: Tensor) -> None:
            found.add(path, (wide(g) * (same @ wide(g))).sum(dim=(0, 1)), None)

        output = output.detach().requires_grad_()  # gradients begin here: no weight has any
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
    return rows.clamp(min=0), columns.clamp(min=0)  # a sum of squares, but for rounding


def add_activations(model: PreTrainedModel, batch: Batch, examples: int, found: Importance) -> None:
    """The mean square over an example's tokens of what goes into each leaf, and of what comes out."""
    masks = TokenMasks(model, batch)

    def watch(path: str, x: Tensor, output: Tensor) -> None:
        def mean_square(y: Tensor) -> Tensor:
            y = wide(by_example(path, y, examples))
            return (masks.weights(path, y) * y.square()).sum(dim=(0, 1))

        found.add(path, mean_square(output), None if x.dtype == torch.long else mean_square(x))

    with torch.no_grad(), hooked([*leaves(model), *token_embeddings(model)], watch):
        model(**batch)


class TokenMasks:
    """Which tokens of a batch count, on the encoder's side of a model and on the decoder's."""

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
        """1 / number of tokens on each token that counts, shape: (examples, length, 1)."""
        mask = self.inputs if covers(self.encoder, path) else self.outputs
        if mask is None or mask.shape != y.shape[:2]:  # a pooled vector, or everything counts
            mask = y.new_ones(y.shape[:2])
        return (mask / mask.sum(dim=1, keepdim=True).clamp(min=1)).unsqueeze(-1).to(y.dtype)


def add_magnitudes(model: PreTrainedModel, found: Importance) -> None:
    """The squares of the weights, leaf by leaf, so that one at a time is dequantised; of tied ones the first."""
    seen: set[Any] = set()
    for path, module in [*leaves(model), *token_embeddings(model)]:
        if module.weight in seen:
            continue
        seen.add(module.weight)
        squares = wide(plain_weight(module)).square()  # shape: (d_out, d_in)
        if isinstance(module, (Conv1D, nn.Embedding)):
            squares = squares.T
        found.add(path, squares.sum(dim=1), None if isinstance(module, nn.Embedding) else squares.sum(dim=0))


def leaves(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The linear leaves of a model, inside the tuners that have wrapped them."""
    return [(path, innermost(module)) for path, module in own_modules(model) if leaf_size(module)]


def token_embeddings(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The embeddings of tokens: T5 has one for each stack, tied to each other."""
    weight = innermost(model.get_input_embeddings()).weight
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
    """What a leaf reads or writes, shape: (examples, length, d)."""
    if examples > 1 and y.shape[0] != examples:
        raise ValueError(f"`model` runs {path} on {tuple(y.shape)}, without the {examples} examples in front, so "
                         "their gradients cannot be told apart; batches of one example can be.")  # fmt: skip
    return y.reshape(examples, -1, y.shape[-1])


def wide(y: Tensor) -> Tensor:
    """In single precision at least: squares of gradients leave the range of 16 bits."""
    return y.to(torch.promote_types(y.dtype, torch.float32))


def peak_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
