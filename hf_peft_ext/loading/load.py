"""Loads an adapter of a stranger: everything is checked before anything is allocated or changed."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn

from hf_peft_ext.attach.adapter_tuner import check_adapter_name
from hf_peft_ext.loading.config import read_config
from hf_peft_ext.loading.expected_tensors import implied_tensors
from hf_peft_ext.loading.files import adapter_folder
from hf_peft_ext.loading.trial import NotOnTrial, load_on_trial, may_be_tried
from hf_peft_ext.loading.weights import check_header, check_weights
from hf_peft_ext.registry import extend_peft
from hf_peft_ext.validation.checks import check


def load_adapter(
    model: nn.Module,
    id_or_path: str | Path,
    adapter_name: str = "default",
    revision: str | None = None,
    *,
    is_trainable: bool = False,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> PeftModel:
    """Load an adapter as `PeftModel.from_pretrained` does, but only if its files hold what they should and no more.

    Checked are the config (known keys, their types, sizes), then the safetensors file against what the config implies
    on this model (exactly its keys, shapes and types; finite weights). Weights of the base model never change. No
    pickle is read, no code run, and regular expressions have a time limit. Whatever is refused leaves the model as it
    was. What an adapter makes a model say cannot be checked.

    Args:
        model: the base model, or a `PeftModel` that gets a further adapter.
        id_or_path: the adapter's id on the Hub, or its folder.
        adapter_name: its name in the model: at most 200 characters, without dots, slashes and control characters.
        revision: branch, tag or commit on the Hub. The commit that was loaded stands in the `adapter_revision` of
            `model.peft_config[adapter_name]` (None for a folder).
        is_trainable: whether to train it further.
        subfolder: where in the repository or folder it lies.
        token: for private repositories; as in `huggingface_hub`.

    Returns:
        The model with the adapter; `model` itself if that is a `PeftModel`.

    Raises:
        ValueError: something was refused; the message says what.
        TypeError: `model` is no module, or `id_or_path` or `adapter_name` no text.
        huggingface_hub.errors.HfHubHTTPError: the Hub has no such repository or revision, or shows it to others only.
    """
    extend_peft()
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch module, not {type(model).__name__}.")
    if not isinstance(adapter_name, str) or not isinstance(id_or_path, (str, Path)):
        name, value = ("id_or_path", id_or_path) if isinstance(adapter_name, str) else ("adapter_name", adapter_name)
        raise TypeError(f"`{name}` must be text, not {type(value).__name__}.")
    check_adapter_name(adapter_name)
    names = model.peft_config if isinstance(model, PeftModel) else {}
    check("adapter_name", adapter_name, adapter_name not in names, "is taken by an adapter of this model")
    folder, commit = adapter_folder(id_or_path, revision, subfolder, token)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    config: Any = read_config(folder / CONFIG_NAME, base)
    rule = "must be False: peft cannot train prompts further that it has loaded"
    check("is_trainable", is_trainable, not (is_trainable and config.is_prompt_learning), rule)
    config.inference_mode = not is_trainable
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    check_header(weights)  # cheap, so it comes before the work of finding out what is implied
    config.adapter_revision = commit
    if may_be_tried(model, config, adapter_name, weights):
        with suppress(NotOnTrial):
            return load_on_trial(model, config, adapter_name, weights, is_trainable)
    check_weights(weights, implied_tensors(model, config, adapter_name))
    if not isinstance(model, PeftModel):
        return PeftModel.from_pretrained(model, folder, adapter_name, is_trainable=is_trainable, config=config)
    model.add_adapter(adapter_name, config)
    if is_trainable:
        model.set_requires_grad(adapter_name)
    model.load_adapter(folder, adapter_name, is_trainable=is_trainable)
    return model
