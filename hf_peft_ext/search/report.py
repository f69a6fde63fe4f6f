"""The report of a search: one self-contained HTML page, and a CSV file beside it."""

from pathlib import Path
from statistics import mean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hf_peft_ext.attach.config import PlacedConfig
from hf_peft_ext.search.figures import architecture_figure, stage_figure, svg
from hf_peft_ext.search.result import SearchResult

PAGE, RUNS = "report.html", "runs.csv"


def write_report(result: SearchResult, folder: str | Path) -> Path:
    """Write the report of a search, finished or not: `report.html`, and `runs.csv` with a row for each run.

    Args:
        result: the search.
        folder: is created if it is missing.

    Returns:
        The path of the page.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    result.to_csv(folder / RUNS)
    page = folder / PAGE
    page.write_text(report_page(result), encoding="utf-8")
    return page


def report_page(result: SearchResult) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html.jinja").render(
        result=result,
        stages=[stage_values(result, name) for name in result.stages],
        architecture=architecture_svg(result),
        cost=search_cost(result),
        tasks=result.tasks,
        mean=mean,
    )


def stage_values(result: SearchResult, name: str) -> dict[str, Any]:
    """The values of a stage that the page shows."""
    decision = next((decision for decision in result.decisions if decision.stage == name), None)
    scores, records = result.scores(name), result.of(name)
    figure = svg(stage_figure(scores, decision), f"{result.study_name} {name}") if scores else ""
    return {"name": name, "decision": decision, "scores": scores, "records": records, "figure": figure}


def architecture_svg(result: SearchResult) -> str:
    """The resulting config as an SVG figure; empty while the search is unfinished, or if the config has no layers."""
    if result.config_values is None or not isinstance(result.config, PlacedConfig):
        return ""
    return svg(architecture_figure(result.config, result.protocol["layers"]), f"{result.study_name} result")


def search_cost(result: SearchResult) -> dict[str, Any]:
    """Time, workers and seeds of the search so far."""
    states = [record.state for record in result.records]
    return {
        "states": {state: states.count(state) for state in dict.fromkeys(states)},
        "seconds": sum(record.seconds or 0 for record in result.records),
        "workers": len({record.worker for record in result.records if record.worker}),
        "seeds": sorted({record.run.seed for record in result.records}),
    }
