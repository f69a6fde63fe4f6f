"""SPoT: a prompt begins at that of another task, and prompts tell how similar tasks are.

Vu et al. 2022 (https://arxiv.org/abs/2110.07904). peft has this for its multitask prompt tuning only
(`prompt_tuning_init_state_dict_path`).
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, PeftType
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import Tensor, nn

from hf_peft_ext.loading.config import read_config
from hf_peft_ext.loading.files import adapter_folder
from hf_peft_ext.loading.weights import check_header, check_values
from hf_peft_ext.validation.checks import check

PROMPT_KEY = "prompt_embeddings"  # peft's name in the file
# PEFT type -> what its vectors are
PROMPT_VECTORS = {
    PeftType.PROMPT_TUNING: "embeddings of tokens",
    PeftType.P_TUNING: "embeddings of tokens",
    PeftType.PREFIX_TUNING: "keys and values",
}


def read_prompt(
    id_or_path: str | Path,
    revision: str | None = None,
    *,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> Tensor:  # shape: (num_virtual_tokens, d)
    """The vectors of a saved prompt: prompt tuning, P-tuning or prefix tuning.

    Args:
        id_or_path: id on the Hub, or folder.
        revision, subfolder, token: as in `load_adapter`.

    Raises:
        ValueError: the file holds no prompt, is not valid safetensors, or a value is not finite.
        huggingface_hub.errors.HfHubHTTPError: the repository or revision does not exist, or is not accessible.
    """
    folder, _ = adapter_folder(id_or_path, revision, subfolder, token)
    return prompt_in(folder)


def prompt_in(folder: Path) -> Tensor:  # shape: (num_virtual_tokens, d)
    """The vectors of the prompt in a folder, see `read_prompt`."""
    path = folder / SAFETENSORS_WEIGHTS_NAME
    check_header(path)
    with safe_open(path, framework="pt") as file:
        check("id_or_path", str(folder), PROMPT_KEY in file.keys(), "must hold a prompt of peft")
        prompt = file.get_tensor(PROMPT_KEY)
    check("id_or_path", str(folder), prompt.ndim == 2, "must hold a prompt of shape (num_virtual_tokens, d)")
    check_values(PROMPT_KEY, prompt)
    return prompt


def init_prompt_from(
    model: PeftModel,
    id_or_path: str | Path,
    adapter_name: str = "default",
    revision: str | None = None,
    *,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> None:
    """Begin a prompt at the saved prompt of another task, for the same base model.

    A prompt that a network computes (P-tuning, `prefix_projection`) begins there too: the last layer of the network is
    changed as little as possible.

    Args:
        model: a model with a prompt of peft.
        id_or_path: the other prompt: id on the Hub, or folder.
        adapter_name: the prompt in the model.
        revision, subfolder, token: as in `load_adapter`.

    Raises:
        ValueError: the model has no such prompt, the other one has another size or kind, or the network cannot compute
            it. The model is unchanged.
        huggingface_hub.errors.HfHubHTTPError: the repository or revision does not exist, or is not accessible.
    """
    encoder, own = prompt_encoder(model, adapter_name), model.peft_config[adapter_name]
    folder, _ = adapter_folder(id_or_path, revision, subfolder, token)
    other: Any = read_config(folder / CONFIG_NAME, model.get_base_model())  # checks that the base models have one size
    kind = PROMPT_VECTORS[PeftType(own.peft_type)]
    rule = f"must be a type whose vectors are {kind}, as those of the adapter {adapter_name!r}"
    check("peft_type", other.peft_type.value, PROMPT_VECTORS.get(other.peft_type) == kind, rule)
    for name in ("num_virtual_tokens", "num_transformer_submodules"):
        sizes: Any = [getattr(config, name) or 1 for config in (other, own)]
        check(name, sizes[0], sizes[0] == sizes[1], f"must be {sizes[1]}, as in the adapter {adapter_name!r}")
    prompt = prompt_in(folder)
    shape = prompt_of(encoder).shape
    check(PROMPT_KEY, tuple(prompt.shape), prompt.shape == shape, f"must have the shape {tuple(shape)}")
    set_prompt(encoder, prompt)


def prompt_encoder(model: PeftModel, adapter_name: str) -> Any:
    """peft's module for a prompt of a model, which can be trained.

    Raises:
        ValueError: the model has no such prompt, or it was loaded for inference.
    """
    config = model.peft_config.get(adapter_name)
    check("adapter_name", adapter_name, config is not None, f"must be one of {sorted(model.peft_config)}")
    assert config is not None
    kind, rule = config.peft_type, f"must be one of {', '.join(peft_type.value for peft_type in PROMPT_VECTORS)}"
    check("peft_type", getattr(kind, "value", None), kind in PROMPT_VECTORS, rule)
    check("inference_mode", config.inference_mode, not config.inference_mode, "must be False to train the prompt")
    return model.prompt_encoder[adapter_name]


def network_of(encoder: Any) -> Any | None:
    """The network that computes a prompt, a sequence of layers; None for a plain prompt."""
    return getattr(encoder, "mlp_head", None) or getattr(encoder, "transform", None)


@torch.no_grad()
def prompt_of(encoder: Any) -> Tensor:  # shape: (num_virtual_tokens, d)
    """The vectors of a prompt in a model."""
    tokens = torch.arange(encoder.embedding.num_embeddings, device=encoder.embedding.weight.device)
    return encoder(tokens.unsqueeze(0))[0]


@torch.no_grad()
def set_prompt(encoder: Any, prompt: Tensor) -> None:
    """Set the vectors of a prompt in a model.

    Args:
        encoder: peft's module.
        prompt: shape (num_virtual_tokens, d).

    Raises:
        ValueError: the network of the prompt cannot compute these vectors.
    """
    network = network_of(encoder)
    if network is None:
        encoder.embedding.weight.copy_(prompt)
        return
    last: nn.Linear = network[-1]
    read: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda _, args: read.append(args[0][0]))
    training = encoder.training
    try:
        current = prompt_of(encoder.eval())  # without dropout between the layers of an LSTM
    finally:
        handle.remove()
        encoder.train(training)
    h = F.pad(read[0], (0, 1), value=1.0).double()  # (tokens, hidden + 1), with ones for the bias
    wanted = prompt.to(h)
    change = torch.linalg.pinv(h) @ (wanted - current.double())  # (hidden + 1, d), of the smallest norm
    error = (h @ change + current.double() - wanted).abs().max().item()
    rule = f"must be larger, so that the network can compute the prompt: it misses it by {error:.2g}"
    check("encoder_hidden_size", h.shape[1] - 1, error <= 1e-5 * wanted.abs().max().item(), rule)
    last.weight += change[:-1].T.to(last.weight)
    last.bias += change[-1].to(last.bias)


def prompt_similarity(
    first: Tensor,  # shape: (tokens, d)
    second: Tensor,  # shape: (tokens, d)
    per_token: bool = False,
) -> float:
    """The cosine similarity of two prompts, as SPoT's measure of how similar their tasks are.

    Args:
        first, second: prompts of one base model, from `read_prompt`; they may differ in length.
        per_token: take the mean over all pairs of their tokens, instead of the cosine of the mean tokens.

    Raises:
        ValueError: the widths differ.
    """
    rule = f"must have the width {first.shape[-1]}, as the first prompt"
    check("second", tuple(second.shape), first.shape[-1] == second.shape[-1], rule)
    a, b = first.float(), second.float()
    if not per_token:
        return F.cosine_similarity(a.mean(0), b.mean(0), dim=0).item()
    return (F.normalize(a, dim=1) @ F.normalize(b, dim=1).T).mean().item()
