"""FLOPs of training and inference: by the papers' rules, and counted from a config."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PretrainedConfig

from hf_peft_ext.budget.experts import GROUPED_MM, grouped_flops
from hf_peft_ext.budget.fake_model import (
    call_on_zeros,
    errors_of_fake_runs,
    fake_tensors,
    model_on_meta,
    parameter_counts,
)
from hf_peft_ext.validation.checks import check, check_count, check_positive


def rule_flops(parameters: float, tokens: float, encoder_decoder: bool = False, training: bool = False) -> float:
    """FLOPs by the rules of Kaplan et al. 2020 (https://arxiv.org/abs/2001.08361) and T-Few.

    A decoder with N parameters needs 2 N a token forward and 6 N in training. In an encoder-decoder a token passes
    half of the parameters: N and 3 N (Liu et al. 2022, https://arxiv.org/abs/2205.05638, section 4.2). Attention
    scores are not included, and training includes the gradients of all weights, also with an adapter.

    Args:
        parameters: N.
        tokens: number of tokens.
        encoder_decoder: whether the model has an encoder and a decoder.
        training: forward and backward, instead of forward alone.
    """
    check_positive("parameters", parameters)
    check_positive("tokens", tokens)
    return (1 if encoder_decoder else 2) * (3 if training else 1) * parameters * tokens


@dataclass(frozen=True)
class FlopCount:
    """Counted FLOPs of one batch.

    Args:
        forward: FLOPs of the forward pass.
        backward: FLOPs of the backward pass: gradients of the activations that are needed, and of trained weights.
        parameters: number of parameters of the base model.
        trained: number of trained parameters.
    """

    forward: int
    backward: int
    parameters: int
    trained: int

    @property
    def training(self) -> int:
        """FLOPs of a training step."""
        return self.forward + self.backward


def count_flops(
    config: PretrainedConfig,
    tokens: int,
    peft_config: PeftConfig | None = None,
    *,
    target_tokens: int = 1,
    batch: int = 1,
    cached_tokens: int = 0,
    training: bool = True,
    task: str | None = None,
) -> FlopCount:
    """Count FLOPs by running the real model and adapter on fake tensors under torch's `FlopCounterMode`.

    Every matrix product counts 2 a multiplication and addition; element-wise operations count 0. Attention scores are
    counted whole, although a causal kernel may skip half of them. With an adapter, frozen weights get no gradients,
    and nothing is passed back below the first adapter. In a mixture of experts each token counts for as many experts
    as the config says, wherever it is routed.

    Args:
        config: the model's config.
        tokens: length of the input.
        peft_config: the adapter's config; None to train all weights.
        target_tokens: length of the decoder's input, for an encoder-decoder.
        batch: number of rows.
        cached_tokens: tokens before the input whose keys and values are cached; decoders only.
        training: whether to run the backward pass.
        task: the task of the model's head; by default the adapter's, or one that fits the config.

    Raises:
        ValueError: a number is invalid, or the model cannot be built or run on fake tensors.
    """
    for name, value in {"tokens": tokens, "target_tokens": target_tokens, "batch": batch}.items():
        check_count(name, value)
    check("cached_tokens", cached_tokens, type(cached_tokens) is int and cached_tokens >= 0, "must not be negative")
    rule = "must be 0 for an encoder-decoder, whose encoder cannot reuse a cache"
    check("cached_tokens", cached_tokens, not (cached_tokens and config.is_encoder_decoder), rule)
    model = model_on_meta(config, peft_config, task).train(training)
    counts = parameter_counts(model)
    with fake_tensors(model), errors_of_fake_runs("config", repr(config.model_type)):
        kwargs: dict[str, Any] = {}
        if cached_tokens:
            with torch.no_grad():
                kwargs["past_key_values"] = call_on_zeros(
                    model, cached_tokens, 1, batch, use_cache=True
                ).past_key_values
        with (
            FlopCounterMode(display=False, custom_mapping={GROUPED_MM: grouped_flops}) as counter,
            torch.set_grad_enabled(training),
        ):
            output = call_on_zeros(model, tokens, target_tokens, batch, **kwargs)
            forward = counter.get_total_flops()
            if training:
                first = output.logits if hasattr(output, "logits") else output[0]
                first.sum().backward()
        return FlopCount(forward, counter.get_total_flops() - forward, *counts)


def kv_cache_bytes(
    config: PretrainedConfig, tokens: int, dtype: torch.dtype = torch.bfloat16, target_tokens: int = 1
) -> int:
    """Bytes of the cache after `tokens` tokens of one row, measured on the model's own cache with fake tensors.

    For plain multi-head attention it is 2 * layers * width * tokens * bytes of a number. Shared key and value heads,
    sliding windows and states of constant size are as the model has them.

    Args:
        config: the model's config.
        tokens: length of the input.
        dtype: type of the cached numbers.
        target_tokens: length of the decoder's input, for an encoder-decoder.

    Raises:
        ValueError: a number is invalid, the model cannot be built or run on fake tensors, or it has no cache.
    """
    check_count("tokens", tokens)
    model = model_on_meta(config, dtype=dtype).eval()
    with fake_tensors(model), errors_of_fake_runs("config", repr(config.model_type)), torch.no_grad():
        cache = getattr(call_on_zeros(model, tokens, target_tokens, use_cache=True), "past_key_values", None)
    check("config", config.model_type, cache is not None, "must be that of a model with a cache")
    return sum({id(t): t.numel() * t.element_size() for t in cached_tensors(cache)}.values())


def cached_tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of a cache, at every depth."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for child in value:
            yield from cached_tensors(child)
    elif isinstance(value, dict):
        yield from cached_tensors(list(value.values()))
    elif type(value).__module__ == "transformers.cache_utils":
        yield from cached_tensors(vars(value))
