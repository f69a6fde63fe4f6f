"""A recipe: one run of training, from model to metrics, in the words of the Python arguments; checked at once."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from peft import PeftConfig
from transformers import BitsAndBytesConfig

from hf_peft_ext.hub_cards import is_as_written
from hf_peft_ext.ranking.metrics import GENERATION
from hf_peft_ext.recipes.dataset_config import Rows
from hf_peft_ext.recipes.recipe_schema import SECTIONS, ModelArguments, check_keys, known_keys, override
from hf_peft_ext.recipes.recipe_source import Draft, did_you_mean, optional
from hf_peft_ext.recipes.tasks import CONFIGS, Task, task_of
from hf_peft_ext.trainers.restore import last_checkpoint, missing_files

FILE = "recipe.yaml"
# rule -> the training arguments that it is for, as far as the task has them, and what must hold; None holds
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
    """One run.

    Args:
        resume_from_checkpoint: where to go on from, True for the last checkpoint in the run's folder.
        written: the recipe as it was written, changes from the command line included; without
            `resume_from_checkpoint`, which is of this run alone.

    Raises:
        RecipeError: a key is not known, or its value is of the wrong kind or breaks a rule; or `output_dir` holds
            another recipe.yaml, by hand, that saving this one would replace. By `read`.
    """

    model: ModelArguments
    quantization: BitsAndBytesConfig | None
    peft: PeftConfig
    data: Rows
    training: Any
    metrics: list[str]
    resume_from_checkpoint: bool | str | None
    written: dict[str, Any]

    @classmethod
    def read(cls, path: str | Path, overrides: Sequence[str] = ()) -> "Recipe":
        """The recipe of a YAML file.

        Args:
            path: the file.
            overrides: changes, each `section.key=value`, or `key=value` where one section alone has the key.
        """
        draft = Draft.read(path)
        override(draft, overrides)
        check_keys(draft, known_keys(draft))
        resumed = _resumed(draft)
        recipe = cls(**_build(draft), resume_from_checkpoint=resumed, written=draft.sections)
        recipe._check_place(draft)
        return recipe

    @property
    def task(self) -> Task:
        return task_of(str(getattr(self.peft.task_type, "value", self.peft.task_type)), self.written.get("data"))

    def save(self, folder: str | Path) -> Path:
        """Write it as `recipe.yaml`, from which `hf-peft-ext train` repeats the run.

        Where one lies that says the same, it stays, with its comments.
        """
        path = Path(folder) / FILE
        if not path.exists() or Draft.read(path).sections != self.written:
            path.write_text(self.text(), encoding="utf-8")
        return path

    def _check_place(self, draft: Draft) -> None:
        folder = self.training.output_dir
        path = Path(folder) / FILE
        if path.exists() and not is_as_written(path) and Draft.read(path).sections != self.written:
            rule = f"(={folder!r}) holds another {FILE}, which this one would replace"
            raise draft.error("training.output_dir", f"{rule}; change that file, move it, or choose another folder")

    def text(self) -> str:
        """The recipe as YAML."""
        return yaml.safe_dump(self.written, sort_keys=False, allow_unicode=True)


def _build(draft: Draft) -> dict[str, Any]:
    """The objects that the sections describe; their classes check the values."""
    sections = {name: dict(draft.sections.get(name) or {}) for name in SECTIONS if name != "metrics"}
    peft_type, task_type = (sections["peft"][key] for key in ("peft_type", "task_type"))
    task, config = task_of(task_type, sections["data"]), CONFIGS[peft_type]
    revision = sections["model"].get("revision")
    options = {**{key: value for key, value in sections["peft"].items() if key != "peft_type"}, "revision": revision}
    built = {
        "model": ModelArguments(**sections["model"]),
        "peft": checked(draft, "peft", config, options),
        "data": checked(draft, "data", task.data, sections["data"]),
        "quantization": None,
        "metrics": _metrics(draft, task),
    }
    if sections["quantization"]:
        optional("bitsandbytes", "quantized")
        built["quantization"] = checked(draft, "quantization", BitsAndBytesConfig, sections["quantization"])
    training = checked(draft, "training", task.training(), sections["training"])
    check_training(draft, training)
    return {**built, "training": training}


def check_training(draft: Draft, args: Any) -> None:
    """Raise a RecipeError for numbers that transformers takes and a run does not: it would fail, or train nothing."""
    for rule, (names, holds) in TRAINING_RULES.items():
        for name in names:
            value = getattr(args, name, None)
            if isinstance(value, int | float) and not holds(value):
                raise draft.error(f"training.{name}", f"(={value!r}) {rule}")
    if args.max_steps <= 0 and not 0 < args.num_train_epochs < math.inf:
        rule = "must be above 0, or `max_steps` must be: nothing would be trained"
        raise draft.error("training.num_train_epochs", f"(={args.num_train_epochs!r}) {rule}")


def _resumed(draft: Draft) -> bool | str | None:
    """Takes out where to go on from; it must be there."""
    training, name = draft.sections["training"], "training.resume_from_checkpoint"
    wanted = training.pop("resume_from_checkpoint", None)
    if wanted is True and last_checkpoint(training["output_dir"]) is None:
        raise draft.error(name, f"needs a complete checkpoint, and {training['output_dir']} holds none")
    if isinstance(wanted, str) and (absent := missing_files(Path(wanted))):
        rule = f"must be a complete checkpoint: {', '.join(absent[:4])} missing or cut short"
        raise draft.error(name, f"(={wanted!r}) {rule}")
    return wanted


def checked(draft: Draft, section: str, cls: Callable[..., Any], options: dict[str, Any]) -> Any:
    """An object of `cls`; what it says of its arguments is said of the recipe's keys."""
    try:
        return cls(**options)
    except (ValueError, TypeError, AttributeError) as error:
        text = str(error).removesuffix(".")
        named = [key for key in options if re.search(rf"\b{key}\b", text)]
        quoted = [key for key, value in options.items() if isinstance(value, str) and value in text]
        name = ".".join([section, *(named or quoted)[:1]])
        raise draft.error(name, f"is not right: {text}") from error


def _metrics(draft: Draft, task: Task) -> list[str]:
    names = draft.sections.get("metrics") or []
    data, training = (draft.sections.get(section) or {} for section in ("data", "training"))
    for name in names:
        if name not in task.metrics:
            known = ", ".join(task.metrics) or "none beside the loss"
            rule = f"(={name!r}) must be a metric of this task: {known}{did_you_mean(name, task.metrics)}"
            raise draft.error("metrics", rule)
    if names and data.get("eval_split") is None:
        raise draft.error("metrics", "need rows to measure on: set `data.eval_split`")
    if names and task.metrics is GENERATION and not training.get("predict_with_generate"):
        raise draft.error("metrics", "compare generated texts: set `training.predict_with_generate=true`")
    if training.get("eval_strategy", "no") != "no" and data.get("eval_split") is None:
        raise draft.error("training.eval_strategy", "needs rows to evaluate on: set `data.eval_split`")
    best = str(training.get("metric_for_best_model") or "loss").removeprefix("eval_")
    measured = ["loss", *names, *(["mean_token_accuracy"] if task.arguments == "SFTConfig" else [])]  # TRL's own
    if best not in measured:
        rule = f"(={best!r}) must be one of what is measured: {', '.join(measured)}{did_you_mean(best, measured)}"
        raise draft.error("training.metric_for_best_model", rule)
    return list(names)
