"""`hf-peft-ext cost`: FLOPs of fine-tuning against in-context learning."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hf_peft_ext.cli.failures import one_line, quiet_consoles

if TYPE_CHECKING:
    from peft import PeftConfig

    from hf_peft_ext.budget.in_context import CostReport


def cost_command(
    model: str, adapter: str | None, prompted_model: str | None, work: dict[str, int], money: tuple, as_json: bool
) -> None:
    """Print the comparison.

    Args:
        model: a model's name on the Hub, its folder, or its config.json.
        adapter: a folder of an adapter, or a PEFT type with settings: "LORA" or "LORA:r=16"; None to train all.
        prompted_model: the model to prompt; None for the same.
        work: arguments of `Workload`.
        money: price of a GPU hour and FLOPs a second, both None or both numbers.
        as_json: whether to print JSON in place of the table.

    Raises:
        typer.Exit: an error was printed.
    """
    out, errors = quiet_consoles()
    with one_line(errors):
        from transformers import AutoConfig
        from transformers.utils import logging

        from hf_peft_ext.budget.in_context import Workload, compare_with_in_context

        logging.set_verbosity_error()
        price = flop_price(*money)
        configs = [AutoConfig.from_pretrained(name) for name in (model, prompted_model) if name is not None]
        report = compare_with_in_context(configs[0], Workload(**work), parse_adapter(adapter), *configs[1:])
    if as_json:
        print(json.dumps(cost_dict(report, price), indent=1))
    else:
        print_cost(out, report, price)


def flop_price(price_per_gpu_hour: float | None, flops_per_second: float | None) -> float | None:
    """Money for a FLOP; None without prices.

    Raises:
        ValueError: one of the two is missing or invalid.
    """
    from hf_peft_ext.validation.checks import check, check_positive, is_number

    if price_per_gpu_hour is None and flops_per_second is None:
        return None
    both = price_per_gpu_hour is not None and flops_per_second is not None
    check("flops_per_second", flops_per_second, both, "must be set together with price_per_gpu_hour")
    check_positive("flops_per_second", flops_per_second)
    valid = is_number(price_per_gpu_hour) and (price_per_gpu_hour or 0) >= 0
    check("price_per_gpu_hour", price_per_gpu_hour, valid, "must be a number of at least 0")
    return (price_per_gpu_hour or 0.0) / (flops_per_second or 1.0) / 3600  # both are set: checked above


def parse_adapter(text: str | None) -> "PeftConfig | None":
    """The config of an adapter: of a folder, or of a type with settings, such as "LORA:r=16,lora_alpha=32".

    Raises:
        ValueError: the type or a setting is unknown.
    """
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    import hf_peft_ext  # noqa: F401  registers the methods

    if text is None:
        return None
    if (Path(text) / "adapter_config.json").is_file():
        return PeftConfig.from_pretrained(text)
    name, _, settings = text.partition(":")
    types = {str(getattr(key, "value", key)): value for key, value in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if name.upper() not in types:
        raise ValueError(f"`adapter` (={text!r}) must be a folder of an adapter or a PEFT type such as UNIPELT.")
    values: dict[str, Any] = {}
    for setting in filter(None, settings.split(",")):
        key, _, value = setting.partition("=")
        values[key.strip()] = yaml.safe_load(value)
    try:
        return types[name.upper()](**values)
    except TypeError as error:
        raise ValueError(f"`adapter` (={text!r}) must have settings of {name.upper()}: {error}.") from error


def cost_dict(report: "CostReport", price: float | None) -> dict[str, Any]:
    """The report as plain values."""
    values = asdict(report)
    for name in ("rule", "count"):
        comparison = getattr(report, name)
        values[name] |= {"break_even": comparison.break_even(), "break_even_cached": comparison.break_even_cached()}
        values[name]["totals"] = totals = comparison.totals(report.work.queries)
        if price is not None:
            values[name]["money"] = {key: None if v is None else v * price for key, v in totals.items()}
    return values


def print_cost(out: Console, report: "CostReport", price: float | None) -> None:
    """Print the table."""
    values, queries = cost_dict(report, price), report.work.queries
    out.print(f"[cyan]fine-tuned[/]  {report.parameters:,} parameters, {report.trained:,} trained")
    out.print(f"[cyan]prompted[/]    {report.prompted_parameters:,} parameters, {report.work.shots} examples a prompt")
    table = Table("FLOPs", "by rule", "counted", box=box.SIMPLE_HEAD, pad_edge=False)
    rows = {
        "training": "training",
        "query, fine-tuned": "tuned_query",
        "query, prompted": "prompted_query",
        "query, examples cached": "cached_query",
    }
    for title, name in rows.items():
        table.add_row(title, *(flops_text(values[source][name]) for source in ("rule", "count")))
    for title, name in {"fine-tuned": "tuned", "prompted": "prompted", "prompted, cached": "cached"}.items():
        cells = [flops_text(values[source]["totals"][name]) for source in ("rule", "count")]
        table.add_row(f"{queries:,} queries, {title}", *cells)
        if price is not None:
            money = [values[source]["money"][name] for source in ("rule", "count")]
            table.add_row("  money", *("" if m is None else f"{m:,.4g}" for m in money))
    for title, name in {"break-even, queries": "break_even", "  examples cached": "break_even_cached"}.items():
        cells = [values[source][name] for source in ("rule", "count")]
        table.add_row(title, *("never" if cell is None else f"{cell:,}" for cell in cells))
    out.print(table)
    if report.cache_bytes is not None:
        out.print(f"[cyan]cache[/]  {report.cache_bytes / 2**30:.3g} GiB for the examples' keys and values, bfloat16")
    for note in report.notes:
        out.print(f"[dim]{escape(note)}[/]")


def flops_text(value: float | None) -> str:
    """A number of FLOPs with two digits; empty for None."""
    return "" if value is None else f"{value:.2g}"
