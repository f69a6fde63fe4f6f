"""The figure of a measurement, as in Li et al. 2018: score against dimension."""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from hf_peft_ext.hub_cards.figures import COLORS, FAINT, INK
from hf_peft_ext.intrinsic_dimension.result import IntrinsicDimension

FIGURE_FILE = "intrinsic_dimension.svg"


def dimension_figure(results: Mapping[str, IntrinsicDimension]) -> Figure:
    """Score against d: a dot for each run, a line for the means, dashed lines for full fine-tuning and the threshold.

    A star marks the intrinsic dimension, with a bar for its interval.

    Args:
        results: label -> result; the scores must be of one kind.
    """
    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    axes = figure.subplots()
    for color, (label, result) in zip([INK, *COLORS] if len(results) == 1 else COLORS, results.items(), strict=False):
        for scores in result.scores.values():
            axes.scatter(list(scores), list(scores.values()), s=14, color=color, alpha=0.35, linewidths=0)
        means = result.means()
        axes.plot(list(means), list(means.values()), color=color, linewidth=1.5, label=label)
        axes.axhline(fmean(result.full.values()), color=color, linewidth=0.9)
        axes.axhline(result.threshold, color=color, linewidth=0.9, linestyle="dashed")
        if result.d is not None:
            axes.plot(result.d, result.threshold, "*", color=color, markersize=13, markeredgecolor="white")
            if result.interval is not None:
                axes.plot(result.interval, [result.threshold] * 2, color=color, linewidth=3, alpha=0.5)
    axes.set_xscale("log")
    axes.set_xlabel("d, trained numbers")
    axes.set_ylabel(next(iter(results.values())).score if results else "")
    axes.grid(color=FAINT, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0)
    if len(results) > 1:
        axes.legend(frameon=False, loc="lower right")
    return figure


def write_figure(result: IntrinsicDimension, folder: Path) -> Path:
    """Write `intrinsic_dimension.svg` into a folder, and return its path."""
    path = folder / FIGURE_FILE
    dimension_figure({"": result}).savefig(path, metadata={"Date": None})
    return path
