"""The parts of a card as Markdown, for its template."""

import re
from collections.abc import Mapping, Sequence
from math import nan
from typing import Any

from huggingface_hub.utils import yaml_dump

from hf_peft_ext.hub_cards import figures, methods
from hf_peft_ext.hub_cards.markdown import BYTES, SECONDS, cell, code, fenced, in_units, listed, number, table, whole
from hf_peft_ext.hub_cards.metadata import base_model
from hf_peft_ext.hub_cards.methods import METHOD_TEXTS
from hf_peft_ext.hub_cards.record import DatasetRecord, Result, TrainingRecord
from hf_peft_ext.hub_cards.redact import in_text, without_places
from hf_peft_ext.hub_cards.saved_adapter import SavedAdapter
from hf_peft_ext.hub_cards.snippet import base_class, is_embedding, ranks_choices, snippet
from hf_peft_ext.validation.checks import is_hub_id

METHOD_TITLES = {"adapter": "this adapter", "original": "original adapter", "lora": "LoRA", "base": "base model"}
VERSION = re.compile(r"[0-9][0-9a-z.+]*")
HUB = "https://huggingface.co"


def values(
    adapter: SavedAdapter, record: TrainingRecord, repo_id: str | None, subfolder: str | None = None
) -> dict[str, Any]:
    """The variables of the card's template. The template omits parts that are None or empty."""
    base = base_model(adapter, record)
    revision = record.base_model_revision or adapter.config.revision
    drawn = figures.drawable(record)
    trained_on = list(dict.fromkeys(data_name(data) for data in record.datasets if trains(data)))
    place = {"repo_id": repo_id, "subfolder": subfolder}
    ranks = ranks_choices(adapter, record.pipeline_tag)
    packages = "hf_peft_ext" if adapter.is_ours or adapter.reads_mean or ranks else "peft"
    packages += " sentence-transformers" * is_embedding(adapter)
    loading = snippet(adapter, base, revision=revision, labels=record.labels, ranks=ranks, **place)
    cited = dict.fromkeys([*(paper.bibtex for paper in methods.papers(adapter)), record.paper.get("bibtex")])
    return {
        "method": methods.name(adapter),
        "base_code": code(base) if base else None,
        "base": link(base) if base else unnamed(adapter),
        "parameters": whole(adapter.parameters),
        "size": in_units(adapter.bytes, BYTES),
        "trained_on": listed(trained_on) if trained_on else None,
        "install": fenced(f"pip install {packages}", "bash"),
        "snippet": fenced(loading, "python"),
        "labels": ", ".join(code(label) for label in record.labels),
        "results": results(record.results),
        "spread": spread(record.results),
        "export": export_section(record),
        "description": methods.description(adapter),
        "architecture": architecture_table(adapter),
        "gates_note": gates_note(adapter),
        "gates_figure": figures.GATES in drawn,
        "losses_figure": figures.LOSSES in drawn,
        "datasets": datasets(record.datasets),
        "facts": facts(record, revision),
        "recipe": bool(record.recipe),
        "arguments": as_yaml(without_places(record.recipe or record.hyperparameters)),
        "command": fenced(in_text(record.command), "bash") if record.command else None,
        "versions": version_list({"peft": adapter.config.peft_version} | record.versions),
        "citations": fenced("\n\n".join(filter(None, cited)), "bibtex") if any(cited) else None,
    }


def link(repo_id: str, kind: str = "") -> str:
    """A link to a valid id on the Hub."""
    return f"[{code(repo_id)}]({HUB}/{kind}{repo_id})"


def data_name(data: DatasetRecord) -> str:
    """The name of a dataset, with a link if it is on the Hub."""
    return link(data.name, "datasets/") if data.on_hub and is_hub_id(data.name) else cell(data.name)


def trains(data: DatasetRecord) -> bool:
    """Whether a dataset was trained on, by its record or by its split."""
    return data.used_for == "train" or (data.used_for is None and (data.split or "").startswith("train"))


def unnamed(adapter: SavedAdapter) -> str:
    """The class of a base model without an id."""
    cls = base_class(adapter)
    return f"a {code(cls.__name__) if cls else 'base model'} that has no id on the Hub"


def results(measured: Sequence[Result]) -> str | None:
    """A table with a row for each metric on each dataset, and a column for each method."""
    if not measured:
        return None
    order = list(METHOD_TITLES)
    methods = sorted({r.method for r in measured}, key=lambda m: (order.index(m) if m in order else len(order), m))
    rows: dict[tuple[str, str | None, str | None], dict[str, str]] = {}
    for result in measured:
        unnamed = result.dataset == result.split or (result.dataset, result.split) == ("eval", "evaluation")
        place = (result.metric, None if unnamed else result.dataset, result.split)
        rows.setdefault(place, {})[result.method] = number(result.value, result.spread)
    shown = [any(key[i] for key in rows) for i in range(3)]
    names = [name for name, show in zip(("metric", "data", "split"), shown, strict=True) if show]
    body = [
        [*(cell(part) if part else "" for part, show in zip(key, shown, strict=True) if show),
         *(cells.get(method, "") for method in methods)]
        for key, cells in rows.items()
    ]  # fmt: skip
    header = [*names, *(METHOD_TITLES.get(method) or cell(method) for method in methods)]
    return table(header, body, numbers=range(len(names), len(header)))


def spread(measured: Sequence[Result]) -> str | None:
    """A sentence on the runs behind each ±: once for all methods if their numbers are equal, else for each."""
    several = [result for result in measured if result.spread is not None]
    if not several:
        return None
    runs = {result.method: [r.runs for r in several if r.method == result.method] for result in several}
    counted = {method: " to ".join(map(whole, sorted({min(n), max(n)}))) for method, n in runs.items()}
    if "adapter" in counted and len(set(counted.values())) == 1:
        return f"Mean ± standard deviation over {counted['adapter']} runs."
    listing = ", ".join(f"{METHOD_TITLES.get(method) or code(method)} {count}" for method, count in counted.items())
    return f"Mean ± standard deviation where there were several runs: {listing}."


def export_section(record: TrainingRecord) -> str | None:
    """How a LoRA was made from an adapter of another type, and what that lost."""
    lost, kind = record.export, record.exported_from
    if kind is None:
        return None
    titled = METHOD_TEXTS.get(kind.lower())
    source = f"an adapter of {titled[0] if titled else cell(kind)}"
    if lost.get("exact"):
        return f"Made from {source} without training: the same function, up to rounding."
    count = f"{lost.get('texts', 0):,.0f} texts without labels, in {lost.get('steps', 0):,.0f} steps"
    paragraphs = [f"Distilled from {source} on {count}."]
    if "kl" in lost and "kl_base" in lost:
        rows = [["KL divergence from the original adapter", number(lost["kl"]), number(lost["kl_base"])]]
        if "agreement" in lost and "agreement_base" in lost:
            shares = [f"{lost[name]:.1%}" for name in ("agreement", "agreement_base")]
            rows.append(["predictions that are the original adapter's", *shares])
        header = [f"on {lost.get('rows', 0):,.0f} texts held out", "this adapter", "base model"]
        paragraphs.append(table(header, rows, numbers=[1, 2]))
        paragraphs.append("The base model has the adapter's head, if there is one.")
    for metric in (name.removesuffix(" difference") for name in lost if name.endswith(" difference")):
        low, high, change = (lost.get(f"{metric} difference{end}", nan) for end in (" low", " high", ""))
        ends = f"95 % interval [{low:+.4g}, {high:+.4g}]"
        paragraphs.append(f"{cell(metric)}: {change:+.4g} against the original adapter, {ends}.")
    return "\n\n".join(paragraphs)


def architecture_table(adapter: SavedAdapter) -> str:
    """A table of the sub-layers: sites, layers, sizes, gates and numbers of parameters."""
    rows = adapter.rows()
    columns = [("sub-layer", "sublayer"), ("site", "site"), ("layers", "layers"), ("size", "size"), ("gate", "gate")]
    shown = [(title, name) for title, name in columns if any(getattr(row, name) for row in rows)]
    body = [[*(getattr(row, name) for _, name in shown), whole(row.parameters)] for row in rows]
    return table([*(title for title, _ in shown), "parameters"], body, numbers=[len(shown)])


def gates_note(adapter: SavedAdapter) -> str | None:
    """The meaning of `auto` in the table of sub-layers, if it occurs."""
    if not any("auto" in row.gate for row in adapter.rows()):
        return None
    return (
        "Gate `auto`: one gate for each token where attention is causal, else one for the whole text, from the mean "
        "of its tokens."
    )


def datasets(records: Sequence[DatasetRecord]) -> str | None:
    """A table of the data, with revisions and fingerprints."""
    if not records:
        return None
    names = ("used_for", "config", "split", "rows", "revision", "fingerprint")
    fields = [name for name in names if any(getattr(data, name) for data in records)]
    body = [[data_name(data), *(field_value(getattr(data, name)) for name in fields)] for data in records]
    header = ["data", *(name.replace("_", " ") for name in fields)]
    return table(header, body, numbers=[1 + fields.index("rows")] if "rows" in fields else [])


def field_value(value: Any) -> str:
    """A value of a record as the cell of a table."""
    return "" if value is None else whole(value) if isinstance(value, int) else cell(value)


def facts(record: TrainingRecord, revision: str | None) -> str | None:
    """The run as a list."""
    trained = record.trainable_parameters
    total = record.total_parameters
    share = f" of {whole(total)} ({100 * trained / total:.3g} %)" if trained and total else ""
    lines = {
        "Trainer": code(record.trainer) if record.trainer else None,
        "Trainable parameters": f"{whole(trained)}{share}" if trained else None,
        "Base model at revision": code(revision) if revision else None,
        "Base model quantised": code(record.quantization) if record.quantization else None,
        "Hardware": code(record.hardware) if record.hardware else None,
        "Peak memory": in_units(record.peak_memory, BYTES) if record.peak_memory else None,
        "Step, median": in_units(record.step_time, SECONDS) if record.step_time else None,
        "Training": in_units(record.train_time, SECONDS) if record.train_time else None,
        "Seed" if len(record.seeds) == 1 else "Seeds": ", ".join(code(seed) for seed in record.seeds),
    }
    return "\n".join(f"- {name}: {line}" for name, line in lines.items() if line) or None


def as_yaml(settings: Mapping[str, Any]) -> str | None:
    """Settings as a block of YAML."""
    return fenced(yaml_dump(dict(settings), sort_keys=False), "yaml") if settings else None


def version_list(installed: Mapping[str, str | None]) -> str | None:
    """A list of packages; peft's line has peft's own form, so that peft recognises it when it saves again."""
    lines = [
        f"- {'PEFT' if name == 'peft' else code(name)} {version if VERSION.fullmatch(version) else code(version)}"
        for name, version in installed.items()
        if version
    ]
    return "\n".join(lines) or None
