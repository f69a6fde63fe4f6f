"""Similarity of two adapters that were trained on models of different size: the paper's 75 %, beside chance levels.

The paper (Jin et al. 2023, Figure 1b) reports a cosine of up to 75 % between the modules of GPT2-base or -medium and
of GPT2-XL, and does not say how modules of 768 and of 1600 channels were compared. Two models that were trained
separately share no channels, so this compares the effect of the modules on the same texts. For layer i of b, and the
corresponding layer of a,

    D    the change that the adapter makes in the residual stream in that layer: block(x) with it minus block(x)
         without it, x being the block's input in the adapted model; a row for each token, shape: (rows, d)
    H    the block's output in the untouched model, centred, shape: (rows, d)
    Q    the orthogonal map from a's channels to b's that fits H best: argmin ||H_a Q - H_b||, from the singular
         vectors of H_a^T H_b (Procrustes)

    cosine = <D_a Q, D_b> / (||D_a Q|| ||D_b||)
    CKA    = ||D_a^T D_b||^2 / (||D_a^T D_a|| ||D_b^T D_b||), D centred

CKA (Kornblith et al. 2019, https://arxiv.org/abs/1905.00414) is a cosine of the matrices of similarities between
rows, and needs no map between channels. Both modules read the same texts, so they may be similar without training. The
chance level is that of untrained modules: the same tensors with their entries shuffled.

The chance level is about 0 for the cosine; a higher cosine means that the modules have an effect in common. For CKA it
is high: an untrained module echoes its input, which both models share, and a trained one responds to few directions of
it. Two trained modules can have a lower CKA than two untrained ones; CKA then says nothing about what they learnt. For
comparison, train the same module with several seeds.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from peft import PeftModel
from rich.table import Table
from torch import Tensor

from hf_peft_ext.model.structure import stacks
from hf_peft_ext.transfer.map.projections import Order, layer_map
from hf_peft_ext.transfer.residual_deltas import TokenBatch, base_states, deltas, shuffled
from hf_peft_ext.validation.checks import check, check_count

PAPER_COSINE = 0.75


@dataclass(frozen=True)
class LayerSimilarity:
    """The similarity in one layer of `b` and the corresponding one of `a`; a chance level for each draw."""

    layer_a: int
    layer_b: int
    cosine: float
    cka: float
    chance_cosine: list[float]
    chance_cka: list[float]


@dataclass(frozen=True)
class ModuleSimilarity:
    """The similarity of two adapters, layer by layer.

    Args:
        layers: the layers of `b` in which both adapters have an effect.
        rows: the number of tokens or texts.
    """

    layers: list[LayerSimilarity]
    rows: int

    @property
    def cosine(self) -> float:
        """The mean over layers."""
        return fmean(layer.cosine for layer in self.layers)

    @property
    def cka(self) -> float:
        """The mean over layers."""
        return fmean(layer.cka for layer in self.layers)

    @property
    def chance_cosine(self) -> float:
        """The mean over layers and draws."""
        return fmean(value for layer in self.layers for value in layer.chance_cosine)

    @property
    def chance_cka(self) -> float:
        """The mean over layers and draws."""
        return fmean(value for layer in self.layers for value in layer.chance_cka)

    def table(self) -> Table:
        """A row for each layer; chance levels as the mean and, in brackets, the maximum of the draws."""
        table = Table(title=f"Changes of the residual stream, {self.rows} rows")
        for column in ("layer of b", "of a", "cosine", "by chance", "CKA", "by chance"):
            table.add_column(column, justify="right")
        for layer in self.layers:
            chances = [f"{fmean(c):.2f} ({max(c):.2f})" for c in (layer.chance_cosine, layer.chance_cka)]
            table.add_row(str(layer.layer_b), str(layer.layer_a), f"{layer.cosine:.2f}", chances[0],
                          f"{layer.cka:.2f}", chances[1])  # fmt: skip
        table.add_section()
        table.add_row("mean", "", f"{self.cosine:.2f}", f"{self.chance_cosine:.2f}", f"{self.cka:.2f}",
                      f"{self.chance_cka:.2f}")  # fmt: skip
        return table

    def figure(self, path: str | Path) -> None:
        """Draw cosine and CKA by layer into a file, with the range of untrained modules.

        Needs matplotlib (`pip install "hf_peft_ext[figures]"`).
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 3.4), layout="constrained")
        at = [layer.layer_b for layer in self.layers]
        panels = {
            "cosine": ([layer.cosine for layer in self.layers], [layer.chance_cosine for layer in self.layers]),
            "CKA": ([layer.cka for layer in self.layers], [layer.chance_cka for layer in self.layers]),
        }
        for axes, (name, (values, chances)) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
            axes.fill_between(at, [min(c) for c in chances], [max(c) for c in chances], color="#c9ccd6", linewidth=0)
            axes.plot(at, [fmean(c) for c in chances], color="#7f7f7f", linewidth=1.2, label="untrained modules")
            axes.plot(at, values, color="#1f5fbf", linewidth=1.8, marker="o", markersize=4, label="trained modules")
            axes.axhline(0, color="#1a1a2e", linewidth=0.6)
            axes.axhline(PAPER_COSINE, color="#d1495b", linewidth=1, linestyle="--", label="the paper's 75 %")
            axes.set_title(name, loc="left", color="#1a1a2e")
            axes.set_xlabel("layer of the large model")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.spines[["top", "right"]].set_visible(False)
        figure.axes[0].legend(frameon=False, fontsize=9)
        figure.savefig(path, dpi=150)


def module_similarity(
    a: PeftModel,
    b: PeftModel,
    batches: Iterable[TokenBatch],
    batches_b: Iterable[TokenBatch] | None = None,
    draws: int = 5,
    order: Order = "interleaved",
    seed: int = 0,
) -> ModuleSimilarity:
    """The similarity of the active adapters of a small and a large model.

    Args:
        a: the small model with its adapter.
        b: the large model with its adapter.
        batches: the models' inputs, as mappings of tensors. Some thousand tokens at least: with fewer rows than
            channels, any two streams have a map between them.
        batches_b: the same texts for `b`, if it has another tokenizer; a row is then the mean over a text's tokens.
            None if both read the same tokens; a row is then a token that is no padding.
        draws: the number of untrained pairs for the chance level.
        order: which layer of `a` corresponds to a layer of `b` (see `layer_map`).
        seed: of the draws.

    Raises:
        TypeError: a model is not a `PeftModel`.
        ValueError: there are no rows, the models have different numbers of them, their stacks of layers do not
            correspond, or the adapters act together in no layer.
    """
    for name, model in (("a", a), ("b", b)):
        if not isinstance(model, PeftModel):
            raise TypeError(f"`{name}` must be a PeftModel, not {type(model).__name__}.")
    check_count("draws", draws)
    depths = [[len(stack) for _, stack in stacks(model.get_base_model())] for model in (a, b)]
    layers = layer_map(depths[0], depths[1], order)
    by_text, texts = batches_b is not None, list(batches)
    sides = [(a, texts), (b, list(batches_b or ()) if by_text else texts)]
    check("batches", texts, all(batch for _, batch in sides), "must hold at least one batch")
    states = [base_states(*side, by_text) for side in sides]
    rows = [len(side[0]) for side in states]
    check("batches_b", rows[1], rows[0] == rows[1], f"must hold as many texts as `batches`, {rows[0]}")
    of_a, of_b = (deltas(*side, by_text) for side in sides)
    pairs = [(i, j) for j, i in enumerate(layers) if of_a[i].any() and of_b[j].any()]
    check("a", a.active_adapter, bool(pairs), "and the adapter of `b` act together in no layer")
    maps = {j: procrustes(states[0][i], states[1][j]) for i, j in pairs}
    generator = torch.Generator().manual_seed(seed)
    untrained = [untrained_deltas(sides, by_text, generator) for _ in range(draws)]
    return ModuleSimilarity([
        LayerSimilarity(i, j, cosine(of_a[i] @ maps[j], of_b[j]), cka(of_a[i], of_b[j]),
                        [cosine(x[i] @ maps[j], y[j]) for x, y in untrained],
                        [cka(x[i], y[j]) for x, y in untrained])
        for i, j in pairs
    ], rows[0])  # fmt: skip


def untrained_deltas(
    sides: Sequence[tuple[PeftModel, list[TokenBatch]]], by_text: bool, generator: torch.Generator
) -> list[list[Tensor]]:
    """`deltas` of each side, with shuffled adapters, one after the other, since both may be the same model."""
    drawn = []
    for model, batches in sides:
        with shuffled(model, generator):
            drawn.append(deltas(model, batches, by_text))
    return drawn


def procrustes(
    x: Tensor,  # shape: (rows, d_a)
    y: Tensor,  # shape: (rows, d_b)
) -> Tensor:  # shape: (d_a, d_b)
    """Q = argmin ||x Q - y||, both centred, over maps with orthonormal rows, or columns if those are fewer."""
    u, _, v = torch.linalg.svd((x - x.mean(0)).T @ (y - y.mean(0)), full_matrices=False)
    return u @ v


def cosine(x: Tensor, y: Tensor) -> float:
    """<x, y> / (||x|| ||y||), all rows together."""
    return float((x * y).sum() / (x.norm() * y.norm()))


def cka(x: Tensor, y: Tensor) -> float:
    """||x^T y||^2 / (||x^T x|| ||y^T y||), x and y centred: linear CKA."""
    x, y = x - x.mean(0), y - y.mean(0)
    return float((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))
