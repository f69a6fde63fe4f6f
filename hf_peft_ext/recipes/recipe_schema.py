"""The keys of a recipe: those of the classes that its sections become; and the errors about any other key."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from transformers import BitsAndBytesConfig

from hf_peft_ext.hub_cards.redact import is_secret
from hf_peft_ext.recipes.recipe_source import RecipeError, RecipeSource, split_override
from hf_peft_ext.recipes.tasks import CONFIGS, RECIPE_TASKS, task_of
from hf_peft_ext.validation.checks import check
from hf_peft_ext.validation.config_schema import fits, type_hints, type_name
from hf_peft_ext.validation.suggestions import did_you_mean, nearest

SECTIONS = ("model", "quantization", "peft", "data", "training", "metrics")
KINDS = ("peft.peft_type", "peft.task_type")  # these decide which keys the sections have
REQUIRED = ("model.model_name_or_path", *KINDS, "training.output_dir")
# Fields that no recipe may set: peft and the trainers fill them in, or the model is loaded already.
NOT_IN_RECIPES = {
    "peft": ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
    "training": ("hub_token", "model_init_kwargs"),
}

Keys = Mapping[str, Any]  # key -> type


@dataclass
class ModelArguments:
    """The base model; all but `local_path` are arguments of `from_pretrained`.

    Args:
        model_name_or_path: a Hub id or a folder.
        local_path: a local copy of the model, which is loaded instead; the adapter still names `model_name_or_path`.
            A folder, or `package:NAME/FOLDER` for one inside an installed package.
        revision: branch, tag or commit on the Hub.
        dtype: "float32", "bfloat16", "float16" or "auto".
        attn_implementation: "sdpa" or "eager" for methods with prefixes.
        gguf_file: a GGUF file in the model's folder; its weights are dequantized.
        pooling: "mean" for a classifier on the mean of the last hidden states, with a `task_type` of SEQ_CLS; None for
            what transformers' class reads.
    """

    model_name_or_path: str
    local_path: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    attn_implementation: str | None = None
    gguf_file: str | None = None
    pooling: Literal["mean"] | None = None

    def __post_init__(self) -> None:  # `check_types` leaves the choices of a Literal to the class
        check("pooling", self.pooling, self.pooling in (None, "mean"), "must be null or mean")


def override(source: RecipeSource, changes: Sequence[str]) -> None:
    """Apply changes from the command line: whole sections, then `peft_type` and `task_type`, then other keys.

    Args:
        source: the recipe, which is changed.
        changes: each `section.key=value`, or `key=value` if only one section has the key.

    Raises:
        RecipeError: a key is unknown, is in several sections, or is a secret.
    """

    def rank(change: tuple[str, Any]) -> int:
        return 0 if change[0] in SECTIONS else 1 if f"peft.{change[0]}" in KINDS or change[0] in KINDS else 2

    for name, value in sorted(map(split_override, changes), key=rank):
        if name.partition(".")[0] in SECTIONS:
            source.set(name, value)
        elif f"peft.{name}" in KINDS:
            source.set(f"peft.{name}", value)
        elif is_secret(name):
            source.set(f"training.{name}", value)  # raises
        else:
            source.set(_full_name(name, section_keys(source)), value)


def section_keys(source: RecipeSource) -> dict[str, Keys]:
    """Section -> its keys and their types.

    Raises:
        RecipeError: a section is unknown or not a mapping, or `peft_type` or `task_type` is missing or unknown.
    """
    for name, section in source.sections.items():
        if name not in SECTIONS:
            hint = did_you_mean(name, SECTIONS)
            raise source.error(str(name), f"is not a section of a recipe ({', '.join(SECTIONS)}){hint}")
        if section is not None and not isinstance(section, list if name == "metrics" else dict):
            raise source.error(name, f"must be a {'list' if name == 'metrics' else 'mapping of keys to values'}")
    config = CONFIGS[_choice(source, "peft_type", list(CONFIGS))]
    task = task_of(_choice(source, "task_type", list(RECIPE_TASKS)), source.sections.get("data"))
    keys = {
        "model": fields_of(ModelArguments),
        "quantization": {
            name: Any if parameter.default is None else type(parameter.default)
            for name, parameter in inspect.signature(BitsAndBytesConfig).parameters.items()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        },
        "peft": fields_of(config),
        "data": fields_of(task.data),
        # `resume_from_checkpoint` is an argument of `Trainer.train`, which takes True as well
        "training": {**fields_of(task.training()), "resume_from_checkpoint": bool | str | None},
    }
    for section, names in NOT_IN_RECIPES.items():
        keys[section] = {key: hint for key, hint in keys[section].items() if key not in names}
    return keys


def check_recipe(source: RecipeSource) -> None:
    """Check the keys of all sections.

    Raises:
        RecipeError: a key is unknown, has a value of the wrong type, or is missing.
    """
    schema = section_keys(source)
    kinds = " and ".join(source.sections["peft"][name.partition(".")[2]] for name in KINDS)
    for section, keys in schema.items():
        for key in source.sections.get(section) or {}:
            if key not in keys:
                hint = _hint(section, str(key), schema)
                raise source.error(f"{section}.{key}", f"is not a key of `{section}` for {kinds}{hint}")
        check_types(source, section, source.sections.get(section) or {}, keys)
    for name in REQUIRED:
        section, _, key = name.partition(".")
        if (source.sections.get(section) or {}).get(key) is None:
            raise source.error(section, f"lacks `{key}`, which every recipe needs")


def check_types(source: RecipeSource, section: str, values: Mapping[str, Any], keys: Keys) -> None:
    """Check the types of a section's values. Strings for a Literal pass: the class itself checks its choices.

    Raises:
        RecipeError: a value has the wrong type.
    """
    for key, value in values.items():
        is_choice = "Literal" in str(keys[key]) and isinstance(value, str)  # peft has "pissa_niter_[number of iters]"
        if not (is_choice or fits(value, keys[key])):
            rule = f"(={value!r}) must be {type_name(keys[key])}, not {type(value).__name__}"
            raise source.error(f"{section}.{key}", rule)


def fields_of(cls: Any) -> dict[str, Any]:
    """The arguments of a dataclass, with their types."""
    hints = type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls) if field.init}


def _choice(source: RecipeSource, key: str, choices: list[str]) -> str:
    value = (source.sections.get("peft") or {}).get(key)
    if value not in choices:
        actual = "is missing; it" if value is None else f"(={value!r})"
        hint = did_you_mean(str(value).upper(), choices)
        raise source.error(f"peft.{key}", f"{actual} must be one of {', '.join(choices)}{hint}")
    return value


def _full_name(name: str, schema: Mapping[str, Keys]) -> str:
    """The key with its section in front.

    Raises:
        RecipeError: no section, or more than one, has the key.
    """
    first, _, rest = name.partition(".")
    sections = [section for section, keys in schema.items() if first in keys]
    if len(sections) > 1:
        choices = " or ".join(f"`{section}.{name}`" for section in sections)
        raise RecipeError(f"command line: `{name}` is a key of more than one section; write {choices}.")
    if not sections:
        section = did_you_mean(first, SECTIONS).replace("`?", f".{rest}`?") if rest else ""
        hint = section or _hint("", first, schema) or "."
        raise RecipeError(f"command line: `{name}` is not a key of a recipe{hint}")
    return f"{sections[0]}.{name}"


def _hint(section: str, key: str, schema: Mapping[str, Keys]) -> str:
    """A suggestion: the same key in another section, else a similar one in this section, else in any."""
    for other in schema:
        if key in schema[other]:
            return f"; did you mean `{other}.{key}`?"
    dotted = {name: f"{other}.{name}" for other in schema for name in schema[other]}
    near = nearest(key, dotted)
    similar = f"; did you mean `{dotted[near]}`?" if near else ""
    return did_you_mean(key, schema.get(section, ()), f"{section}.") or similar
