"""Loads an untrusted adapter: every file is checked before memory is allocated or the model changed."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn

from hf_peft_ext.attach.adapter_tuner import check_adapter_name
from hf_peft_ext.loading.config import read_config
from hf_peft_ext.loading.expected_tensors import expected_tensors
from hf_peft_ext.loading.files import adapter_folder
from hf_peft_ext.loading.in_place import NeedsCopyError, load_in_place
from hf_peft_ext.loading.weights import check_header, check_weights
from hf_peft_ext.model.sentence_transformer import transformer_module
from hf_peft_ext.registry import extend_peft
from hf_peft_ext.tuners.sparse.config import SparseConfig
from hf_peft_ext.tuners.sparse.targets import find_targets
from hf_peft_ext.tuners.sparse.tuner import check_saved_indices
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
    """Load an untrusted adapter like `PeftModel.from_pretrained`, after checking its config and its weights.

    No pickle is read, no code is run, and no weight of the base model changes. A refused adapter leaves the model
    unchanged. The outputs of an accepted adapter are not checked.

    Args:
        model: the base model, or a `PeftModel` that receives a further adapter. In a SentenceTransformer, the
            transformers model inside is replaced by the result.
        id_or_path: id on the Hub, or folder.
        adapter_name: name in the model: 1 to 200 characters, without dots, slashes and control characters.
        revision: branch, tag or commit on the Hub; `model.peft_config[adapter_name].adapter_revision` has the commit.
        is_trainable: whether the adapter can be trained further.
        subfolder: folder of the adapter inside the repository or folder.
        token: for private repositories, as in `huggingface_hub`.

    Returns:
        The model with the adapter; `model` itself if it is a `PeftModel`.

    Raises:
        ValueError: a check failed; the message names it.
        TypeError: an argument has a wrong type.
        huggingface_hub.errors.HfHubHTTPError: the repository or revision does not exist, or is not accessible.
    """
    if (inside := transformer_module(model)) is not None:
        options: dict[str, Any] = {"is_trainable": is_trainable, "subfolder": subfolder, "token": token}
        inside.model = load_adapter(inside.model, id_or_path, adapter_name, revision, **options)
        return inside.model
    check_arguments(model, id_or_path, adapter_name)
    folder, commit = adapter_folder(id_or_path, revision, subfolder, token)
    config = checked_config(folder, commit, model, is_trainable)
    with suppress(NeedsCopyError):
        return load_in_place(model, config, adapter_name, folder, is_trainable)
    return load_via_copy(model, config, adapter_name, folder, is_trainable)


def check_arguments(model: object, id_or_path: object, adapter_name: object) -> None:
    """Refuse arguments of a wrong type, and adapter names that are malformed or taken.

    Raises:
        TypeError: `model` is not a module, or `id_or_path` or `adapter_name` is not text.
        ValueError: `adapter_name` is malformed, or the model has an adapter of this name.
    """
    extend_peft()
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch module, not {type(model).__name__}.")
    if not isinstance(adapter_name, str):
        raise TypeError(f"`adapter_name` must be text, not {type(adapter_name).__name__}.")
    if not isinstance(id_or_path, (str, Path)):
        raise TypeError(f"`id_or_path` must be text, not {type(id_or_path).__name__}.")
    check_adapter_name(adapter_name)
    taken = isinstance(model, PeftModel) and adapter_name in model.peft_config
    check("adapter_name", adapter_name, not taken, "is taken by an adapter of this model")


def checked_config(folder: Path, commit: str | None, model: nn.Module, is_trainable: bool) -> PeftConfig:
    """The adapter's config. The header of its weights is checked as well, because that is fast.

    Raises:
        ValueError: the config or the header is refused, or the adapter cannot be trained further.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    config: Any = read_config(folder / CONFIG_NAME, base)
    rule = "must be False: peft cannot train loaded prompts further"
    check("is_trainable", is_trainable, not (is_trainable and config.is_prompt_learning), rule)
    check_header(folder / SAFETENSORS_WEIGHTS_NAME)
    config.inference_mode, config.adapter_revision = not is_trainable, commit
    return config


def load_via_copy(
    model: nn.Module, config: PeftConfig, adapter_name: str, folder: Path, is_trainable: bool
) -> PeftModel:
    """Check the weights against an adapter on a copy of the model without data, then load as peft does.

    Raises:
        ValueError: the config does not fit the model, the weights do not fit the config, or an index is of no entry.
    """
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    check_weights(weights, expected_tensors(model, config, adapter_name))
    if isinstance(config, SparseConfig):
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        check_saved_indices(weights, find_targets(base, config)[-1].stop)
    if not isinstance(model, PeftModel):
        return PeftModel.from_pretrained(model, folder, adapter_name, is_trainable=is_trainable, config=config)
    model.add_adapter(adapter_name, config)
    if is_trainable:
        model.set_requires_grad(adapter_name)
    model.load_adapter(folder, adapter_name, is_trainable=is_trainable)
    return model
