"""The figures of a search's report, as SVG: the scores of a stage by constraint, and an architecture by layer."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hf_peft_ext.attach.config import PlacedConfig
from hf_peft_ext.attach.placement import Placement
from hf_peft_ext.hub_cards.figures import FAINT, INK

if TYPE_CHECKING:
    from hf_peft_ext.search.result import Decision

BEST = "#1f5fbf"
SUBLAYER_COLORS = {"bottleneck": "#d1495b", "low_rank": "#1f5fbf", "prefix": "#2e933c", "bias": "#8a5fbf"}
SHORT = {"bottleneck": "adapter", "low_rank": "LoRA", "prefix": "prefix", "bias": "BitFit"}
SIZE_OPTIONS = ("r", "num_virtual_tokens", "reduction_factor")  # the option with the size of a sub-layer


def stage_figure(scores: Mapping[str, Sequence[float]], decision: "Decision | None") -> Figure:
    """A row for each constraint: a dot for each sampled model, a bar for their mean; the winner in blue.

    Args:
        scores: constraint -> the scores of its models.
        decision: the stage's decision, or None before it.
    """
    figure = Figure(figsize=(8, 1.1 + 0.36 * max(2, len(scores))), layout="constrained")
    axes = figure.subplots()
    for place, (name, values) in enumerate(scores.items()):
        color = BEST if decision is not None and name == decision.winner else INK
        lifts = [0.12 * (i % 3 - 1) for i in range(len(values))]  # keeps equal scores apart
        axes.scatter(values, [place + lift for lift in lifts], s=18, color=color, alpha=0.45, linewidths=0)
        centre = sum(values) / len(values)
        axes.plot([centre, centre], [place - 0.32, place + 0.32], color=color, linewidth=2.2)
        axes.annotate(f"{centre:.3f}", (1.01, place), xycoords=("axes fraction", "data"), va="center", color=color)
    axes.set_yticks(range(len(scores)), list(scores), parse_math=False)
    axes.set_ylim(len(scores) - 0.4, -0.6)
    axes.set_xlabel("score, mean over the tasks")
    axes.grid(axis="x", color=FAINT, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    return figure


def architecture_figure(config: PlacedConfig, layers: int) -> Figure:
    """A column for each layer, a row for each sub-layer and site; the numbers are sizes.

    Args:
        config: the architecture.
        layers: number of layers of the base model.
    """
    cells: dict[str, dict[int, Placement]] = {}
    for placement in config.to_placements():
        row = SHORT[placement.sublayer]
        row += f", {placement.site.replace('_', ' ')}" if placement.sublayer in ("bottleneck", "low_rank") else ""
        for layer in range(layers) if placement.layers is None else placement.layers:
            cells.setdefault(row, {})[layer] = placement
    rows = sorted(cells, key=lambda row: list(SHORT.values()).index(row.partition(",")[0]))
    figure = Figure(figsize=(2.4 + 0.55 * layers, 1.0 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(rows):
        for layer in range(layers):
            placement = cells[row].get(layer)
            color = "#f1f2f5" if placement is None else SUBLAYER_COLORS[placement.sublayer]
            axes.add_patch(Rectangle((layer - 0.46, y - 0.42), 0.92, 0.84, facecolor=color, linewidth=0))
            if placement is not None:
                axes.text(layer, y, size_of(placement), ha="center", va="center", color="white", fontsize=9)
    axes.set_xlim(-0.6, layers - 0.4)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xticks(range(layers), [str(layer) for layer in range(layers)])
    axes.set_yticks(range(len(rows)), rows, parse_math=False)
    axes.set_xlabel("layer")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return figure


def size_of(placement: Placement) -> str:
    """Rank, width or number of virtual tokens, as text; empty for a bias."""
    return next((str(placement.options[name]) for name in SIZE_OPTIONS if placement.options.get(name)), "")


def svg(figure: Figure, name: str) -> str:
    """A figure as an element of a page; `name` makes its ids differ from those of other figures."""
    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    return text.getvalue().partition("<!DOCTYPE")[2].partition(">")[2]
