"""The table of the plug-in study."""

from statistics import mean, stdev

from plug_in_conditions import CONDITIONS
from runs import Row


def label(row: Row) -> str:
    return ", ".join(filter(None, (row["condition"], row["module"], row["init"], row["bridge"])))


def by_condition(rows: list[Row]) -> dict[str, list[Row]]:
    """Label -> its rows, in the order of `CONDITIONS`."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: CONDITIONS.index(row["condition"])):
        found.setdefault(label(row), []).append(row)
    return found


def table(rows: list[Row]) -> str:
    """By task: accuracy in % (mean ± standard deviation over seeds), AUC and margin, and the mean gain over the
    untouched model with its standard error, at scale 1 and at the scale chosen on dev rows; seconds.
    """
    tasks = sorted({row["task"] for row in rows})
    base = {(row["task"], row["seed"]): float(row["accuracy"]) for row in rows if row["condition"] == "untouched"}
    columns = [f"{task}: {what}" for task in tasks for what in ("accuracy / AUC / margin", "gain / safe gain")]
    lines = [f"| condition | {' | '.join(columns)} | s |", "|---" + "|--:" * (len(columns) + 1) + "|"]
    for name, found in by_condition(rows).items():
        cells = [name]
        for task in tasks:
            here = [row for row in found if row["task"] == task]
            accuracy, auc, margin = ([float(row[x]) for row in here] for x in ("accuracy", "auc", "margin"))
            cells.append(f"{spread(accuracy, 100)} / {mean(auc):.3f} / {mean(margin):+.2f}" if here else "")
            gains = [gain(here, column, base) for column in ("accuracy", "safe")]
            cells.append(" / ".join(filter(None, gains)) if name != "untouched" else "")
        cells.append(f"{mean(float(row['seconds']) for row in found):.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def gain(rows: list[Row], column: str, base: dict[tuple[str, str], float]) -> str:
    """Of one task, in points."""
    pairs = [(row[column], base.get((row["task"], row["seed"]))) for row in rows]
    gains = [100 * (float(x) - b) for x, b in pairs if x != "" and b is not None]
    error = f" ± {stdev(gains) / len(gains) ** 0.5:.1f}" if len(gains) > 1 else ""
    return f"{mean(gains):+.1f}{error}" if gains else ""


def spread(values: list[float], factor: float) -> str:
    values = [factor * value for value in values]
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")
