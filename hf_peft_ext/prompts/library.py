"""Sets of templates as YAML files: those of this package, one for each task, and a user's own.

    fields:                              # what the rows hold
      text: a sentence of a film review
      label: 0 for negative, 1 for positive
    choices: [bad, good]                 # of templates that have none of their own, as are `answer` and `metric`
    templates:
      - name: plain
        prompt: "{{ text }} All in all, the film is"
      - name: verdict
        prompt: ...
        choices: [negative, positive]

Every scalar is read as a text: `choices: [no, yes]` are two words.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml

from hf_peft_ext.prompts.template import PromptTemplate
from hf_peft_ext.validation.checks import check

TASKS = Path(__file__).parent / "tasks"
MAX_BYTES = 1_000_000
OF_A_TEMPLATE = {field.name for field in fields(PromptTemplate)}
OF_A_SET = {"fields", "templates"} | OF_A_TEMPLATE - {"name", "prompt"}


def template_tasks() -> list[str]:
    """The tasks that this package has templates for."""
    return sorted(file.stem for file in TASKS.glob("*.yaml"))


def load_templates(source: str | Path) -> list[PromptTemplate]:
    """The templates of a task, or those of a YAML file.

    Args:
        source: one of `template_tasks()`, or the path of a file that ends in .yaml or .yml.

    Raises:
        TypeError: a part of the file is of the wrong kind.
        ValueError: there is no such task; or the file is too large, is not YAML, lacks a key or has one too many, or
            has a template that breaks a rule. The message names file, template and key.
        FileNotFoundError: there is no such file.
    """
    if Path(source).suffix in (".yaml", ".yml"):
        return read(Path(source))
    tasks = template_tasks()
    rule = f"must be one of {', '.join(tasks)}, or the path of a file that ends in .yaml"
    check("source", str(source), str(source) in tasks, rule)
    return read(TASKS / f"{source}.yaml")


def documented_fields(source: str | Path) -> dict[str, str]:
    """What the rows of a task must hold, as its file says it: field -> meaning."""
    path = Path(source) if Path(source).suffix in (".yaml", ".yml") else TASKS / f"{source}.yaml"
    return dict(parsed(path).get("fields", {}))


def read(path: Path) -> list[PromptTemplate]:
    """The templates of a YAML file.

    Raises:
        TypeError: a part of the file is of the wrong kind.
        ValueError: the file breaks a rule, see `load_templates`.
    """
    content = parsed(path)
    defaults = {key: value for key, value in content.items() if key in OF_A_TEMPLATE}
    templates = [template(path, i, part, defaults) for i, part in enumerate(content["templates"])]
    names = [one.name for one in templates]
    for name in names:
        if names.count(name) > 1:
            refuse(path, f"has {names.count(name)} templates of the name {name!r}")
    known = set(content.get("fields", {}))
    for one in templates:
        strange = sorted((one.fields | {one.answer}) - known)
        if known and strange:
            refuse(path, f"says nothing in `fields` of what template {one.name!r} reads: {', '.join(strange)}")
    return templates


def parsed(path: Path) -> dict[str, Any]:
    """A file's content, its keys and their kinds checked."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        refuse(path, f"has {size:,} bytes, more than the {MAX_BYTES:,} of a set of templates")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)  # texts, lists and mappings alone
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path.name} is not YAML: {error}") from error
    check_keys(path, "the file", content, OF_A_SET, {"templates"})
    described = content.get("fields", {})
    if not isinstance(described, dict) or not all(isinstance(text, str) for text in described.values()):
        raise TypeError(f"{path.name}: `fields` must say of each field, in a text, what it holds.")
    if not isinstance(content["templates"], list) or not content["templates"]:
        raise TypeError(f"{path.name}: `templates` must be a list of at least one template.")
    return content


def template(path: Path, index: int, part: Any, defaults: Mapping[str, Any]) -> PromptTemplate:
    """One entry of `templates`, completed by the keys that the file sets for all.

    Raises:
        TypeError: the entry is of the wrong kind.
        ValueError: a key is missing, unknown or breaks a rule.
    """
    check_keys(path, f"template {index + 1}", part, OF_A_TEMPLATE, {"name", "prompt", "choices"} - defaults.keys())
    try:
        return PromptTemplate(**{**defaults, **part})
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path.name}: {error}") from error


def check_keys(path: Path, what: str, part: Any, known: set[str], needed: set[str]) -> None:
    """Refuse a mapping with unknown keys or without needed ones.

    Raises:
        TypeError: `part` is no mapping.
        ValueError: a key is unknown or missing.
    """
    if not isinstance(part, dict):
        raise TypeError(f"{path.name}: {what} must be a mapping of keys to values, not a {type(part).__name__}.")
    strange, missing = sorted(part.keys() - known), sorted(needed - part.keys())
    if strange:
        refuse(
            path, f"has keys in {what} that are not known: {', '.join(strange)}; known are {', '.join(sorted(known))}"
        )
    if missing:
        refuse(path, f"lacks keys in {what}: {', '.join(missing)}")


def refuse(path: Path, rule: str) -> NoReturn:
    """Raise a ValueError that names the file."""
    raise ValueError(f"{path.name} {rule}.")
