"""The memory of methods as stacked bars. Needs the extra `figures`."""

from collections.abc import Mapping

from matplotlib.figure import Figure

from hf_peft_ext.budget.memory.cards import card_bytes
from hf_peft_ext.budget.memory.estimate import PART_TITLES, MemoryEstimate
from hf_peft_ext.hub_cards.figures import FAINT, INK

PART_COLORS = {
    "weights": "#4d5566",
    "quantization_constants": "#8791a5",
    "adapter_weights": "#1f5fbf",
    "gradients": "#2e933c",
    "optimizer_states": "#e0a030",
    "activations": "#d1495b",
    "logits_and_loss": "#8a5fbf",
    "temporaries": "#e8a5ae",
    "framework": "#d5d8df",
}


def memory_figure(estimates: Mapping[str, MemoryEstimate], card: str | int | None = None) -> Figure:
    """A bar for each estimate, made of its parts in GiB; a line at the memory of a card.

    Args:
        estimates: title -> estimate.
        card: as in `MemoryEstimate.largest`.

    Raises:
        ValueError: there is no such card.
    """
    limit = None if card is None else card_bytes(card) / 2**30
    figure = Figure(figsize=(8, 1.4 + 0.42 * len(estimates)), layout="constrained")
    axes = figure.subplots()
    ends = [0.0] * len(estimates)
    for part, title in PART_TITLES.items():
        widths = [estimate.parts[part] / 2**30 for estimate in estimates.values()]
        if any(widths):
            axes.barh(range(len(ends)), widths, 0.68, left=ends, color=PART_COLORS[part], label=title)
            ends = [end + width for end, width in zip(ends, widths, strict=True)]
    for place, end in enumerate(ends):
        axes.annotate(f" {end:.3g}", (end, place), va="center", color=INK, fontsize=9)
    if limit is not None:
        axes.axvline(limit, color=INK, linewidth=1, linestyle="--")
        axes.annotate(f" {card}", (limit, -0.55), color=INK, fontsize=9)
    axes.set_yticks(range(len(ends)), list(estimates), parse_math=False)
    axes.set_ylim(len(ends) - 0.4, -0.7)
    axes.set_xlim(0, 1.08 * max(*ends, limit or 0))
    axes.set_xlabel("GiB at the peak of a training step")
    axes.grid(axis="x", color=FAINT, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return figure
