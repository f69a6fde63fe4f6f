"""Parameter groups of an optimizer: a learning rate of its own for each kind of sub-layer."""

from collections.abc import Iterable, Mapping
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from hf_peft_ext.sublayers import Bias, Bottleneck, Fusion, Gate, LowRank, PHMRule, Prefix
from hf_peft_ext.validation.checks import check, check_positive

# Kind of parameters -> the modules that own them. A gate is inside its sub-layer, and comes after it.
OWNERS: dict[str, type[nn.Module] | tuple[type[nn.Module], ...]] = {
    "bottleneck": (Bottleneck, PHMRule),
    "prefix": Prefix,
    "low_rank": LowRank,
    "bias": Bias,
    "gate": (Gate, Fusion),
    "head": AuxiliaryTrainingWrapper,
}


def sublayer_parameter_groups(model: nn.Module, lr: float, **rates: float) -> list[dict[str, Any]]:
    """The trainable parameters of a model as parameter groups for a `torch.optim` optimizer.

    Args:
        model: a model with an adapter, a `PeftModel` or not.
        lr: the learning rate of the parameters without one of their own.
        rates: "bottleneck", "prefix", "low_rank", "bias", "gate" or "head" (`modules_to_save`) -> learning rate.

    Returns:
        Groups with `params` and `lr`.

    Raises:
        ValueError: a rate is not positive, its name is unknown, or the model has no such trainable parameters.

    Example:
        >>> AdamW(sublayer_parameter_groups(model, 2e-3, prefix=1e-2, gate=1e-2))  # doctest: +SKIP
    """
    check_positive("lr", lr)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return split_groups(model, [{"params": parameters, "lr": lr}], rates)


def split_groups(
    model: nn.Module, groups: Iterable[Mapping[str, Any]], rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Split parameter groups, so that some kinds of parameters have their own learning rate.

    Args:
        model: the model that owns the parameters.
        groups: the groups, whose other settings (weight decay) are kept.
        rates: as in `sublayer_parameter_groups`.

    Raises:
        ValueError: as in `sublayer_parameter_groups`.
    """
    check_rates(model, rates)
    kinds = parameter_kinds(model)
    split: list[dict[str, Any]] = []
    for group in groups:
        by_kind: dict[str, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            kind = kinds.get(parameter, "")
            by_kind.setdefault(kind if kind in rates else "", []).append(parameter)
        for kind, parameters in by_kind.items():
            split.append({**group, "params": parameters} | ({"lr": rates[kind]} if kind else {}))
    return split


def check_rates(model: nn.Module, rates: Mapping[str, float]) -> None:
    """Refuse learning rates that are not positive, or of kinds of parameters that the model does not train."""
    check("learning rates", [*rates], rates.keys() <= OWNERS.keys(), f"must be of {', '.join(OWNERS)} only")
    trained = {kind for parameter, kind in parameter_kinds(model).items() if parameter.requires_grad}
    for kind, rate in rates.items():
        check_positive(kind, rate)
        rule = f"is the rate of parameters that this model does not train; it trains {', '.join(sorted(trained))}"
        check(kind, rate, kind in trained, rule)


def parameter_kinds(model: nn.Module) -> dict[nn.Parameter, str]:
    """Parameter -> its kind (see `OWNERS`); other parameters are left out."""
    kinds: dict[nn.Parameter, str] = {}
    for kind, owner in OWNERS.items():
        for module in model.modules():
            if isinstance(module, owner):
                kinds |= dict.fromkeys(module.parameters(), kind)
    return kinds
