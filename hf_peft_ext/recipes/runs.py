"""Carries out a recipe: data, model and adapter, trainer; then training, evaluation, and the adapter saved once."""

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

from ..metrics import CLASSIFICATION, classification_metrics, generation_metrics
from .draft import RecipeError
from .keys import ModelArguments
from .recipe import Recipe
from .tasks import Task


class WithModel(Protocol):
    """What a recipe and a search say of their base model."""

    model: ModelArguments
    quantization: Any

    @property
    def task(self) -> Task: ...


@dataclass
class Outcome:
    """A finished run.

    Args:
        folder: where the adapter lies.
        metrics: what was measured on the evaluation rows.
        seconds: how long the training took.
    """

    folder: Path
    metrics: dict[str, float]
    seconds: float


def prepare(recipe: Recipe) -> Any:
    """The trainer, with data, model and adapter in it. It makes its folder, and writes nothing there.

    Raises:
        RecipeError: there are no such data, no such model, the adapter does not fit it, or the processes that were
            started are not one group.
    """
    args, data = recipe.training, recipe.data
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != args.world_size:  # each would train for itself, and write over the others
        raise RecipeError(
            f"{started} processes were started, but train as {args.world_size}: on CPUs, add `use_cpu=true`."
        )
    set_seed(args.seed)
    with args.main_process_first(desc="data"):
        *rows, labels = data.load(args.seed)
    source = find_model(recipe)
    with loading(source):
        wanted = recipe.model
        tokenizer = AutoTokenizer.from_pretrained(source, revision=wanted.revision, gguf_file=wanted.gguf_file)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    with args.main_process_first(desc="tokens"):
        train, evaluated = (None if part is None else data.encode(part, tokenizer, labels) for part in rows)
    needed = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and len(rows[0]) < needed:
        rule = f"trains nothing: {len(rows[0])} rows do not fill one batch of {needed}"
        raise RecipeError(f"`training.dataloader_drop_last` (=True) {rule}.")
    model = load_model(recipe, source, labels, tokenizer)
    try:
        trainer = recipe.task.trainer()(
            model=model, args=args, train_dataset=train, eval_dataset=evaluated, processing_class=tokenizer,
            peft_config=recipe.peft, **_task_options(recipe, model, tokenizer),
        )  # fmt: skip
    except ValueError as error:
        raise RecipeError(
            f"{recipe.written['peft']['peft_type']} on {recipe.model.model_name_or_path}: {error}"
        ) from error
    trainer.record.recipe = recipe.written
    return trainer


def train(recipe: Recipe, trainer: Any) -> Outcome:
    """Train what `prepare` made, evaluate it, and save the adapter with its record and its recipe, from rank 0.

    Raises:
        RecipeError: there was no step to train; nothing is saved.
    """
    trained = trainer.train(resume_from_checkpoint=recipe.resume_from_checkpoint)
    if trainer.state.global_step == 0:
        raise RecipeError("`training` came to 0 steps: the rows to train on make no batch, so nothing was trained.")
    metrics = trainer.evaluate() if trainer.eval_dataset is not None else {}
    trainer.save_model()
    folder = Path(recipe.training.output_dir)
    if trainer.is_world_process_zero():
        recipe.save(folder)
    trainer.accelerator.wait_for_everyone()
    return Outcome(folder, metrics, trained.metrics["train_runtime"])


def find_model(recipe: WithModel) -> str:
    """Where the model is loaded from: `local_path` if it is given.

    Raises:
        RecipeError: there is no such package or folder.
    """
    path = recipe.model.local_path
    if path is None:
        return recipe.model.model_name_or_path
    if path.startswith("package:"):
        package, _, inner = path.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            rule = f"is in no installed package: pip install {package.replace('_', '-')}, or `local_path=null`"
            raise RecipeError(f"`model.local_path` (={path!r}) {rule} to load {recipe.model.model_name_or_path}.")
        path = str(Path(spec.origin).parent / inner)
    if not Path(path).is_dir():
        raise RecipeError(f"`model.local_path` (={path!r}) must be a folder.")
    return path


@contextmanager
def loading(source: str) -> Iterator[None]:
    """Turns what goes wrong with a model's files, or with what they need, into a `RecipeError`."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        raise RecipeError(f"`model.model_name_or_path` (={source!r}) cannot be loaded: {error}") from error


def load_model(recipe: WithModel, source: str, labels: list[str], tokenizer: Any) -> Any:
    """The base model, quantised if the recipe says so."""
    wanted = recipe.model
    options: dict[str, Any] = {"revision": wanted.revision, "dtype": wanted.dtype}
    if wanted.attn_implementation is not None:
        options["attn_implementation"] = wanted.attn_implementation
    if labels:
        options |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    if wanted.gguf_file is not None:
        options["gguf_file"] = wanted.gguf_file
        if hasattr(transformers, "GgufConfig"):  # before there was one, transformers always unpacked
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if recipe.quantization is not None:
        options |= {"quantization_config": recipe.quantization, "device_map": {"": PartialState().device}}
    with loading(source):
        model = recipe.task.model.from_pretrained(source, **options)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    model.name_or_path = model.config._name_or_path = wanted.model_name_or_path  # what the adapter will name
    return model


def _task_options(recipe: Recipe, model: Any, tokenizer: Any) -> dict[str, Any]:
    """What the trainer of a task takes beside what all take."""
    metrics = {name: recipe.task.metrics[name] for name in recipe.metrics}
    if recipe.task.metrics is CLASSIFICATION:
        return {"compute_metrics": classification_metrics(metrics)} if metrics else {}
    if recipe.peft.task_type == "SEQ_2_SEQ_LM":
        compute = {"compute_metrics": generation_metrics(metrics, tokenizer)} if metrics else {}
        return {"data_collator": DataCollatorForSeq2Seq(tokenizer, model), **compute}
    return {}
