"""A recipe: one run of training, from model to metrics, with the names of the Python arguments; checked before it runs."""

import difflib
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from huggingface_hub.dataclasses import type_validator
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.peft_types import PeftType
from transformers import BitsAndBytesConfig

from ..trainers.secret import is_secret
from .data import DataArguments
from .draft import Draft, RecipeError, split_override
from .metrics import GENERATION
from .tasks import TASKS, Task, optional

FILE = "recipe.yaml"
SECTIONS = ("model", "quantization", "peft", "data", "training", "metrics")
KINDS = ("peft.peft_type", "peft.task_type")  # what decides which keys the sections have
REQUIRED = ("model.model_name_or_path", *KINDS, "training.output_dir")
# fields of the classes that are not for a recipe: peft and the trainers fill them in, or the model is there already
NOT_IN_RECIPES = {
    "peft": ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
    "training": ("hub_token", "model_init_kwargs"),
}


@dataclass
class ModelArguments:
    """The base model; all but `local_path` are arguments of `from_pretrained`.

    Args:
        model_name_or_path: a Hub id or a folder.
        local_path: where the same model lies on this machine, which is loaded instead, while the adapter goes on
            naming `model_name_or_path`: a folder, or `package:NAME/FOLDER` for one inside an installed package.
        revision: branch, tag or commit on the Hub.
        dtype: "float32", "bfloat16", "float16" or "auto".
        attn_implementation: "sdpa" or "eager" for methods with prefixes.
    """

    model_name_or_path: str
    local_path: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    attn_implementation: str | None = None


@dataclass
class Recipe:
    """One run. `written` is the recipe as it was written, changes from the command line included.

    Raises:
        RecipeError: a key is not known, or its value is of the wrong kind or breaks a rule. By `read`.
    """

    model: ModelArguments
    quantization: BitsAndBytesConfig | None
    peft: PeftConfig
    data: DataArguments
    training: Any
    metrics: list[str]
    written: dict[str, Any]

    @classmethod
    def read(cls, path: str | Path, overrides: Sequence[str] = ()) -> "Recipe":
        """The recipe of a YAML file.

        Args:
            path: the file.
            overrides: changes, each `section.key=value`, or `key=value` where one section alone has the key.
        """
        draft = Draft.read(path)
        _override(draft, overrides)
        draft.refuse_secrets()
        keys = _keys(draft)
        _check(draft, keys)
        return cls(**_build(draft, keys), written=draft.sections)

    @property
    def task(self) -> Task:
        return TASKS[str(getattr(self.peft.task_type, "value", self.peft.task_type))]

    def save(self, folder: str | Path) -> Path:
        """Write it as `recipe.yaml`, from which `hf-peft-ext train` repeats the run."""
        path = Path(folder) / FILE
        path.write_text(self.text(), encoding="utf-8")
        return path

    def text(self) -> str:
        """The recipe as YAML."""
        return yaml.safe_dump(self.written, sort_keys=False, allow_unicode=True)


def _override(draft: Draft, overrides: Sequence[str]) -> None:
    """Apply the changes: whole sections first, then what decides which keys there are, then the keys."""
    changes = [split_override(text) for text in overrides]
    rank: Callable[[Any], int] = lambda change: 0 if change[0] in SECTIONS else 1 if _is_kind(change[0]) else 2
    for name, value in sorted(changes, key=rank):
        if name in SECTIONS or name.split(".")[0] in SECTIONS:
            draft.set(name, value)
        elif _is_kind(name):
            draft.set(f"peft.{name}", value)
        elif is_secret(name):
            draft.set(f"training.{name}", value)  # refused with the others
        else:
            draft.set(_full_name(name, _keys(draft)), value)


def _is_kind(name: str) -> bool:
    return name in KINDS or f"peft.{name}" in KINDS


def _full_name(name: str, keys: dict[str, dict[str, Any]]) -> str:
    """`name`, with its section in front."""
    first, _, rest = name.partition(".")
    found = [section for section in keys if first in keys[section]]
    if len(found) > 1:
        choices = " or ".join(f"`{section}.{name}`" for section in found)
        raise RecipeError(f"command line: `{name}` stands in more than one section; write {choices}.")
    if not found:
        section = difflib.get_close_matches(first, SECTIONS, 1) if rest else []
        hint = f"; did you mean `{section[0]}.{rest}`?" if section else _hint("", first, keys) or "."
        raise RecipeError(f"command line: `{name}` is not a key of a recipe{hint}")
    return f"{found[0]}.{name}"


def _hint(section: str, key: str, keys: dict[str, dict[str, Any]]) -> str:
    """The nearest right name: the same key in another section, else a similar one in this section, else anywhere."""
    near = [f"{other}.{key}" for other in keys if key in keys[other]]
    near = near or [f"{section}.{name}" for name in difflib.get_close_matches(key, keys.get(section, {}), 1)]
    if not near:
        names = {name: other for other in keys for name in keys[other]}
        near = [f"{names[name]}.{name}" for name in difflib.get_close_matches(key, names, 1)]
    return f"; did you mean `{near[0]}`?" if near else ""


def _keys(draft: Draft) -> dict[str, dict[str, Any]]:
    """Section -> its keys and their types.

    Raises:
        RecipeError: a section is not known or no mapping, or the kind of adapter or task is missing or not known.
    """
    for name, section in draft.sections.items():
        if name not in SECTIONS:
            near = difflib.get_close_matches(str(name), SECTIONS, 1)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            raise draft.error(str(name), f"is not a section of a recipe ({', '.join(SECTIONS)}){hint}")
        kind = list if name == "metrics" else dict
        if section is not None and not isinstance(section, kind):
            raise draft.error(name, f"(={section!r}) must be a {'list' if kind is list else 'mapping of keys'}")
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(_choice(draft, "peft_type", [str(t.value) for t in PEFT_TYPE_TO_CONFIG_MAPPING]))]
    task = TASKS[_choice(draft, "task_type", list(TASKS))]
    known = {
        "model": get_type_hints(ModelArguments),
        "quantization": {
            name: Any if p.default is None else type(p.default)
            for name, p in inspect.signature(BitsAndBytesConfig).parameters.items()
            if p.kind is p.POSITIONAL_OR_KEYWORD
        },
        **{name: _hints(cls) for name, cls in (("peft", config), ("data", task.data), ("training", task.training()))},
    }
    return {
        section: {key: hint for key, hint in keys.items() if key not in NOT_IN_RECIPES.get(section, ())}
        for section, keys in known.items()
    }


def _hints(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls) if field.init}


def _choice(draft: Draft, key: str, choices: list[str]) -> str:
    value = (draft.sections.get("peft") or {}).get(key)
    if value not in choices:
        near = difflib.get_close_matches(str(value).upper(), choices, 1)
        given = "is missing; it" if value is None else f"(={value!r})"
        hint = f"; did you mean {near[0]}?" if near else ""
        raise draft.error(f"peft.{key}", f"{given} must be one of {', '.join(choices)}{hint}")
    return value


def _check(draft: Draft, keys: dict[str, dict[str, Any]]) -> None:
    """Every key is known, has a value of the right kind, and none is missing."""
    for section, known in keys.items():
        for key, value in (draft.sections.get(section) or {}).items():
            name = f"{section}.{key}"
            if key not in known:
                kinds = " and ".join(draft.sections["peft"][kind] for kind in ("peft_type", "task_type"))
                raise draft.error(name, f"is not a key of `{section}` for {kinds}{_hint(section, str(key), keys)}")
            if not _fits(value, known[key]):
                kind = getattr(known[key], "__name__", None) or str(known[key]).replace("typing.", "")
                raise draft.error(name, f"(={value!r}) must be {kind}, not {type(value).__name__}")
    for name in REQUIRED:
        section, key = name.split(".")
        if (draft.sections.get(section) or {}).get(key) is None:
            raise draft.error(section, f"lacks the key `{key}`, which every recipe needs")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value of YAML has the kind of an annotation; whole numbers are numbers, and classes check their words."""
    if "Literal" in str(kind) and isinstance(value, str):
        return True  # some of peft's are patterns, such as "pissa_niter_[number of iters]"
    for candidate in (value, float(value) if type(value) is int else value):
        try:
            type_validator("value", candidate, kind)
        except TypeError:
            continue
        return True
    return False


def _build(draft: Draft, keys: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The objects that the sections describe; their classes check the values."""
    sections = {name: dict(draft.sections.get(name) or {}) for name in SECTIONS if name != "metrics"}
    peft_type, task_type = (sections["peft"][key] for key in ("peft_type", "task_type"))
    task, config = TASKS[task_type], PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(peft_type)]
    options = {key: value for key, value in sections["peft"].items() if key != "peft_type"}
    options["revision"] = sections["model"].get("revision")
    built = {
        "model": ModelArguments(**sections["model"]),
        "peft": _checked(draft, "peft", config, options),
        "data": _checked(draft, "data", task.data, sections["data"]),
        "quantization": None,
        "metrics": _metrics(draft, task),
    }
    if sections["quantization"]:
        optional("bitsandbytes", "quantized")
        built["quantization"] = _checked(draft, "quantization", BitsAndBytesConfig, sections["quantization"])
    return {**built, "training": _checked(draft, "training", task.training(), sections["training"])}


def _checked(draft: Draft, section: str, cls: Callable[..., Any], options: dict[str, Any]) -> Any:
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
            near = difflib.get_close_matches(str(name), task.metrics, 1)
            has = f"has {', '.join(task.metrics)}" if task.metrics else "has the loss alone, and needs no metrics"
            hint = f"; did you mean {near[0]}?" if near else ""
            raise draft.error("metrics", f"has {name!r}, but this task {has}{hint}")
    if names and data.get("eval_split") is None:
        raise draft.error("metrics", "needs rows to measure on: set `data.eval_split`")
    if names and task.metrics is GENERATION and not training.get("predict_with_generate"):
        raise draft.error("metrics", "compares generated texts: set `training.predict_with_generate=true`")
    if training.get("eval_strategy", "no") != "no" and data.get("eval_split") is None:
        raise draft.error("training.eval_strategy", "needs rows to evaluate on: set `data.eval_split`")
    return list(names)
