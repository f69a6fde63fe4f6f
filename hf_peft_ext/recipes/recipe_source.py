"""A recipe as it is written: YAML, with line numbers, and the changes of the command line. Knows no keys.

PyYAML with the loader below is kept. TRL's TrlParser and transformers' HfArgumentParser have no sections and no line
numbers. ruamel.yaml has both and reads YAML 1.2, but would save nine lines only, for a second YAML library.
"""

import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hf_peft_ext.hub_cards.redact import is_secret, without_secrets


class RecipeError(ValueError):
    """An error in a recipe, with its place; raised before a model is loaded or a file is written."""


def optional(module: str, extra: str, what: str = "This recipe") -> Any:
    """Import a module that comes with an extra of this package.

    Args:
        module: its name.
        extra: the extra.
        what: what needs it, for the error.

    Raises:
        RecipeError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RecipeError(f"{what} needs {module}: pip install 'hf_peft_ext[{extra}]'.") from error


class RecipeLoader(yaml.SafeLoader):
    """Loads scalars as YAML 1.2 does: 1e-4 is a number, and `no` is a string, as in `save_strategy: no`."""


RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("bool", "float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?((\.\d+|\d+\.\d*)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+.0123456789"),
)


@dataclass
class RecipeSource:
    """The sections of a recipe as written, and the place of each key.

    Args:
        sections: section -> its keys and values.
        places: dotted key -> where it is: "training.seed" -> "my.yaml, line 12".
    """

    sections: dict[str, Any]
    places: dict[str, str]

    @classmethod
    def read(cls, path: str | Path) -> "RecipeSource":
        """Read a file.

        Raises:
            RecipeError: the file cannot be read, is not YAML, has a duplicate key, or holds a secret.
        """
        try:
            loader = RecipeLoader(Path(path).read_text(encoding="utf-8"))
            root = loader.get_single_node()
            sections = None if root is None else loader.construct_document(root)
        except OSError as error:
            raise RecipeError(f"Recipe '{path}' cannot be read: {error.strerror}.") from error
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            mark = getattr(error, "problem_mark", None)
            line = f", line {mark.line + 1}" if mark else ""
            problem = getattr(error, "problem", None) or error
            raise RecipeError(f"{path}{line}: this is not YAML: {problem}.") from error
        if not isinstance(sections, dict):
            raise RecipeError(f"{path}: a recipe is a mapping of sections, not {type(sections).__name__}.")
        places: dict[str, str] = {}
        for name, line in _lines(root):
            if name in places:
                raise RecipeError(f"{path}, line {line}: `{name}` is a duplicate key; the first is in {places[name]}.")
            places[name] = f"{path}, line {line}"
        source = cls(sections, places)
        source.refuse_secrets()
        return source

    def set(self, name: str, value: Any) -> None:
        """Set a value from the command line.

        Args:
            name: a dotted key: "training.seed", "training.fsdp_config.x".
            value: its new value.

        Raises:
            RecipeError: a part of the name before the last is not a mapping, or the value is a secret.
        """
        *parents, last = name.split(".")
        mapping = self.sections
        for parent in parents:
            if mapping.get(parent) is None:
                mapping[parent] = {}
            mapping = mapping[parent]
            if not isinstance(mapping, dict):
                raise self.error(name, f"cannot be set: `{parent}` is not a mapping")
        mapping[last] = value
        self.places[name] = "command line"
        self.refuse_secrets()

    def error(self, name: str, rule: str) -> RecipeError:
        """An error about a key, with the key's place, or that of the nearest mapping around it."""
        parts = name.split(".")
        dotted = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        place = next((f"{self.places[key]}: " for key in dotted if key in self.places), "")
        return RecipeError(f"{place}`{name}` {rule}{'' if rule.endswith('?') else '.'}")

    def refuse_secrets(self) -> None:
        """Refuse access tokens and the like: a recipe is saved beside the adapter and pushed with it.

        Raises:
            RecipeError: a key has the name of a secret, or a value looks like one. The error does not show it.
        """
        for name, value in _values(self.sections):
            if is_secret(name) or without_secrets(value) != value:
                rule = "is a secret, and a recipe is saved and pushed with the adapter"
                raise self.error(name, f"{rule}; leave it out and log in with `hf auth login`, or set HF_TOKEN")


def split_override(text: str) -> tuple[str, Any]:
    """The name and the value of `name=value`; the value is YAML.

    Raises:
        RecipeError: there is no `=`, or the value is not YAML.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise RecipeError(f"command line: '{text}' changes nothing; write `key=value`, such as `peft.r=4`.")
    try:
        return name.strip(), yaml.load(value, RecipeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"command line: the value of `{name}` is not YAML; quote it: `'{name}=\"...\"'`.") from error


def _lines(root: Any) -> Iterator[tuple[str, int]]:
    """Sections and their keys, in the order of the file, with their line numbers."""
    for section, body in root.value:
        yield section.value, section.start_mark.line + 1
        for key, _ in body.value if isinstance(body, yaml.MappingNode) else []:
            yield f"{section.value}.{key.value}", key.start_mark.line + 1


def _values(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The scalars at every depth, with their dotted names."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _values(child, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for child in value:
            yield from _values(child, name)
    else:
        yield name, value
