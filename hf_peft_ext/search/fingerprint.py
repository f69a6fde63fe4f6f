"""Fingerprints of the models and metrics of a search: equal in every process, and fast for models of any size."""

import functools
import hashlib
import json
from collections.abc import Mapping
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from hf_peft_ext.validation.checks import check

VALUES_PER_TENSOR = 64  # values of each tensor in the hash
# Settings of a model's config on its source and execution, which do not change its function.
NOT_THE_MODEL = ("_name_or_path", "transformers_version", "_attn_implementation", "attn_implementation", "use_cache")


def weights_fingerprint(model: Any) -> str:
    """A hash of names, shapes and types of all tensors, and of values of the trunk's tensors.

    The values of heads are left out: each search starts them anew.
    """
    trunk = getattr(model, "base_model", model)
    in_trunk = {id(tensor) for tensor in (*trunk.parameters(), *trunk.buffers())}
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if id(tensor) in in_trunk and not tensor.is_meta:
            digest.update(sampled(tensor))
    return digest.hexdigest()[:12]


def sampled(tensor: Tensor) -> bytes:
    """Evenly spaced values of a tensor, the first and the last included, as bytes."""
    flat = tensor.detach().reshape(-1)
    indices = torch.linspace(0, max(len(flat) - 1, 0), min(VALUES_PER_TENSOR, len(flat)), dtype=torch.float64).long()
    return flat[indices.to(flat.device)].cpu().contiguous().view(torch.uint8).numpy().tobytes()


def config_settings(model: nn.Module) -> dict[str, Any]:
    """The settings of a model's config, as values for JSON."""
    config: Any = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    kept = {name: value for name, value in settings.items() if name not in NOT_THE_MODEL}
    return json.loads(json.dumps(kept, sort_keys=True, default=str))


def metric_fingerprint(metric: Any) -> str | None:
    """Name and hash of a metric: of a function's code and values, or of an object's class and settings."""
    if metric is None:
        return None
    return f"{metric_name(metric)} {hashlib.sha256(described(metric).encode()).hexdigest()[:8]}"


def metric_name(metric: Any) -> str:
    """The name of a function, or of an object's class."""
    metric = innermost_function(metric)
    return str(getattr(metric, "__qualname__", type(metric).__qualname__))


def innermost_function(metric: Any) -> Any:
    """The function inside `functools.partial`."""
    while isinstance(metric, functools.partial):
        metric = metric.func
    return metric


def described(value: Any, depth: int = 0) -> str:
    """A value as text without memory addresses, equal in every process."""
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
    """Whether a constant of a function is its docstring."""
    return isinstance(constant, str) and bool(code.co_consts) and constant is code.co_consts[0]


def check_same(study: str, recorded: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse tasks whose weights, settings or metric are not those of the study.

    Args:
        study: its name, for the error.
        recorded: task -> `SearchTask.fingerprint` in the study.
        current: the same of the tasks of this process.

    Raises:
        ValueError: they differ; the message names the task and the difference.
    """
    for task, before in recorded.items():
        now = current.get(task, {})
        rule = f"of the task {task!r} is not that of the study {study!r}; choose another `study_name`"
        check("compute_metrics", now.get("metric"), now.get("metric") == before["metric"], rule)
        old, new = before["config"], now.get("config", {})
        changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        check("config", {name: new.get(name) for name in changed[:3]}, not changed, rule)
        hint = f"{rule}, or load the same weights (random ones need the same seed)"
        check("weights", now.get("weights"), now.get("weights") == before["weights"], hint)
