"""A recipe as it is written: YAML, and what the command line changes in it. Knows nothing of what the keys mean."""

import difflib
import importlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..trainers.secret import is_secret, without_secrets


class RecipeError(ValueError):
    """What is wrong in a recipe, and where; raised before a model is loaded or a file is written."""


# words that people use for a key, which are not near it in letters
ALIASES = {
    **dict.fromkeys(("lr", "rate"), "learning_rate"),
    **dict.fromkeys(("epochs", "num_epochs", "n_epochs", "max_epochs"), "num_train_epochs"),
    **dict.fromkeys(("batch_size", "train_batch_size", "batch", "bs"), "per_device_train_batch_size"),
    **dict.fromkeys(("eval_batch_size", "test_batch_size"), "per_device_eval_batch_size"),
    **dict.fromkeys(("grad_accum", "accumulation_steps", "gradient_accumulation"), "gradient_accumulation_steps"),
    **dict.fromkeys(("steps", "num_steps", "num_train_steps"), "max_steps"),
    **dict.fromkeys(("scheduler", "lr_scheduler"), "lr_scheduler_type"),
    **dict.fromkeys(("grad_clip", "clip", "gradient_clipping"), "max_grad_norm"),
    **dict.fromkeys(("warmup", "num_warmup_steps"), "warmup_steps"),
    **dict.fromkeys(("wd", "decay"), "weight_decay"),
    **dict.fromkeys(("out", "output", "output_folder", "save_dir"), "output_dir"),
    **dict.fromkeys(("base_model", "model_name", "model_id", "pretrained"), "model_name_or_path"),
    **dict.fromkeys(("method", "adapter"), "peft_type"),
    **dict.fromkeys(("rank", "lora_r", "lora_rank"), "r"),
    **dict.fromkeys(("dataset", "dataset_name"), "path"),
    **dict.fromkeys(("file", "files", "train_file"), "data_files"),
    **dict.fromkeys(("max_seq_length", "seq_length", "sequence_length"), "max_length"),
    **dict.fromkeys(("db", "database"), "storage"),
    **dict.fromkeys(("task",), "task_type"),
}


def optional(module: str, extra: str, what: str = "This recipe") -> Any:
    """A module that comes with an extra of this package.

    Raises:
        RecipeError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RecipeError(f"{what} needs {module}: pip install 'hf_peft_ext[{extra}]'.") from error


def did_you_mean(word: object, words: Iterable[str], prefix: str = "") -> str:
    """The end of an error: the word that is meant or nearest, as a question; nothing where none is near."""
    near = nearest(word, words)
    return f"; did you mean `{prefix}{near}`?" if near else ""


def nearest(word: object, words: Iterable[str]) -> str | None:
    """The word that another word for it means, else the one that is nearest in letters."""
    known = list(words)
    if ALIASES.get(str(word)) in known:
        return ALIASES[str(word)]
    return next(iter(difflib.get_close_matches(str(word), known, 1)), None)


class Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: 1e-4 is a number, and `no` is a word, as in `save_strategy: no`."""


Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?((\.\d+|\d+\.\d*)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+.0123456789"),
)


@dataclass
class Draft:
    """The sections as written, and where each key stands: "training.seed" -> "my.yaml, line 12"."""

    sections: dict[str, Any]
    places: dict[str, str]

    @classmethod
    def read(cls, path: str | Path) -> "Draft":
        """The draft of a file.

        Raises:
            RecipeError: the file is not there, is not YAML, gives a key twice, or holds a secret.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
            root = yaml.compose(text, Loader)
            sections = yaml.load(text, Loader)
        except OSError as error:
            raise RecipeError(f"Recipe '{path}' cannot be read: {error.strerror}.") from error
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            mark = getattr(error, "problem_mark", None)
            line = f", line {mark.line + 1}" if mark else ""
            raise RecipeError(
                f"{path}{line}: this is not YAML: {getattr(error, 'problem', None) or error}."
            ) from error
        if not isinstance(sections, dict):
            raise RecipeError(f"{path}: a recipe is a mapping of sections, not {type(sections).__name__}.")
        places: dict[str, str] = {}
        for name, line in _keys(root):
            if name in places:
                raise RecipeError(f"{path}, line {line}: `{name}` stands there a second time; first: {places[name]}.")
            places[name] = f"{path}, line {line}"
        draft = cls(sections, places)
        draft.refuse_secrets()
        return draft

    def set(self, name: str, value: Any) -> None:
        """Change one value from the command line; `name` is dotted: "training.seed", "training.fsdp_config.x"."""
        *parents, last = name.split(".")
        mapping = self.sections
        for parent in parents:
            if mapping.get(parent) is None:
                mapping[parent] = {}
            mapping = mapping[parent]
            if not isinstance(mapping, dict):
                raise self.error(name, f"has no place: `{parent}` is no mapping")
        mapping[last] = value
        self.places[name] = "command line"
        self.refuse_secrets()

    def error(self, name: str, rule: str) -> RecipeError:
        """An error that says where the key stands."""
        parts = name.split(".")
        dotted = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        place = next((self.places[key] for key in dotted if key in self.places), None)
        end = "" if rule.endswith("?") else "."
        return RecipeError(f"{place}: `{name}` {rule}{end}" if place else f"`{name}` {rule}{end}")

    def refuse_secrets(self) -> None:
        """A recipe is saved beside the adapter and pushed with it, so no secret may stand in it.

        Raises:
            RecipeError: a key is named like a secret, or a value looks like one. It does not show it.
        """
        for name, value in _values(self.sections):
            if is_secret(name) or without_secrets(value) != value:
                rule = "is a secret, and a recipe is saved and pushed with the adapter"
                raise self.error(name, f"{rule}; leave it out and log in with `hf auth login`, or set HF_TOKEN")


def split_override(text: str) -> tuple[str, Any]:
    """The name and the value of `name=value`; the value is YAML.

    Raises:
        RecipeError: there is no `=`, or no YAML behind it.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise RecipeError(f"command line: '{text}' changes nothing; write `key=value`, such as `peft.r=4`.")
    try:
        return name.strip(), yaml.load(value, Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"command line: the value of `{name}` is not YAML; quote it: `'{name}=\"...\"'`.") from error


def _keys(root: Any) -> Iterator[tuple[str, int]]:
    """Sections and their keys, in the order of the file, with their lines."""
    for section, body in root.value:
        yield section.value, section.start_mark.line + 1
        for key, _ in body.value if isinstance(body, yaml.MappingNode) else []:
            yield f"{section.value}.{key.value}", key.start_mark.line + 1


def _values(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Everything at every depth, under its dotted name."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _values(child, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for child in value:
            yield from _values(child, name)
    else:
        yield name, value
