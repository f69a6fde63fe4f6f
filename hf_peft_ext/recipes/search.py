"""A search in a file: base model, tasks, design space, training, queue; in YAML, checked at once."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import torch
from optuna.exceptions import OptunaError
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from transformers import AutoTokenizer, DataCollatorWithPadding

from ..design_space import DesignSpace
from ..metrics import CLASSIFICATION, classification_metrics
from ..placement import check, check_count
from ..trainers.search import DesignSpaceSearch, LowestShare, RunArguments, SearchTask, share_trunk
from . import runs
from .data import Classification
from .draft import Draft, RecipeError, did_you_mean, split_override
from .keys import ModelArguments, fields_of, fits
from .recipe import checked
from .tasks import TASKS, Task

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SECTIONS = ("model", "tasks", "space", "training", "search")


@dataclass
class QueueArguments:
    """The `search` section.

    Args:
        storage: a database's URL, "sqlite:///FILE" or "postgresql+psycopg://USER@HOST/NAME".
        study_name: the search's name in it.
        n_models: models sampled under each constraint.
        seed: of the samples and of the drawn rows.
        early_stopping: stop models that, after some epoch, are in the lowest quarter of those of their stage.
        heartbeat: seconds between signs of life of a run.
        output_dir: where the report and the winner's config go.
    """

    storage: str = "sqlite:///search.db"
    study_name: str = "s4"
    n_models: int = 12
    seed: int = 0
    early_stopping: bool = False
    heartbeat: int = 20
    output_dir: str = "search"

    def __post_init__(self) -> None:
        check_count("n_models", self.n_models)
        check_count("heartbeat", self.heartbeat)
        check("seed", self.seed, self.seed >= 0, "must be 0 or more")


@dataclass
class TaskArguments(Classification):
    """A task of the `tasks` section: the data of a recipe that classifies, and the metric that counts."""

    metric: str = "accuracy"

    def __post_init__(self) -> None:
        super().__post_init__()
        check("metric", self.metric, self.metric in CLASSIFICATION, f"must be one of {', '.join(CLASSIFICATION)}")
        check("eval_split", self.eval_split, self.eval_split is not None, "must name the rows to be scored on")


@dataclass
class SearchRecipe:
    """One search, by `read`.

    Raises:
        RecipeError: a key is not known, or its value is of the wrong kind or breaks a rule.
    """

    model: ModelArguments
    tasks: dict[str, TaskArguments]
    space: dict[str, Any]
    training: RunArguments
    search: QueueArguments
    quantization: None = field(default=None, init=False)
    task: Task = field(default=TASKS["SEQ_CLS"], init=False)

    @classmethod
    def read(cls, path: str | Path, overrides: Sequence[str] = ()) -> "SearchRecipe":
        """The search of a YAML file, with changes, each `section.key=value`."""
        draft = Draft.read(path)
        for name, value in map(split_override, overrides):
            draft.set(name, value)
        check_sections(draft)
        return cls(
            model=checked(draft, "model", ModelArguments, draft.sections["model"]),
            tasks={
                name: checked(draft, f"tasks.{name}", TaskArguments, dict(values))
                for name, values in draft.sections["tasks"].items()
            },
            space=dict(draft.sections.get("space") or {}),
            training=checked(draft, "training", RunArguments, draft.sections.get("training") or {}),
            search=checked(draft, "search", QueueArguments, draft.sections.get("search") or {}),
        )

    def load(self, progress: bool = True) -> DesignSpaceSearch:
        """The search, with model and data in it.

        Raises:
            RecipeError: there are no such data, no such model, or the space does not fit it.
        """
        source = runs.find_model(self)
        with runs.loading(source):
            tokenizer = AutoTokenizer.from_pretrained(source, revision=self.model.revision)
        parts = {name: task.load(self.search.seed) for name, task in self.tasks.items()}
        models = {name: runs.load_model(self, source, labels, tokenizer) for name, (*_, labels) in parts.items()}
        for model in share_trunk(models).values():
            model.to(DEVICE)
        tasks = {}
        for name, (train, evaluated, labels) in parts.items():
            rows, scored = (self.tasks[name].encode(part, tokenizer, labels) for part in (train, evaluated))
            metric = classification_metrics({self.tasks[name].metric: CLASSIFICATION[self.tasks[name].metric]})
            tasks[name] = SearchTask(models[name], rows, scored, metric, DataCollatorWithPadding(tokenizer))
        settings = self.search
        with self.explained():
            space = DesignSpace.of(next(iter(models.values())), **{"task_type": "SEQ_CLS", **self.space})
            return DesignSpaceSearch(
                tasks, space, self.training,
                storage=settings.storage, study_name=settings.study_name, n_models=settings.n_models,
                seed=settings.seed, heartbeat=settings.heartbeat, progress=progress,
                pruner=LowestShare() if settings.early_stopping else None,
            )  # fmt: skip

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn what is wrong with the space or the database, found in whatever stage, into a `RecipeError`."""
        try:
            yield
        except (OptunaError, SQLAlchemyError) as error:
            cause = error.__cause__ if isinstance(error.__cause__, SQLAlchemyError) else error
            said = cause.orig if isinstance(cause, DBAPIError) else cause
            raise RecipeError(f"`search.storage` (={self.search.storage!r}) cannot be used: {said}.") from error
        except ValueError as error:
            raise RecipeError(str(error)) from error


def check_sections(draft: Draft) -> None:
    """Raise a RecipeError where a section or a key is not known, has a value of the wrong kind, or is missing."""
    known = {
        "model": fields_of(ModelArguments),
        "space": space_keys(),
        "training": fields_of(RunArguments),
        "search": fields_of(QueueArguments),
    }
    for name, section in draft.sections.items():
        if name not in SECTIONS:
            hint = name_hint(str(name), known)
            raise draft.error(str(name), f"is not a section of a search ({', '.join(SECTIONS)}){hint}")
        if section is not None and not isinstance(section, dict):
            raise draft.error(name, "must be a mapping of keys to values")
    if not draft.sections.get("model", {}).get("model_name_or_path"):
        raise draft.error("model", "lacks `model_name_or_path`, which every search needs")
    if not draft.sections.get("tasks"):
        raise draft.error("tasks", "must hold at least one task")
    for name, keys in known.items():
        check_keys(draft, name, draft.sections.get(name) or {}, keys)
    for name, values in draft.sections["tasks"].items():
        if not isinstance(values, dict):
            raise draft.error(f"tasks.{name}", "must be a mapping of keys to values")
        check_keys(draft, f"tasks.{name}", values, fields_of(TaskArguments))


def name_hint(name: str, known: dict[str, dict[str, Any]]) -> str:
    """For what is no section: the key of that name in a section, else the nearest section, else the nearest key."""
    for section, keys in known.items():
        if name in keys:
            return f"; did you mean `{section}.{name}`?"
    near = (did_you_mean(name, keys, f"{section}.") for section, keys in known.items())
    return did_you_mean(name, SECTIONS) or next(filter(None, near), "")


def check_keys(draft: Draft, section: str, values: dict[str, Any], keys: dict[str, Any]) -> None:
    for key, value in values.items():
        if key not in keys:
            raise draft.error(f"{section}.{key}", f"is not a key of `{section}`{did_you_mean(key, keys)}")
        if not fits(value, keys[key]):
            kind = keys[key].__name__ if isinstance(keys[key], type) else str(keys[key]).replace("typing.", "")
            raise draft.error(f"{section}.{key}", f"(={value!r}) must be {kind}, not {type(value).__name__}")


def space_keys() -> dict[str, Any]:
    """What `DesignSpace` takes beside the model."""
    hints = get_type_hints(DesignSpace.of)
    names = [name for name in inspect.signature(DesignSpace.of).parameters if name not in ("model", "fields")]
    return {name: hints.get(name, Any) for name in names}
