"""Converts the prompt of a checkpoint: virtual tokens behind the embeddings."""

from collections.abc import Iterator
from typing import Any

from hf_peft_ext.loading.adapterhub.checkpoint import Checkpoint
from hf_peft_ext.loading.adapterhub.converted import ConvertedSublayer
from hf_peft_ext.loading.adapterhub.couplings import embeddings_host
from hf_peft_ext.loading.adapterhub.settings import Settings
from hf_peft_ext.model.calls import own_modules
from hf_peft_ext.model.site import Site
from hf_peft_ext.model.sites import user_site
from hf_peft_ext.validation.checks import check

POSITIONS = {"prefix": "first", "prefix_after_bos": "second"}


def soft_prompts(
    method: Settings, checkpoint: Checkpoint, model: Any, sites: list[Site]
) -> Iterator[ConvertedSublayer]:
    """The prompt of a method.

    Raises:
        ValueError: a setting or the model is not supported, or the tensor is missing or has another shape.
    """
    kind = model.config.model_type
    rule = "must be another one for a prompt, which in the library attends to padding in DeBERTa"
    check("model_type", kind, not kind.startswith("deberta"), rule)
    combine = method.get("combine", "prefix")
    check("combine", combine, combine in POSITIONS, f"must be one of {', '.join(POSITIONS)}")
    site = user_site("embeddings", embeddings_host(model), dict(own_modules(model)), None, sites)
    p = checkpoint.take("prompt_tuning.prompt_tunings.prompt_embedding.weight")
    options = {"num_virtual_tokens": method["prompt_length"], "position": POSITIONS[combine]}
    yield ConvertedSublayer("prompt", site, None, options, {"P": p})
