"""A recipe: one training run, from model to metrics, with the names of the Python arguments; checked when read."""

import copy
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftConfig
from transformers import BitsAndBytesConfig

from hf_peft_ext.hub_cards import is_as_written
from hf_peft_ext.ranking.metrics import GENERATION
from hf_peft_ext.recipes.dataset_config import DatasetArguments
from hf_peft_ext.recipes.recipe_schema import SECTIONS, ModelArguments, check_recipe, override
from hf_peft_ext.recipes.recipe_source import RecipeSource, optional
from hf_peft_ext.recipes.tasks import CONFIGS, RecipeTask, task_of
from hf_peft_ext.trainers.restore import last_checkpoint, missing_files
from hf_peft_ext.validation.checks import check_writable
from hf_peft_ext.validation.suggestions import did_you_mean

RECIPE_FILE = "recipe.yaml"
# rule -> the training arguments that it applies to, if the task has them, and its test; None passes
TRAINING_RULES: dict[str, tuple[tuple[str, ...], Callable[[float], bool]]] = {
    "must be 1 or more": (
        (
            *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
            *("eval_accumulation_steps", "save_total_limit", "generation_max_length", "generation_num_beams"),
        ),
        lambda value: value >= 1,
    ),
    "must be above 0": (
        ("learning_rate", "logging_steps", "eval_steps", "save_steps"),
        lambda value: 0 < value < math.inf,
    ),
    "must be 0 or more": (
        (
            *("weight_decay", "max_grad_norm", "warmup_steps", "warmup_ratio", "adam_epsilon", "eval_delay"),
            *("dataloader_num_workers", "label_smoothing_factor"),
        ),
        lambda value: 0 <= value < math.inf,
    ),
    "must lie in [0, 1)": (("adam_beta1", "adam_beta2"), lambda value: 0 <= value < 1),
    "must lie in [0, 2**32)": (("seed", "data_seed"), lambda value: 0 <= value < 2**32),
    "must be 1 or more, or -1 to train by `num_train_epochs`": (
        ("max_steps",),
        lambda value: value == -1 or value >= 1,
    ),
}


@dataclass
class Recipe:
    """One training run, made by `read`.

    Args:
        model: the base model.
        quantization: its quantization, or None.
        peft: the adapter's config.
        data: the rows, and the columns that are read.
        training: arguments of the task's trainer.
        metrics: names of the metrics to compute, besides the loss.
        resume_from_checkpoint: the checkpoint to resume from, True for the last one in `training.output_dir`.
        written: the recipe as written, changes from the command line included; without `resume_from_checkpoint`,
            which applies to one start only.
    """

    model: ModelArguments
    quantization: BitsAndBytesConfig | None
    peft: PeftConfig
    data: DatasetArguments
    training: Any
    metrics: list[str]
    resume_from_checkpoint: bool | str | None
    written: dict[str, Any]

    @classmethod
    def read(cls, path: str | Path, overrides: Sequence[str] = ()) -> "Recipe":
        """Read the recipe of a YAML file.

        Args:
            path: the file.
            overrides: changes, each `section.key=value`, or `key=value` if only one section has the key.

        Raises:
            RecipeError: a key is unknown, or its value has the wrong type or breaks a rule; or `output_dir` has
                another recipe.yaml, written by hand, which saving this one would replace.
        """
        source = RecipeSource.read(path)
        override(source, overrides)
        check_recipe(source)
        checkpoint = _pop_checkpoint(source)
        recipe = cls(**_build(source), resume_from_checkpoint=checkpoint, written=source.sections)
        recipe._check_output_dir(source)
        return recipe

    def with_sections(self, **sections: Any) -> "Recipe":
        """A recipe with other sections in place of this one's.

        Args:
            sections: section -> its keys and values, as in the file.

        Raises:
            RecipeError: as `read`.
        """
        source = RecipeSource({**copy.deepcopy(self.written), **copy.deepcopy(sections)}, {})
        check_recipe(source)
        checkpoint = _pop_checkpoint(source)
        return Recipe(**_build(source), resume_from_checkpoint=checkpoint, written=source.sections)

    @property
    def task(self) -> RecipeTask:
        """Model class, data, trainer and metrics of the recipe's `task_type`."""
        task_type = str(getattr(self.peft.task_type, "value", self.peft.task_type))
        return task_of(task_type, self.written.get("data"), self.model.pooling)

    def save(self, folder: str | Path) -> Path:
        """Write `recipe.yaml`, with which `hf-peft-ext train` repeats the run, into a folder.

        An equal recipe that is there already is kept, with its comments.
        """
        path = Path(folder) / RECIPE_FILE
        if not path.exists() or RecipeSource.read(path).sections != self.written:
            path.write_text(self.text(), encoding="utf-8")
        return path

    def _check_output_dir(self, source: RecipeSource) -> None:
        folder = self.training.output_dir
        path = Path(folder) / RECIPE_FILE
        if path.exists() and not is_as_written(path) and RecipeSource.read(path).sections != self.written:
            rule = f"(={folder!r}) holds another {RECIPE_FILE}, which this one would replace"
            raise source.error("training.output_dir", f"{rule}; change that file, move it, or choose another folder")

    def check_writable(self) -> None:
        """Refuse an output folder that cannot be created or written.

        Raises:
            ValueError: it cannot.
        """
        check_writable("training.output_dir", self.training.output_dir)

    def text(self) -> str:
        """The recipe as YAML."""
        return yaml.safe_dump(self.written, sort_keys=False, allow_unicode=True)


def _build(source: RecipeSource) -> dict[str, Any]:
    """The objects that the sections describe; their classes check the values."""
    sections = {name: dict(source.sections.get(name) or {}) for name in SECTIONS if name != "metrics"}
    peft_type, task_type = (sections["peft"].pop("peft_type"), sections["peft"]["task_type"])
    model = construct(source, "model", ModelArguments, sections["model"])
    if model.pooling is not None and task_type != "SEQ_CLS":
        raise source.error("model.pooling", f"(={model.pooling!r}) needs a `task_type` of SEQ_CLS")
    task, quantization = task_of(task_type, sections["data"], model.pooling), None
    objects = {
        "model": model,
        "peft": construct(source, "peft", CONFIGS[peft_type], {**sections["peft"], "revision": model.revision}),
        "data": construct(source, "data", task.data, sections["data"]),
        "metrics": _metrics(source, task),
    }
    if sections["quantization"]:
        optional("bitsandbytes", "quantized")
        quantization = construct(source, "quantization", BitsAndBytesConfig, sections["quantization"])
    on_cpu = sections["training"].get("use_cpu") or not torch.accelerator.is_available()
    if task.arguments == "SFTConfig" and on_cpu:
        sections["training"].setdefault("bf16", False)  # TRL's default is True, which most CPUs compute very slowly
    training = construct(source, "training", task.training(), sections["training"])
    check_training(source, training)
    return {**objects, "quantization": quantization, "training": training}


def check_training(source: RecipeSource, args: Any) -> None:
    """Refuse numbers that transformers accepts, but with which a run would fail or train nothing.

    Raises:
        RecipeError: an argument breaks its rule.
    """
    for rule, (names, holds) in TRAINING_RULES.items():
        for name in names:
            value = getattr(args, name, None)
            if isinstance(value, int | float) and not holds(value):
                raise source.error(f"training.{name}", f"(={value!r}) {rule}")
    if args.max_steps <= 0 and not 0 < args.num_train_epochs < math.inf:
        rule = "must be above 0, or `max_steps` must be: nothing would be trained"
        raise source.error("training.num_train_epochs", f"(={args.num_train_epochs!r}) {rule}")


def _pop_checkpoint(source: RecipeSource) -> bool | str | None:
    """Take `resume_from_checkpoint` out of the source.

    Raises:
        RecipeError: there is no such complete checkpoint.
    """
    training, name = source.sections["training"], "training.resume_from_checkpoint"
    checkpoint = training.pop("resume_from_checkpoint", None)
    if checkpoint is True and last_checkpoint(training["output_dir"]) is None:
        raise source.error(name, f"needs a complete checkpoint, and {training['output_dir']} holds none")
    if isinstance(checkpoint, str) and (absent := missing_files(Path(checkpoint))):
        rule = f"must be a complete checkpoint: {', '.join(absent[:4])} missing or cut short"
        raise source.error(name, f"(={checkpoint!r}) {rule}")
    return checkpoint


def construct(source: RecipeSource, section: str, cls: Callable[..., Any], options: dict[str, Any]) -> Any:
    """An object of `cls`.

    Raises:
        RecipeError: `cls` refuses its arguments; the error names the key and its place.
    """
    try:
        return cls(**options)
    except (ValueError, TypeError, AttributeError) as error:
        text = str(error).removesuffix(".")
        named = [key for key in options if re.search(rf"\b{key}\b", text)]
        quoted = [key for key, value in options.items() if isinstance(value, str) and value in text]
        name = ".".join([section, *(named or quoted)[:1]])
        raise source.error(name, f"is wrong: {text}") from error


def _metrics(source: RecipeSource, task: RecipeTask) -> list[str]:
    """The metrics, checked against the task, the data and the training arguments."""
    names = source.sections.get("metrics") or []
    data, training = (source.sections.get(section) or {} for section in ("data", "training"))
    for name in names:
        if name not in task.metrics:
            choices = ", ".join(task.metrics) or "none besides the loss"
            rule = f"(={name!r}) must be a metric of this task: {choices}{did_you_mean(name, task.metrics)}"
            raise source.error("metrics", rule)
    if names and data.get("eval_split") is None:
        raise source.error("metrics", "need rows to measure on: set `data.eval_split`")
    if names and task.metrics is GENERATION and not training.get("predict_with_generate"):
        raise source.error("metrics", "compare generated texts: set `training.predict_with_generate=true`")
    if training.get("eval_strategy", "no") != "no" and data.get("eval_split") is None:
        raise source.error("training.eval_strategy", "needs rows to evaluate on: set `data.eval_split`")
    best = str(training.get("metric_for_best_model") or "loss").removeprefix("eval_")
    measured = ["loss", *names, *(["mean_token_accuracy"] if task.arguments == "SFTConfig" else [])]  # TRL's own
    if best not in measured:
        rule = f"(={best!r}) must be one of the measured metrics: {', '.join(measured)}{did_you_mean(best, measured)}"
        raise source.error("training.metric_for_best_model", rule)
    return list(names)
