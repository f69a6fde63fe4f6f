"""The report of a comparison: one self-contained HTML page with a figure."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from hf_peft_ext.compare.result import MethodComparison
from hf_peft_ext.hub_cards.figures import FAINT, INK
from hf_peft_ext.search.figures import BEST, svg

COMPARE_PAGE = "compare.html"


def write_page(result: MethodComparison, folder: Path) -> Path:
    """Write `compare.html` into a folder, and return its path."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = folder / COMPARE_PAGE
    text = environment.get_template("compare.html.jinja").render(
        result=result,
        rows=list(zip(result.methods, result.table(), strict=True)),
        figure=svg(score_figure(result), "compare scores") if any(m.scores for m in result.methods) else "",
    )
    page.write_text(text, encoding="utf-8")
    return page


def score_figure(result: MethodComparison) -> Figure:
    """A row for each method: a dot for each seed, a bar for the mean, a line for its 95 % interval."""
    shown = [method for method in result.methods if method.scores]
    figure = Figure(figsize=(8, 1.1 + 0.4 * max(2, len(shown))), layout="constrained")
    axes = figure.subplots()
    for place, method in enumerate(shown):
        color = BEST if method.name == result.winner else INK
        values = list(method.scores.values())
        axes.scatter(values, [place] * len(values), s=20, color=color, alpha=0.45, linewidths=0)
        mean = method.mean or 0.0
        axes.plot([mean, mean], [place - 0.28, place + 0.28], color=color, linewidth=2.2)
        if method.interval is not None:
            axes.plot(method.interval, [place, place], color=color, linewidth=1)
        axes.annotate(f"{mean:.3f}", (1.01, place), xycoords=("axes fraction", "data"), va="center", color=color)
    scores = [score for method in shown for score in method.scores.values()]
    margin = 0.6 * (max(scores) - min(scores)) or 0.1  # intervals of few seeds may be far wider than the scores
    axes.set_xlim(min(scores) - margin, max(scores) + margin)
    axes.set_yticks(range(len(shown)), [method.title for method in shown], parse_math=False)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlabel(f"{result.score} on the dev rows")
    axes.grid(axis="x", color=FAINT, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    return figure
