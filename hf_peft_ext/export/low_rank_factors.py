"""The LoRA that equals an adapter: A and B of each leaf, where the adapter only changes weights of linear leaves."""

from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.ia3.layer import IA3Layer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_peft_ext.attach.layer import TunerLayer
from hf_peft_ext.attach.lora_conversion import is_weight_update
from hf_peft_ext.model.quantization import plain_weight
from hf_peft_ext.model.structure import innermost
from hf_peft_ext.sublayers import LowRank, PHMRule


class Factors(NamedTuple):
    """The update B A of a weight.

    Args:
        A: shape (r, d_in).
        B: shape (d_out, r).
    """

    A: Tensor
    B: Tensor


class NotLowRankError(ValueError):
    """Parts of an adapter are no update of a linear leaf's weight."""


@torch.no_grad()
def low_rank_factors(model: nn.Module, adapter_name: str) -> dict[str, Factors]:
    """Path of a leaf in the base model -> the update that the adapter makes to its weight.

    - A low-rank branch without a gate, or with a fixed one (`fix_gates`), is B = g (alpha / r) B, A = A. Several at
      one leaf, as on a fused projection, are put side by side.
    - (IA)^3 scales rows or columns of a weight. The rank is the number of vector entries that are not one, so in
      general as large as the leaf is wide. Where it scales an output with a bias, no LoRA equals it.

    Raises:
        NotLowRankError: some part of the adapter is no such update; the message names it.
    """
    base = base_of(model)
    path_of = {id(module): path for path, module in base.named_modules()}
    parts: dict[str, list[Factors]] = {}
    refused: list[str] = []
    for layer in adapter_layers(base):
        path = path_of[id(layer.host if isinstance(layer, TunerLayer) else layer)].replace(".base_layer", "")
        for part in sublayers_of(layer, adapter_name):
            factors = factors_of(layer, part)
            if factors is None:
                refused.append(f"{path} ({type(part if isinstance(layer, TunerLayer) else layer).__name__})")
            else:
                parts.setdefault(path, []).append(factors)
    if refused:
        more = f" and {len(refused) - 4} more" if len(refused) > 4 else ""
        raise NotLowRankError(
            f"`adapter_name` (={adapter_name!r}) has sub-layers that are not low-rank updates of weights: "
            f"{', '.join(refused[:4])}{more}"
        )
    return {path: Factors(torch.cat([f.A for f in of]), torch.cat([f.B for f in of], 1)) for path, of in parts.items()}


def base_of(model: nn.Module) -> nn.Module:
    """The base model of a `PeftModel`; other models, with adapters of transformers' `add_adapter`, as they are."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def adapter_layers(base: nn.Module) -> list[Any]:
    """The tuner layers in a base model, without those of modules and embedding rows that are saved whole."""
    whole = {id(m) for w in base.modules() if isinstance(w, AuxiliaryTrainingWrapper) for m in w.modules()}
    return [module for module in base.modules() if isinstance(module, BaseTunerLayer) and id(module) not in whole]


def sublayers_of(layer: BaseTunerLayer, adapter_name: str) -> list[Any]:
    """The modules or vectors of an adapter in a tuner layer, without the rules that bottlenecks of Compacter share."""
    named = (getattr(layer, name) for name in layer.adapter_layer_names)
    parts = [of[adapter_name] for of in named if adapter_name in of]
    return [part for part in parts if not isinstance(part, PHMRule)]


def factors_of(layer: BaseTunerLayer, part: Any) -> Factors | None:
    """The update that a part of an adapter makes to the weight of its leaf; None if it is no such update."""
    if isinstance(layer, TunerLayer):
        if not is_weight_update(layer.host, part):
            return None
        sublayer: LowRank = part
        gate = 1.0 if sublayer.gate is None else torch.sigmoid(sublayer.gate.bias)
        return Factors(sublayer.A.detach().float(), (gate * sublayer.scaling * sublayer.up()).detach().float())
    leaf: Any = innermost(layer)  # pyright: ignore[reportArgumentType]
    if isinstance(layer, IA3Layer) and isinstance(leaf, nn.Linear | Conv1D):
        return ia3_factors(leaf, part.detach().flatten().float() - 1, layer.is_feedforward)
    return None


def ia3_factors(
    leaf: Any,
    change: Tensor,  # shape: (d_in,) if it scales inputs, else (d_out,): l - 1
    scales_inputs: bool,
) -> Factors | None:
    """diag(l - 1) W or W diag(l - 1) as B A, by the rows or columns that change; None if a bias changes too."""
    rows = change.nonzero().flatten()
    if not scales_inputs and leaf.bias is not None and leaf.bias[rows].any():
        return None
    weight = plain_weight(leaf).float()
    weight = weight.T if isinstance(leaf, Conv1D) else weight  # (d_out, d_in)
    units = torch.eye(len(change), device=weight.device)
    if scales_inputs:
        if len(rows) > len(weight):
            return Factors(weight * change, torch.eye(len(weight), device=weight.device))
        return Factors(units[rows] * change[rows, None], weight[:, rows])
    if len(rows) > weight.shape[1]:
        return Factors(torch.eye(weight.shape[1], device=weight.device), change[:, None] * weight)
    return Factors(weight[rows], units[:, rows] * change[rows])
