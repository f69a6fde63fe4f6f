"""Solves the sizes of methods for equal numbers of trained parameters."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import ShiraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig

from hf_peft_ext.compare.methods import Method
from hf_peft_ext.loading.expected_tensors import first_weights
from hf_peft_ext.recipes.embeddings import EmbeddingData
from hf_peft_ext.recipes.recipe import Recipe
from hf_peft_ext.recipes.recipe_source import RecipeError
from hf_peft_ext.recipes.run import find_model, loading
from hf_peft_ext.recipes.tasks import CONFIGS
from hf_peft_ext.search.search import adapter_parameters
from hf_peft_ext.tuners.ia3.config import TFewConfig
from hf_peft_ext.tuners.learning_rates import largest_rate
from hf_peft_ext.tuners.s4.costs import base_parameters
from hf_peft_ext.tuners.s4.solve import TOLERANCE, OutOfReach
from hf_peft_ext.tuners.target_modules import with_target_modules
from hf_peft_ext.validation.checks import check, is_number

Budget = int | str | None


@dataclass(frozen=True)
class SizedMethod:
    """A method with the sizes that it is compared at.

    Args:
        method: the method.
        config: the `peft` section of its recipe.
        parameters: number of trained parameters without the head; None if it is known only after attaching.
        learning_rate: its usual learning rate at these sizes.
    """

    method: Method
    config: dict[str, Any]
    parameters: int | None
    learning_rate: float


def check_budget(budget: Budget) -> None:
    """Check the form of a budget: a percentage such as "0.5%", a number of parameters, or None.

    Raises:
        ValueError: it has another form, or is not positive.
    """
    rule = 'must be a share of the base model, such as "0.5%", or a number of parameters'
    if isinstance(budget, str) and budget.endswith("%"):
        share = as_number(budget[:-1])
        check("budget", budget, share is not None and 0 < share < 100, rule)
    elif budget is not None:
        count = as_number(budget)
        check("budget", budget, count is not None and count >= 1 and count == int(count), rule)


def as_number(value: object) -> float | None:
    """A value as a finite number, or None."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return number if is_number(number) and not isinstance(value, bool) else None


def parameters_of(budget: Budget, base: int) -> int | None:
    """A budget as a number of parameters.

    Args:
        budget: as in `check_budget`.
        base: number of parameters of the base model.
    """
    if isinstance(budget, str) and budget.endswith("%"):
        return round(float(budget[:-1]) / 100 * base)
    return None if budget is None else int(float(budget))


def empty_model(recipe: Recipe, labels: list[str]) -> nn.Module:
    """The recipe's base model on the meta device: its structure without weights.

    Raises:
        RecipeError: the recipe is of an embedding model, or the model's config cannot be loaded.
    """
    if isinstance(recipe.data, EmbeddingData):
        raise RecipeError(
            "`peft.task_type` (='FEATURE_EXTRACTION') must be another: embedding models are not compared."
        )
    source = find_model(recipe)
    options: dict[str, Any] = {"num_labels": len(labels)} if labels else {}
    with loading(source):
        config = AutoConfig.from_pretrained(
            source, revision=recipe.model.revision, gguf_file=recipe.model.gguf_file, **options
        )
        with torch.device("meta"):
            return recipe.task.model.from_config(config)


def size_methods(
    methods: Mapping[str, Method], budget: Budget, task_type: str, make_model: Callable[[], nn.Module]
) -> dict[str, SizedMethod]:
    """The sizes of each method, solved for the budget where it can be; every method is attached once as a check.

    Args:
        methods: name -> method.
        budget: as in `check_budget`; None for the methods' own sizes.
        task_type: peft's task type.
        make_model: makes the base model without weights.

    Raises:
        ValueError: a method cannot be attached to the model, trains nothing, or is more than 5 % away from the budget.
    """
    empty: Any = make_model()
    base = base_parameters(empty)
    target, hidden_size = parameters_of(budget, base), getattr(empty.config.get_text_config(), "hidden_size", None)

    def count(name: str, config: Mapping[str, Any]) -> int:
        fields = {key: value for key, value in config.items() if key != "peft_type"}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # each run repeats them
                peft_config = CONFIGS[config["peft_type"]](task_type=task_type, **fields)
                if isinstance(peft_config, ShiraConfig):
                    peft_config.mask_fn = first_weights  # peft draws no mask on the meta device
                model: Any = get_peft_model(make_model(), peft_config)  # type: ignore[arg-type]
        except OutOfReach as error:
            raise ValueError(f"`methods` (={name!r}): {error}") from error
        except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
            raise ValueError(f"`methods` (={name!r}) cannot be attached to this model: {error}") from error
        trained = any(parameter.requires_grad for parameter in model.parameters())
        check("methods", name, trained or methods[name].trains_base, "trains nothing: this model has no head")
        return adapter_parameters(model)

    sized = {}
    for name, usual in methods.items():
        method = located(name, usual, task_type, make_model)
        config = dict(method.config)
        if method.trains_base:
            count(name, config)
            parameters: int | None = base
        elif config["peft_type"] == "LADDER":  # made of the model's weights, which an empty model lacks
            parameters = None
        elif target is not None and method.sizes:
            sizes = solve_sizes(lambda sizes: count(name, method.sized(sizes)), method.sizes, target)  # noqa: B023
            config = method.sized(sizes)
            parameters = count(name, config)
            nearest = f"{parameters:,} parameters, a budget of {parameters / base:.3%}"
            rule = f"is {target:,} of {base:,} parameters, which {method.title} cannot meet: the nearest is {nearest}"
            check("budget", budget, abs(parameters - target) <= TOLERANCE * target, rule)
        else:
            if target is not None and config["peft_type"] == "S4":
                config["budget"] = target / base
            parameters = count(name, config)
        fields = {key: value for key, value in config.items() if key != "peft_type"}
        largest = largest_rate(CONFIGS[config["peft_type"]](task_type=task_type, **fields), hidden_size)
        sized[name] = SizedMethod(method, config, parameters, min(method.learning_rate, largest))
    return sized


def located(name: str, method: Method, task_type: str, make_model: Callable[[], nn.Module]) -> Method:
    """The method with the modules that it is for, on a model for which peft knows none.

    Args:
        name: the method's name, for errors.
        method, task_type, make_model: as in `size_methods`.

    Raises:
        ValueError: the model has no such modules.
    """
    fields = {key: value for key, value in method.config.items() if key != "peft_type"}
    try:
        usual = CONFIGS[method.config["peft_type"]](task_type=task_type, **fields)
        config: Any = with_target_modules(usual, make_model())
    except (ValueError, TypeError) as error:
        raise ValueError(f"`methods` (={name!r}) cannot be attached to this model: {error}") from error
    if isinstance(config, TFewConfig):  # (IA)³ on the modules that are found in the model's structure
        return replace(method, config={**method.config, "peft_type": "TFEW"})
    targets: Any = getattr(config, "target_modules", None)
    if targets == getattr(usual, "target_modules", None):
        return method
    return replace(method, config={**method.config, "target_modules": sorted(targets)})


def solve_sizes(count: Callable[[Mapping[str, int]], int], usual: Mapping[str, int], target: int) -> dict[str, int]:
    """Sizes in about their usual proportions, for a number of parameters that is affine in each size.

    Args:
        count: the number of parameters at some sizes.
        usual: the usual sizes.
        target: the number of parameters to come close to.
    """
    ones = dict.fromkeys(usual, 1)
    least = count(ones)
    units = {name: count({**ones, name: 2}) - least for name in usual}

    def total(sizes: Mapping[str, int]) -> int:
        return least + sum(units[name] * (size - 1) for name, size in sizes.items())

    def scaled(factor: float) -> dict[str, int]:
        return {name: max(1, round(factor * size)) for name, size in usual.items()}

    low, high = 0.0, 1.0
    while total(scaled(high)) < target:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if total(scaled(middle)) <= target else (low, middle)
    sizes = scaled(low)
    finest = min(units, key=lambda name: units[name])  # absorbs what the rounding left
    sizes[finest] = max(1, sizes[finest] + round((target - total(sizes)) / units[finest]))
    return sizes
