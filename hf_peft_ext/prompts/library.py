"""Reads sets of templates from YAML files: those of this package, one for each task, and users' files.

    fields:                              # the fields of the rows
      text: a sentence of a film review
      label: 0 for negative, 1 for positive
    choices: [bad, good]                 # default of the templates; `answer` and `metric` can be set here too
    templates:
      - name: plain
        prompt: "{{ text }} All in all, the film is"
      - name: verdict
        prompt: ...
        choices: [negative, positive]

Every scalar is read as text: `choices: [no, yes]` are two words.
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
TEMPLATE_KEYS = {field.name for field in fields(PromptTemplate)}
SET_KEYS = {"fields", "templates"} | TEMPLATE_KEYS - {"name", "prompt"}


def template_tasks() -> list[str]:
    """The names of the tasks for which this package has templates."""
    return sorted(file.stem for file in TASKS.glob("*.yaml"))


def load_templates(source: str | Path) -> list[PromptTemplate]:
    """The templates of a task, or those of a YAML file.

    Args:
        source: one of `template_tasks()`, or the path of a .yaml or .yml file.

    Raises:
        TypeError: a part of the file has the wrong type.
        ValueError: there is no such task; or the file is too large, is not YAML, has missing or unknown keys, or a
            template is not valid. The message names file, template and key.
        FileNotFoundError: there is no such file.
    """
    return read(path_of(source))


def documented_fields(source: str | Path) -> dict[str, str]:
    """The documented fields of a task's rows: name -> meaning.

    Args:
        source: one of `template_tasks()`, or the path of a .yaml or .yml file.

    Raises:
        TypeError, ValueError, FileNotFoundError: see `load_templates`.
    """
    return dict(parsed(path_of(source)).get("fields", {}))


def path_of(source: str | Path) -> Path:
    """The file of a task, or the path itself. Raises as `load_templates`."""
    if Path(source).suffix in (".yaml", ".yml"):
        return Path(source)
    tasks = template_tasks()
    rule = f"must be one of {', '.join(tasks)}, or the path of a file that ends in .yaml"
    check("source", str(source), str(source) in tasks, rule)
    return TASKS / f"{source}.yaml"


def read(path: Path) -> list[PromptTemplate]:
    """The templates of a file.

    Raises:
        TypeError, ValueError, FileNotFoundError: see `load_templates`.
    """
    content = parsed(path)
    defaults = {key: value for key, value in content.items() if key in TEMPLATE_KEYS}
    templates = [template(path, i, part, defaults) for i, part in enumerate(content["templates"])]
    names = [one.name for one in templates]
    for name in names:
        if names.count(name) > 1:
            refuse_file(path, f"has {names.count(name)} templates with the name {name!r}")
    documented = set(content.get("fields", {}))
    for one in templates:
        missing = sorted((one.fields | {one.answer}) - documented)
        if documented and missing:
            refuse_file(path, f"lacks in `fields` what template {one.name!r} reads: {', '.join(missing)}")
    return templates


def parsed(path: Path) -> dict[str, Any]:
    """The content of a file, after its keys and their types were checked.

    Raises:
        TypeError, ValueError, FileNotFoundError: see `load_templates`.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        refuse_file(path, f"has {size:,} bytes; a set of templates may have {MAX_BYTES:,}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)  # only texts, lists and mappings
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path.name} is not YAML: {error}") from error
    check_keys(path, "the file", content, SET_KEYS, {"templates"})
    described = content.get("fields", {})
    if not isinstance(described, dict) or not all(isinstance(text, str) for text in described.values()):
        raise TypeError(f"{path.name}: `fields` must map each field to a text about it.")
    if not isinstance(content["templates"], list) or not content["templates"]:
        raise TypeError(f"{path.name}: `templates` must be a list of at least one template.")
    return content


def template(path: Path, index: int, part: Any, defaults: Mapping[str, Any]) -> PromptTemplate:
    """One template of a file; errors name the file."""
    check_keys(path, f"template {index + 1}", part, TEMPLATE_KEYS, {"name", "prompt", "choices"} - defaults.keys())
    try:
        return PromptTemplate(**{**defaults, **part})
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path.name}: {error}") from error


def check_keys(path: Path, what: str, part: Any, allowed: set[str], needed: set[str]) -> None:
    """Refuse a part of a file with unknown or missing keys.

    Raises:
        TypeError: it is not a mapping.
        ValueError: its keys are wrong.
    """
    if not isinstance(part, dict):
        raise TypeError(f"{path.name}: {what} must be a mapping of keys to values, not a {type(part).__name__}.")
    unknown, missing = sorted(part.keys() - allowed), sorted(needed - part.keys())
    if unknown:
        names, rule = ", ".join(unknown), f"allowed are {', '.join(sorted(allowed))}"
        refuse_file(path, f"has unknown keys in {what}: {names}; {rule}")
    if missing:
        refuse_file(path, f"lacks keys in {what}: {', '.join(missing)}")


def refuse_file(path: Path, rule: str) -> NoReturn:
    """Raise a ValueError that names the file."""
    raise ValueError(f"{path.name} {rule}.")
