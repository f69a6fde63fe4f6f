"""Intrinsic prompt tuning: prompts of several tasks span a subspace, and a new task trains its d coordinates.

Qin et al. 2021 (https://arxiv.org/abs/2110.07867). Where we differ: the subspace is that of the principal components,
the best linear autoencoder in closed form. The paper trains a non-linear one, also on the losses of all tasks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_peft_ext.soft_prompts.transfer import network_of, prompt_encoder, prompt_of, read_prompt
from hf_peft_ext.validation.checks import check, check_count


@dataclass(frozen=True)
class PromptSubspace:
    """The prompts mean + sum_k z_k directions_k.

    Args:
        mean: the mean prompt, shape (num_virtual_tokens, d).
        directions: orthogonal directions, shape (dim, num_virtual_tokens, d). Their norms are the standard deviations
            of the prompts along them, so that a coordinate of 1 is a usual one.
        explained: the share of the prompts' variance that lies in the subspace.
    """

    mean: Tensor
    directions: Tensor
    explained: float = 1.0

    @classmethod
    def fit(cls, prompts: Sequence[Tensor | str | Path], dim: int) -> "PromptSubspace":
        """The subspace of the principal components of prompts.

        Args:
            prompts: prompts of several tasks for one base model: tensors, folders, or ids on the Hub.
            dim: its dimension, below the number of prompts.

        Raises:
            ValueError: the shapes differ, or the prompts span fewer dimensions.
        """
        check_count("dim", dim)
        tensors = [prompt if isinstance(prompt, Tensor) else read_prompt(prompt) for prompt in prompts]
        shapes = {tuple(tensor.shape) for tensor in tensors}
        check("prompts", sorted(shapes), len(shapes) == 1, "must have one shape")
        stacked = torch.stack([tensor.double() for tensor in tensors])  # (tasks, num_virtual_tokens, d)
        mean = stacked.mean(0)
        _, s, v = torch.linalg.svd((stacked - mean).flatten(1), full_matrices=False)
        rank = int((s > 1e-6 * s.max()).sum()) if s.max() > 0 else 0
        check("dim", dim, dim <= rank, f"must be at most {rank}, the dimension that {len(tensors)} prompts span")
        scale = s[:dim] / (len(tensors) - 1) ** 0.5
        directions = (scale[:, None] * v[:dim]).unflatten(1, mean.shape)
        explained = (s[:dim].square().sum() / s.square().sum()).item()
        return cls(mean.float(), directions.float(), explained)

    def encode(self, prompt: Tensor) -> Tensor:  # shape: (dim,)
        """The coordinates z of the nearest prompt in the subspace."""
        flat = self.directions.flatten(1)
        return (flat @ (prompt - self.mean).flatten()) / flat.square().sum(1)

    def decode(self, z: Tensor) -> Tensor:  # shape: (num_virtual_tokens, d)
        """The prompt with the coordinates z, shape (dim,)."""
        return self.mean + torch.einsum("k,ktd->td", z, self.directions)

    def save(self, path: str | Path) -> None:
        """Write the subspace to a safetensors file."""
        state = {"mean": self.mean, "directions": self.directions, "explained": torch.tensor(self.explained)}
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)

    @classmethod
    def load(cls, path: str | Path) -> "PromptSubspace":
        """Read a subspace that `save` wrote."""
        state = load_file(path)
        return cls(state["mean"], state["directions"], state["explained"].item())


class InSubspace(nn.Module):
    """A parametrization (`torch.nn.utils.parametrize`): coordinates in a subspace -> prompt.

    Args:
        subspace: the subspace.
    """

    mean: Tensor
    directions: Tensor

    def __init__(self, subspace: PromptSubspace):
        super().__init__()
        self.register_buffer("mean", subspace.mean, persistent=False)
        self.register_buffer("directions", subspace.directions, persistent=False)

    def forward(self, z: Tensor) -> Tensor:  # shape: (num_virtual_tokens, d)
        """The prompt."""
        return PromptSubspace(self.mean, self.directions).decode(z)

    def right_inverse(self, prompt: Tensor) -> Tensor:  # shape: (dim,)
        """The coordinates of the nearest prompt in the subspace."""
        return PromptSubspace(self.mean, self.directions).encode(prompt)


def train_in_subspace(model: PeftModel, subspace: PromptSubspace, adapter_name: str = "default") -> nn.Parameter:
    """Let a prompt move in a subspace only: its coordinates are trained instead of its vectors.

    It begins at the prompt in the subspace that is nearest to the present one (see `init_prompt_from`). It is saved as
    a plain prompt, which stock peft loads.

    Args:
        model: a model with a plain prompt of peft (prompt tuning, prefix tuning).
        subspace: the subspace.
        adapter_name: the prompt in the model.

    Returns:
        The coordinates, shape (dim,).

    Raises:
        ValueError: the model has no such prompt, the shapes differ, or the prompt is trained in a subspace already or
            computed by a network.
    """
    encoder = prompt_encoder(model, adapter_name)
    embedding: nn.Embedding = encoder.embedding
    plain = network_of(encoder) is None and not parametrize.is_parametrized(embedding)
    check("adapter_name", adapter_name, plain, "must be a plain prompt: neither a network nor a subspace computes it")
    shape = tuple(prompt_of(encoder).shape)
    check("subspace", tuple(subspace.mean.shape), tuple(subspace.mean.shape) == shape, f"must have the shape {shape}")
    moved = InSubspace(subspace).to(embedding.weight)
    parametrize.register_parametrization(embedding, "weight", moved, unsafe=True)  # unsafe: another shape
    return cast(nn.Parameter, embedding.parametrizations["weight"].original)  # pyright: ignore
