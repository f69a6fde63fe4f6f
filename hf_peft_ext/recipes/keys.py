"""Which keys a recipe has: those of the classes that its sections become; and what is said of any other."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from huggingface_hub.dataclasses import type_validator
from transformers import BitsAndBytesConfig

from ..trainers.secret import is_secret
from .draft import Draft, RecipeError, did_you_mean, nearest, split_override
from .tasks import CONFIGS, TASKS, task_of

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
        gguf_file: the file in the model's folder, if it is one in GGUF; its weights are unpacked.
    """

    model_name_or_path: str
    local_path: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    attn_implementation: str | None = None
    gguf_file: str | None = None


def override(draft: Draft, changes: Sequence[str]) -> None:
    """Apply changes from the command line: whole sections, then what decides which keys there are, then keys.

    Args:
        draft: is changed.
        changes: each `section.key=value`, or `key=value` where one section alone has the key.

    Raises:
        RecipeError: a key is not known, stands in several sections, or is a secret.
    """

    def rank(change: tuple[str, Any]) -> int:
        return 0 if change[0] in SECTIONS else 1 if f"peft.{change[0]}" in KINDS or change[0] in KINDS else 2

    for name, value in sorted(map(split_override, changes), key=rank):
        if name.partition(".")[0] in SECTIONS:
            draft.set(name, value)
        elif f"peft.{name}" in KINDS:
            draft.set(f"peft.{name}", value)
        elif is_secret(name):
            draft.set(f"training.{name}", value)  # refused there
        else:
            draft.set(_full_name(name, known_keys(draft)), value)


def known_keys(draft: Draft) -> dict[str, dict[str, Any]]:
    """Section -> its keys and their types.

    Raises:
        RecipeError: a section is not known or no mapping, or the kind of adapter or task is missing or not known.
    """
    for name, section in draft.sections.items():
        if name not in SECTIONS:
            hint = did_you_mean(name, SECTIONS)
            raise draft.error(str(name), f"is not a section of a recipe ({', '.join(SECTIONS)}){hint}")
        if section is not None and not isinstance(section, list if name == "metrics" else dict):
            raise draft.error(name, f"must be a {'list' if name == 'metrics' else 'mapping of keys to values'}")
    config = CONFIGS[_choice(draft, "peft_type", list(CONFIGS))]
    task = task_of(_choice(draft, "task_type", list(TASKS)), draft.sections.get("data"))
    known = {
        "model": fields_of(ModelArguments),
        "quantization": {
            name: Any if parameter.default is None else type(parameter.default)
            for name, parameter in inspect.signature(BitsAndBytesConfig).parameters.items()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        },
        "peft": fields_of(config),
        "data": fields_of(task.data),
        "training": fields_of(task.training()),
    }
    for section, names in NOT_IN_RECIPES.items():
        known[section] = {key: kind for key, kind in known[section].items() if key not in names}
    known["training"]["resume_from_checkpoint"] = (
        bool | str | None
    )  # as `Trainer.train` takes it, not as its arguments
    return known


def check_keys(draft: Draft, known: dict[str, dict[str, Any]]) -> None:
    """Raise a RecipeError where a key is not known, has a value of the wrong kind, or is missing."""
    kinds = " and ".join(draft.sections["peft"][name.partition(".")[2]] for name in KINDS)
    for section, keys in known.items():
        for key, value in (draft.sections.get(section) or {}).items():
            name = f"{section}.{key}"
            if key not in keys:
                raise draft.error(name, f"is not a key of `{section}` for {kinds}{_hint(section, str(key), known)}")
            if not fits(value, keys[key]):
                kind = keys[key].__name__ if isinstance(keys[key], type) else str(keys[key]).replace("typing.", "")
                raise draft.error(name, f"(={value!r}) must be {kind}, not {type(value).__name__}")
    for name in REQUIRED:
        section, _, key = name.partition(".")
        if (draft.sections.get(section) or {}).get(key) is None:
            raise draft.error(section, f"lacks `{key}`, which every recipe needs")


def fields_of(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls) if field.init}


def _choice(draft: Draft, key: str, choices: list[str]) -> str:
    value = (draft.sections.get("peft") or {}).get(key)
    if value not in choices:
        given = "is missing; it" if value is None else f"(={value!r})"
        hint = did_you_mean(str(value).upper(), choices)
        raise draft.error(f"peft.{key}", f"{given} must be one of {', '.join(choices)}{hint}")
    return value


def _full_name(name: str, known: dict[str, dict[str, Any]]) -> str:
    """`name`, with its section in front."""
    first, _, rest = name.partition(".")
    found = [section for section in known if first in known[section]]
    if len(found) > 1:
        choices = " or ".join(f"`{section}.{name}`" for section in found)
        raise RecipeError(f"command line: `{name}` stands in more than one section; write {choices}.")
    if not found:
        section = did_you_mean(first, SECTIONS).replace("`?", f".{rest}`?") if rest else ""
        raise RecipeError(
            f"command line: `{name}` is not a key of a recipe{section or _hint('', first, known) or '.'}"
        )
    return f"{found[0]}.{name}"


def _hint(section: str, key: str, known: dict[str, dict[str, Any]]) -> str:
    """The nearest right name: the same key in another section, else a similar one in this section, else anywhere."""
    for other in known:
        if key in known[other]:
            return f"; did you mean `{other}.{key}`?"
    here = did_you_mean(key, known.get(section, ()), f"{section}.")
    dotted = {name: f"{other}.{name}" for other in known for name in known[other]}
    near = nearest(key, dotted)
    return here or (f"; did you mean `{dotted[near]}`?" if near else "")


def fits(value: Any, kind: Any) -> bool:
    """Whether a value has the kind of an annotation; a whole number is a number too, and classes check their words."""
    if "Literal" in str(kind) and isinstance(value, str):
        return True  # some of peft's are patterns: "pissa_niter_[number of iters]"
    for candidate in (value, float(value) if type(value) is int else value):
        try:
            type_validator("value", candidate, kind)
        except TypeError:
            continue
        return True
    return False
