"""`hf-peft-ext to-lora`: exports a saved adapter as a plain LoRA."""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import transformers
from peft.utils import CONFIG_NAME
from rich.text import Text
from transformers import AutoTokenizer

from hf_peft_ext.cli.failures import one_line, quiet_consoles
from hf_peft_ext.recipes.recipe import RECIPE_FILE, Recipe
from hf_peft_ext.validation.checks import check


@dataclass
class Source:
    """What an export starts from.

    Args:
        base: the base model.
        tokenizer: its tokenizer; None if there is none.
        texts: rows of tokens, or texts.
        eval_rows: rows of tokens with labels.
    """

    base: Any
    tokenizer: Any
    texts: list[Any] = field(default_factory=list)
    eval_rows: list[Any] = field(default_factory=list)


def to_lora_command(
    adapter: Path,
    output: Path,
    recipe: Path | None,
    changes: Sequence[str],
    texts: tuple[Path | None, str],
    model: tuple[str | None, int | None],
    options: dict[str, Any],
    as_json: bool,
) -> None:
    """Export an adapter, and print what was lost.

    Args:
        adapter: folder of the adapter.
        output: folder of the LoRA.
        recipe: the recipe that names model and rows; by default the one beside the adapter, if there is one.
        changes: of the recipe, each `section.key=value`.
        texts: a file of texts without labels, and their column.
        model: the base model, if there is no recipe, and 4 or 8 for its bits.
        options: `r`, and fields of `DistillationSettings`.
        as_json: whether to print the result as JSON.

    Raises:
        typer.Exit: an error was printed.
    """
    out, errors = quiet_consoles()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with one_line(errors):
        from hf_peft_ext.export import DistillationSettings, to_lora
        from hf_peft_ext.hub_cards import TrainingRecord
        from hf_peft_ext.loading import load_adapter

        check("adapter", str(adapter), (adapter / CONFIG_NAME).is_file(), f"must be a folder with {CONFIG_NAME}")
        own = adapter / RECIPE_FILE
        recipe = recipe or (own if own.exists() and model[0] is None else None)
        check("changes", list(changes), recipe is not None or not changes, "need a recipe, which the adapter lacks")
        source = of_recipe(recipe, changes) if recipe else of_config(adapter, *model)
        file, column = texts
        source.texts += texts_of_file(file, column) if file else []
        r, settings = options.pop("r"), DistillationSettings(**options)
        export = to_lora(
            load_adapter(source.base, adapter),
            output,
            r=r,
            texts=source.texts or None,
            tokenizer=source.tokenizer,
            eval_rows=source.eval_rows or None,
            settings=settings,
            record=TrainingRecord.load(adapter),
            progress=None if as_json else lambda line: out.print(Text(line)),
        )
        if source.tokenizer is not None:
            source.tokenizer.save_pretrained(str(output))
    if as_json:
        print(json.dumps(asdict(export), indent=1, default=str))
    else:
        kind = "equal to" if export.exact else "distilled from"
        out.print(Text(f"LoRA of rank {export.r}, {kind} {export.peft_type}, in {output} ({export.seconds:,.0f} s)"))


def of_recipe(path: Path, changes: Sequence[str]) -> Source:
    """Base model and rows of a recipe: those to train on without their labels, and those to evaluate on."""
    from hf_peft_ext.recipes.model_rows import model_rows
    from hf_peft_ext.recipes.run import find_model, load_model, loading

    recipe = Recipe.read(path, changes)
    train, evaluated, labels = recipe.data.load(recipe.training.seed)
    place = find_model(recipe)
    with loading(place):
        tokenizer = AutoTokenizer.from_pretrained(
            place, revision=recipe.model.revision, gguf_file=recipe.model.gguf_file
        )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = [model_rows(recipe, part, tokenizer, labels) if part is not None else [] for part in (train, evaluated)]
    return Source(load_model(recipe, place, labels, tokenizer), tokenizer, *rows)


def of_config(adapter: Path, model: str | None, bits: Any) -> Source:
    """Base model by the adapter's own config.

    Raises:
        ValueError: it names no base model, or no task.
    """
    from hf_peft_ext.hub_cards.saved_adapter import SavedAdapter
    from hf_peft_ext.model.backbone import load_backbone
    from hf_peft_ext.model.mean_pooling import MeanPoolingForSequenceClassification

    saved = SavedAdapter(adapter)
    place = model or saved.config.base_model_name_or_path
    check("model", place, bool(place), "must be given: the adapter's config names no base model")
    task = str(getattr(saved.config.task_type, "value", saved.config.task_type))
    count = saved.number_of_labels()
    options: dict[str, Any] = {"num_labels": count} if count and task == "SEQ_CLS" else {}
    if task == "SEQ_CLS" and saved.reads_mean:
        options["auto_class"] = MeanPoolingForSequenceClassification
    base = load_backbone(place, bits, task_type=task, **options)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError):
        return Source(base, None)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return Source(base, tokenizer)


def texts_of_file(path: Path, column: str) -> list[str]:
    """The texts of a file: lines of text, or a column of a CSV or JSON lines file.

    Raises:
        ValueError: the file has no such column.
    """
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix not in (".csv", ".jsonl"):
            return [line.strip() for line in file if line.strip()]
        rows = list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(line) for line in file]
    check("column", column, all(column in row for row in rows), f"must be a column of {path}")
    return [row[column] for row in rows]
