"""The modules of a model that a method acts on, where its config and peft's tables name none."""

import copy
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import _find_minimal_target_modules
from torch import nn

from hf_peft_ext.attach.config import RegisteredConfig
from hf_peft_ext.model.find_target_modules import find_target_modules
from hf_peft_ext.model.structure import is_norm
from hf_peft_ext.tuners.ia3.config import TFewConfig
from hf_peft_ext.validation.checks import check

# The errors by which a tuner says that it cannot do something.
REFUSALS = (ValueError, TypeError, NotImplementedError, RuntimeError, AttributeError, KeyError, IndexError)


def with_target_modules(config: PeftConfig, model: nn.Module) -> PeftConfig:
    """A copy of a config, with the modules that the method is for if peft has no default for this model.

    Args:
        config: the config of any method.
        model: the model, which may be on the meta device.

    Raises:
        ValueError: the model has no such modules.
    """
    config = copy.deepcopy(config)
    fields: Any = config
    if isinstance(config, (RegisteredConfig, TFewConfig)) or getattr(config, "target_modules", "") is not None:
        return config
    tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]  # pyright: ignore[reportArgumentType]
    table: dict[str, Any] = getattr(tuner, "target_module_mapping", None) or {}
    if getattr(getattr(model, "config", None), "model_type", None) in table:
        return config
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind == "IA3":
        return TFewConfig(task_type=config.task_type)
    if kind == "LN_TUNING":
        fields.target_modules = norms(model)
    elif kind not in ("ADAPTION_PROMPT", "SHADOW", "TRAINABLE_TOKENS"):  # these know the architectures that they take
        fields.target_modules = find_target_modules(model, ("value",) if kind == "BEFT" else ("query", "value"))
    return config


def norms(model: nn.Module) -> list[str]:
    """The endings of the paths of a model's norms.

    Raises:
        ValueError: it has none.
    """
    paths = [path for path, module in model.named_modules() if is_norm(module)]
    check("model", type(model).__name__, bool(paths), "must have norms; none were found")
    others = {path for path, _ in model.named_modules()} - {"", *paths}
    return sorted(_find_minimal_target_modules(paths, others))
