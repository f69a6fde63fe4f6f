"""The figures of a card: gates by layer and sub-layer, and losses by step.

They need matplotlib (`pip install "hf_peft_ext[figures]"`); without it a card has no figures.
"""

import io
import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING

from hf_peft_ext.hub_cards.markdown import single_line
from hf_peft_ext.hub_cards.record import TrainingRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GATES, LOSSES = "figures/gates.png", "figures/losses.png"
INK, FAINT, NONE = "#1a1a2e", "#c9ccd6", "#dcdce2"
COLORS = ("#1f5fbf", "#d1495b", "#2e933c", "#8a5fbf", "#e08e1b", "#17a2a2", "#8c564b", "#7f7f7f")
MAX_LABELLED = 16  # layers whose fields have room for a number
Points = list[tuple[float, float]]


def drawable(record: TrainingRecord) -> list[str]:
    """The names of the figures that a record has data for; empty without matplotlib."""
    if find_spec("matplotlib") is None:
        return []
    data = {GATES: gate_grid(record.gates), LOSSES: loss_curves(record)}
    return [name for name, values in data.items() if values]


def draw_figures(record: TrainingRecord) -> dict[str, bytes]:
    """Draw the figures of a record: file name -> PNG."""
    plots = {GATES: lambda: heat_map(gate_grid(record.gates)), LOSSES: lambda: curves(loss_curves(record))}
    return {name: png(plots[name]()) for name in drawable(record)}


def gate_grid(gates: Mapping[str, float]) -> dict[str, dict[int, float]]:
    """Sub-layer -> layer -> gate, from names such as "3.query_low_rank", see `gate_values`."""
    grid: dict[str, dict[int, float]] = {}
    for name, value in gates.items():
        if match := re.fullmatch(r"(?:.*?\.)??(\d+)\.(.+)", name, flags=re.DOTALL):
            grid.setdefault(match[2], {})[int(match[1])] = value
    return grid


def loss_curves(record: TrainingRecord) -> dict[str, Points]:
    """Name -> (step, value) of the losses in the log and of their terms, the training loss first."""
    curves: dict[str, Points] = {}
    for entry in record.history:
        for name, value in entry.items():
            if "step" in entry and ("loss" in name or name.removeprefix("eval_") in record.loss_terms):
                curves.setdefault(name, []).append((entry["step"], value))
    several = {name: points for name, points in curves.items() if len(points) > 1}
    return dict(sorted(several.items(), key=lambda item: (item[0] != "loss", item[0])))


def heat_map(grid: dict[str, dict[int, float]]) -> "Figure":
    """Draw gates as a heat map, sub-layers by layers."""
    from matplotlib.figure import Figure

    layers = sorted({layer for row in grid.values() for layer in row})
    size = (3.2 + 0.42 * max(6, min(len(layers), MAX_LABELLED)), 1.3 + 0.4 * len(grid))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    values = [[row.get(layer, float("nan")) for layer in layers] for row in grid.values()]
    image = axes.imshow(values, vmin=0, vmax=1, cmap="RdBu", aspect="auto")
    for y, row in enumerate(values if len(layers) <= MAX_LABELLED else []):
        for x, gate in enumerate(row):
            color = "white" if abs(gate - 0.5) > 0.3 else INK
            axes.text(x, y, f"{gate:.2f}" if gate == gate else "", ha="center", va="center", color=color, fontsize=9)
    axes.set_facecolor(NONE)  # for layers without the sub-layer
    every = -(-len(layers) // (2 * MAX_LABELLED))
    axes.set_xticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
    axes.set_yticks(range(len(grid)), [label(sublayer) for sublayer in grid], parse_math=False)
    axes.set_xlabel("layer")
    axes.set_title("How far each gate is open", loc="left", color=INK)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ticks=[0, 0.5, 1])
    bar.ax.set_yticklabels(["0  shut", "0.5", "1  open"])
    bar.ax.tick_params(length=0)
    return figure


def curves(losses: dict[str, Points]) -> "Figure":
    """Draw losses over the steps."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for color, (name, points) in zip(COLORS, losses.items(), strict=False):
        steps, values = zip(*points, strict=True)
        title = {"loss": "training", "eval_loss": "evaluation"}.get(name) or label(name)
        (line,) = axes.plot(steps, values, color=color, linewidth=1.8, marker="o" if len(steps) < 40 else None, ms=3.5)
        line.set_label(title)
    legend = axes.legend(frameon=False, labelcolor="linecolor", loc="upper left", bbox_to_anchor=(1, 1))
    for text in legend.get_texts():
        text.set_parse_math(False)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.set_title("Loss", loc="left", color=INK)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    return figure


def label(name: str) -> str:
    """A name for a figure: short, in ASCII, which every font has."""
    text = "".join(c if c.isascii() else "?" for c in single_line(name)).replace("_", " ").strip()
    return text if len(text) <= 40 else f"{text[:37]}..."


def png(figure: "Figure") -> bytes:
    """A figure as PNG, with the same bytes for every version of matplotlib's metadata."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()
