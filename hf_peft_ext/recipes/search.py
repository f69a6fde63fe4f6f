"""A search as a YAML file: base model, tasks, design space, training and queue; checked when it is read."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import torch
from optuna.exceptions import OptunaError
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from transformers import AutoTokenizer, DataCollatorWithPadding

from hf_peft_ext.ranking.metrics import CLASSIFICATION, classification_metrics
from hf_peft_ext.recipes.data import ClassificationData
from hf_peft_ext.recipes.recipe import construct
from hf_peft_ext.recipes.recipe_schema import Keys, ModelArguments, check_types, fields_of
from hf_peft_ext.recipes.recipe_source import RecipeError, RecipeSource, split_override
from hf_peft_ext.recipes.run import find_model, load_model, loading
from hf_peft_ext.recipes.tasks import RecipeTask, task_of
from hf_peft_ext.search import DesignSpace, DesignSpaceSearch, LowestShare, RunArguments, SearchTask, share_trunk
from hf_peft_ext.search.report import write_report
from hf_peft_ext.search.result import SearchResult
from hf_peft_ext.validation.checks import check, check_count, check_writable
from hf_peft_ext.validation.suggestions import did_you_mean

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEARCH_SECTIONS = ("model", "tasks", "space", "training", "search")


@dataclass
class QueueArguments:
    """The `search` section.

    Args:
        storage: a database's URL, "sqlite:///FILE" or "postgresql+psycopg://USER@HOST/NAME".
        study_name: the search's name in it.
        n_models: models sampled under each constraint.
        seed: seed of the sampled models and of the drawn rows.
        early_stopping: stop models whose score after an epoch is in the lowest quarter of their stage.
        heartbeat: seconds between two heartbeats of a run.
        output_dir: folder for the report and the config of the result.
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
class TaskArguments(ClassificationData):
    """A task of the `tasks` section: classification data as in a recipe, and the metric that is the score."""

    metric: str = "accuracy"

    def __post_init__(self) -> None:
        super().__post_init__()
        check("metric", self.metric, self.metric in CLASSIFICATION, f"must be one of {', '.join(CLASSIFICATION)}")
        rule = "must be single_label_classification: a search compares accuracies"
        check("problem_type", self.problem_type, not self.is_regression, rule)
        check("eval_split", self.eval_split, self.eval_split is not None, "must name the rows to score models on")


@dataclass
class SearchRecipe:
    """One search, made by `read`.

    Args:
        model: the base model.
        tasks: name -> data and metric.
        space: arguments of `DesignSpace.of`.
        training: how each run trains.
        search: the queue, and the number of models.
    """

    model: ModelArguments
    tasks: dict[str, TaskArguments]
    space: dict[str, Any]
    training: RunArguments
    search: QueueArguments
    quantization: None = field(default=None, init=False)

    @property
    def task(self) -> RecipeTask:
        """Classification."""
        return task_of("SEQ_CLS", None, self.model.pooling)

    @classmethod
    def read(cls, path: str | Path, overrides: Sequence[str] = ()) -> "SearchRecipe":
        """Read the search of a YAML file.

        Args:
            path: the file.
            overrides: changes, each `section.key=value`.

        Raises:
            RecipeError: a key is unknown, or its value has the wrong type or breaks a rule.
        """
        source = RecipeSource.read(path)
        for name, value in map(split_override, overrides):
            source.set(name, value)
        check_sections(source)
        return cls(
            model=construct(source, "model", ModelArguments, source.sections["model"]),
            tasks={
                name: construct(source, f"tasks.{name}", TaskArguments, dict(values))
                for name, values in source.sections["tasks"].items()
            },
            space=dict(source.sections.get("space") or {}),
            training=construct(source, "training", RunArguments, source.sections.get("training") or {}),
            search=construct(source, "search", QueueArguments, source.sections.get("search") or {}),
        )

    def load(self, progress: bool = True) -> DesignSpaceSearch:
        """Load the model and the data.

        Args:
            progress: whether the search shows its progress.

        Raises:
            RecipeError: data or model cannot be loaded, the space does not fit the model, or the database fails.
        """
        path = find_model(self)
        with loading(path):
            tokenizer = AutoTokenizer.from_pretrained(path, revision=self.model.revision)
        datasets = {name: task.load(self.search.seed) for name, task in self.tasks.items()}
        models = {name: load_model(self, path, labels, tokenizer) for name, (*_, labels) in datasets.items()}
        for model in share_trunk(models).values():
            model.to(DEVICE)
        tasks = {}
        for name, (*splits, labels) in datasets.items():
            train, evaluation = (self.tasks[name].encode(rows, tokenizer, labels) for rows in splits)
            metric = classification_metrics({self.tasks[name].metric: CLASSIFICATION[self.tasks[name].metric]})
            tasks[name] = SearchTask(models[name], train, evaluation, metric, DataCollatorWithPadding(tokenizer))
        settings = self.search
        with self.recipe_errors():
            space = DesignSpace.of(next(iter(models.values())), **{"task_type": "SEQ_CLS", **self.space})
            return DesignSpaceSearch(
                tasks, space, self.training,
                storage=settings.storage, study_name=settings.study_name, n_models=settings.n_models,
                seed=settings.seed, heartbeat=settings.heartbeat, progress=progress,
                pruner=LowestShare() if settings.early_stopping else None,
            )  # fmt: skip

    def check_writable(self) -> None:
        """Refuse an output folder that cannot be created or written.

        Raises:
            ValueError: it cannot.
        """
        check_writable("search.output_dir", self.search.output_dir)

    def result(self) -> SearchResult:
        """The runs in the search's database.

        Raises:
            RecipeError: the database fails, or has no such search.
        """
        with self.recipe_errors():
            return SearchResult.load(self.search.storage, self.search.study_name)

    def write_report(self, result: SearchResult) -> Path:
        """Write the report of a search into its folder; its path."""
        return write_report(result, Path(self.search.output_dir))

    @contextmanager
    def recipe_errors(self) -> Iterator[None]:
        """Turn errors of the space and of the database into a `RecipeError`."""
        try:
            yield
        except (OptunaError, SQLAlchemyError) as error:
            cause = error.__cause__ if isinstance(error.__cause__, SQLAlchemyError) else error
            reason = cause.orig if isinstance(cause, DBAPIError) else cause
            raise RecipeError(f"`search.storage` (={self.search.storage!r}) cannot be used: {reason}.") from error
        except ValueError as error:
            raise RecipeError(str(error)) from error


def check_sections(source: RecipeSource) -> None:
    """Check the sections of a search and their keys.

    Raises:
        RecipeError: a section or a key is unknown, has a value of the wrong type, or is missing.
    """
    schema = {
        "model": fields_of(ModelArguments),
        "space": space_keys(),
        "training": fields_of(RunArguments),
        "search": fields_of(QueueArguments),
    }
    for name, section in source.sections.items():
        if name not in SEARCH_SECTIONS:
            hint = section_hint(str(name), schema)
            raise source.error(str(name), f"is not a section of a search ({', '.join(SEARCH_SECTIONS)}){hint}")
        if section is not None and not isinstance(section, dict):
            raise source.error(name, "must be a mapping of keys to values")
    if not source.sections.get("model", {}).get("model_name_or_path"):
        raise source.error("model", "lacks `model_name_or_path`, which every search needs")
    if not source.sections.get("tasks"):
        raise source.error("tasks", "must hold at least one task")
    for name, keys in schema.items():
        check_section(source, name, source.sections.get(name) or {}, keys)
    for name, values in source.sections["tasks"].items():
        check_section(source, f"tasks.{name}", values, fields_of(TaskArguments))


def check_section(source: RecipeSource, section: str, values: Any, keys: Keys) -> None:
    """Check the keys of a section and the types of its values."""
    if not isinstance(values, dict):
        raise source.error(section, "must be a mapping of keys to values")
    for key in values:
        if key not in keys:
            raise source.error(f"{section}.{key}", f"is not a key of `{section}`{did_you_mean(key, keys)}")
    check_types(source, section, values, keys)


def section_hint(name: str, schema: Mapping[str, Keys]) -> str:
    """A suggestion for an unknown section: the key of that name, else the nearest section, else the nearest key."""
    for section, keys in schema.items():
        if name in keys:
            return f"; did you mean `{section}.{name}`?"
    near = (did_you_mean(name, keys, f"{section}.") for section, keys in schema.items())
    return did_you_mean(name, SEARCH_SECTIONS) or next(filter(None, near), "")


def space_keys() -> Keys:
    """The arguments of `DesignSpace.of`, without the model, and their types."""
    hints = get_type_hints(DesignSpace.of)
    names = [name for name in inspect.signature(DesignSpace.of).parameters if name not in ("model", "fields")]
    return {name: hints.get(name, Any) for name in names}
