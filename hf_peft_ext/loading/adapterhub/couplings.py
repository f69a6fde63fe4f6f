"""Converts the invertible adapter of a checkpoint: a coupling behind the embeddings."""

from typing import Any

from torch import nn

from hf_peft_ext.loading.adapterhub.checkpoint import Checkpoint
from hf_peft_ext.loading.adapterhub.converted import ConvertedSublayer, activation_of, linear_state
from hf_peft_ext.loading.adapterhub.names import has_two_stacks
from hf_peft_ext.loading.adapterhub.settings import Settings
from hf_peft_ext.model.calls import own_modules
from hf_peft_ext.model.site import Site
from hf_peft_ext.model.sites import user_site
from hf_peft_ext.validation.checks import check

# The module that the library's coupling follows: the first that the text model or its encoder has.
EMBEDDINGS = ("embeddings", "layernorm_embedding", "drop", "embed_tokens", "layer_norm")


def coupling(method: Settings, checkpoint: Checkpoint, model: Any, sites: list[Site]) -> ConvertedSublayer:
    """The invertible adapter of a method. An encoder-decoder of two models saves it several times.

    Raises:
        ValueError: the model has no such embeddings, or a tensor is missing or has another shape.
    """
    names = [match[1] for match in checkpoint.matches(r"((?:.*\.)?invertible_adapters)\.F\.0\.weight")]
    name, *copies = sorted(names, key=len) or ["invertible_adapters"]
    tensors = {}
    for own, network in (("first", "F"), ("second", "G")):
        for layer in (0, 2):
            tensors |= linear_state(checkpoint, f"{name}.{network}.{layer}", f"{own}.{layer}")
            for copy in copies:
                linear_state(checkpoint, f"{copy}.{network}.{layer}", "copy")
    site = user_site("embeddings", embeddings_host(model), dict(own_modules(model)), None, sites)
    options = {"reduction_factor": method["inv_adapter_reduction_factor"], "activation": activation_of(method)}
    return ConvertedSublayer("coupling", site, None, options, tensors)


def embeddings_host(model: nn.Module) -> str:
    """Path of the module whose output the library's coupling changes.

    Raises:
        ValueError: the model has none of the known names.
    """
    backbone: Any = getattr(model, getattr(model, "base_model_prefix", "") or "", model)
    owner = getattr(backbone, "text_model", backbone)
    if has_two_stacks(model) or not any(hasattr(owner, name) for name in EMBEDDINGS):
        owner = getattr(owner, "encoder", owner)
    embeddings = next((getattr(owner, name) for name in EMBEDDINGS if hasattr(owner, name)), None)
    path = next((path for path, module in model.named_modules() if module is embeddings), "")
    check("inv_adapter", "nice", bool(path), f"must be None: {type(model).__name__} has no embeddings of a known name")
    return path
