"""`hf-peft-ext inspect`: a report on a saved adapter, or on a model."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from hf_peft_ext.cli.failures import one_line, quiet_consoles
from hf_peft_ext.cli.tables import print_table, print_values

if TYPE_CHECKING:
    from hf_peft_ext.catalogue.adapter_report import AdapterReport
    from hf_peft_ext.catalogue.model_report import ModelReport


def inspect_command(path: str, base: str | None, revision: str | None, as_json: bool) -> None:
    """Print a report.

    Args:
        path: an adapter or a model: its folder, its config.json, or its id on the Hub.
        base: the base model of an adapter; None for the one that it names.
        revision: branch, tag or commit on the Hub.
        as_json: whether to print JSON in place of the tables.

    Raises:
        typer.Exit: an error was printed.
    """
    out, errors = quiet_consoles()
    with one_line(errors):
        from transformers import AutoConfig
        from transformers.utils import logging

        from hf_peft_ext.catalogue.adapter_report import inspect_adapter
        from hf_peft_ext.catalogue.model_report import inspect_model

        logging.set_verbosity_error()
        if is_adapter(path, revision):
            report = inspect_adapter(path, base, revision)
        else:
            options = {} if revision is None else {"revision": revision}
            report = inspect_model(AutoConfig.from_pretrained(path, **options))
    if as_json:
        print(json.dumps(report.to_dict(), indent=1, ensure_ascii=False, default=sorted))
    elif hasattr(report, "sites"):
        print_model(out, report)  # pyright: ignore[reportArgumentType]
    else:
        print_adapter(out, report)  # pyright: ignore[reportArgumentType]


def is_adapter(path: str, revision: str | None) -> bool:
    """Whether a folder or a repository on the Hub has an adapter's config."""
    from huggingface_hub import file_exists
    from peft.utils import CONFIG_NAME

    from hf_peft_ext.validation.checks import check, is_hub_id

    if Path(path).exists():
        return (Path(path) / CONFIG_NAME).is_file()
    check("path", path, is_hub_id(path), "is neither a file, nor a folder, nor an id on the Hub")
    return file_exists(path, CONFIG_NAME, revision=revision)


def print_adapter(out: Console, report: "AdapterReport") -> None:
    """Print a report on an adapter."""
    values = {"adapter": report.path, "revision": report.revision or "", "PEFT type": report.peft_type}
    values |= {"base model": report.base_model or "not named", "task": report.task_type or ""}
    values |= {"parameters": f"{report.parameters:,}", "tensors": ", ".join(report.dtypes)}
    values |= {"settings": ", ".join(f"{name}={value!r}" for name, value in report.settings.items())}
    values |= {"pickles": ", ".join(report.pickles) and f"{', '.join(report.pickles)} (not read)"}
    values |= {"stock peft": report.stock_peft, "safe to load": report.safe}
    print_values(out, {name: value for name, value in values.items() if value})
    if report.placements:
        rows = [
            {"sub-layer": row.sublayer, "site": row.site, "layers": row.layers, "size": row.size, "gate": row.gate}
            | {"parameters": f"{row.parameters:,}"}
            for row in report.placements
        ]
        print_table(out, rows)
    if report.gates:
        print_table(out, [{"gate": name, "mean": f"{mean:.3f}"} for name, mean in report.gates.items()])
    print_table(out, [{"file": name, "SHA-256": sha} for name, sha in report.files.items()])


def print_model(out: Console, report: "ModelReport") -> None:
    """Print a report on a model."""
    values = {"model": f"{report.model_class} ({report.model_type})", "parameters": f"{report.parameters:,}"}
    values |= {"layers": str(report.layers), "target_modules": ", ".join(report.target_modules)}
    values |= {"  all linear": ", ".join(report.all_target_modules)}
    print_values(out, values)
    rows = [
        {"site": row.site, "layers": row.layers, "width": row.width, "count": str(row.count), "module": row.module}
        for row in report.sites
    ]
    if rows:
        print_table(out, rows)
    else:
        out.print("No transformer blocks were found; `sites=` of a config names modules by hand.", soft_wrap=False)
