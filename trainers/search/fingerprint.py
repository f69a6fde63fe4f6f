"""What tells the models and metrics of a search from others, the same in every process, in time that has a bound."""

import functools
import hashlib
import json
from collections.abc import Mapping
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from ...placement import check

SAMPLED = 64  # values of each tensor that count
# Settings of a model's config that say where it comes from and how it runs, not what it is.
NOT_THE_MODEL = ("_name_or_path", "transformers_version", "_attn_implementation", "attn_implementation", "use_cache")


def of_weights(model: Any) -> str:
    """Of the trunk: names, shapes, types, and values from all over each tensor. Heads start anew in every search, so
    their shapes alone count.
    """
    trunk = getattr(model, "base_model", model)
    within = {id(tensor) for tensor in (*trunk.parameters(), *trunk.buffers())}
    found = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if id(tensor) in within and not tensor.is_meta:
            found.update(sampled(tensor))
    return found.hexdigest()[:12]


def sampled(tensor: Tensor) -> bytes:
    """Values at equal distances, the first and the last among them."""
    flat = tensor.detach().reshape(-1)
    where = torch.linspace(0, max(len(flat) - 1, 0), min(SAMPLED, len(flat)), dtype=torch.float64).long()
    return flat[where.to(flat.device)].cpu().contiguous().view(torch.uint8).numpy().tobytes()


def of_config(model: nn.Module) -> dict[str, Any]:
    """The settings of a model, as JSON has them."""
    config: Any = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    kept = {name: value for name, value in settings.items() if name not in NOT_THE_MODEL}
    return json.loads(json.dumps(kept, sort_keys=True, default=str))


def of_metric(metric: Any) -> str | None:
    """A function by its name and what it does; an object by its class and its settings."""
    return (
        None if metric is None else f"{name_of(metric)} {hashlib.sha256(described(metric).encode()).hexdigest()[:8]}"
    )


def name_of(metric: Any) -> str:
    metric = innermost_function(metric)
    return str(getattr(metric, "__qualname__", type(metric).__qualname__))


def innermost_function(metric: Any) -> Any:
    while isinstance(metric, functools.partial):
        metric = metric.func
    return metric


def described(value: Any, depth: int = 0) -> str:
    """A value in words that do not change from process to process: no addresses."""
    if isinstance(value, (str, int, float, bool, bytes, type(None))):
        return repr(value)
    if depth > 6:
        return type(value).__qualname__
    inside = functools.partial(described, depth=depth + 1)
    if isinstance(value, functools.partial):
        return inside([value.func, list(value.args), value.keywords])
    if isinstance(value, CodeType):
        return inside(
            [value.co_code.hex(), list(value.co_names), [c for c in value.co_consts if not is_doc(value, c)]]
        )
    if isinstance(value, Mapping):
        return inside(sorted(f"{inside(key)}: {inside(item)}" for key, item in value.items()))
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(inside, value))}]"
    if isinstance(value, (set, frozenset)):
        return inside(sorted(map(inside, value)))
    if hasattr(value, "__code__"):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return inside([value.__qualname__, value.__code__, list(value.__defaults__ or ()), cells])
    if hasattr(value, "__func__"):  # a method, with the settings of its object
        return inside([value.__func__, value.__self__])
    name = getattr(value, "__qualname__", None)
    if name is not None:
        return f"{getattr(value, '__module__', '')}.{name}"
    settings = {k: v for k, v in getattr(value, "__dict__", {}).items() if isinstance(v, (str, int, float, bool))}
    return inside([type(value).__qualname__, vars(type(value)).get("__call__"), settings])


def is_doc(code: CodeType, constant: Any) -> bool:
    return isinstance(constant, str) and bool(code.co_consts) and constant is code.co_consts[0]


def check_same(study: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse tasks whose weights, settings or metric are not those of the study.

    Raises:
        ValueError: they differ; the message names the task and what differs.
    """
    for task, known in there.items():
        now = here.get(task, {})
        rule = f"of the task {task!r} is not that of the study {study!r}; choose another `study_name`"
        check("compute_metrics", now.get("metric"), now.get("metric") == known["metric"], rule)
        before, after = known["config"], now.get("config", {})
        other = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        check("config", {name: after.get(name) for name in other[:3]}, not other, rule)
        hint = f"{rule}, or load the same weights (those made at random from the same seed)"
        check("weights", now.get("weights"), now.get("weights") == known["weights"], hint)
