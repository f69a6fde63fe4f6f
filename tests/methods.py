"""The methods; a row each. Every row runs the whole contract."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from torch import nn

from hf_peft_ext import (
    BitFitConfig,
    BottleneckConfig,
    ComposedConfig,
    LayerPrefixConfig,
    MAMConfig,
    Placement,
    S4Config,
    UniPELTConfig,
)


@dataclass(frozen=True)
class Method:
    """A method, small enough for the tiny models.

    Args:
        config: makes its config.
        starts_as_base: whether the untrained adapter changes nothing.
        mergeable: whether it can be merged into the base model's weights.
    """

    config: Callable[..., PeftConfig]
    starts_as_base: bool = False
    mergeable: bool = False

    def __call__(self, **kwargs: Any) -> PeftConfig:
        return self.config(**kwargs)


def composed(**kwargs: Any) -> PeftConfig:
    return ComposedConfig(
        placements=[
            Placement("low_rank", "query", layers=[0], gate="token", options={"r": 2}),
            Placement("low_rank", "key", options={"r": 2}),
            Placement("bottleneck", "parallel_attention", options={"r": 3, "scaling": "learned"}),
            Placement("prefix", "attention", layers=[1], gate="auto", options={"num_virtual_tokens": 3}),
            Placement("bias", "bias", layers=[1]),
        ],
        **kwargs,
    )


METHODS = {
    "houlsby": Method(lambda **kw: BottleneckConfig(style="houlsby", r=4, **kw)),
    "pfeiffer": Method(lambda **kw: BottleneckConfig(style="pfeiffer", **kw)),
    "parallel": Method(lambda **kw: BottleneckConfig(style="parallel", r=4, **kw), starts_as_base=True),
    "scaled_parallel": Method(lambda **kw: BottleneckConfig(style="scaled_parallel", r=4, **kw), starts_as_base=True),
    "layer_prefix": Method(lambda **kw: LayerPrefixConfig(num_virtual_tokens=4, **kw)),
    "projected_prefix": Method(
        lambda **kw: LayerPrefixConfig(num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=8, **kw)
    ),
    "bitfit": Method(BitFitConfig, starts_as_base=True, mergeable=True),
    "unipelt": Method(lambda **kw: UniPELTConfig(bottleneck_size=4, num_virtual_tokens=4, **kw)),
    "unipelt_aplb": Method(
        lambda **kw: UniPELTConfig(
            methods=("adapter", "prefix", "lora", "bitfit"), bottleneck_size=4, num_virtual_tokens=4, **kw
        )
    ),
    "unipelt_nogate": Method(lambda **kw: UniPELTConfig(gated=False, bottleneck_size=4, num_virtual_tokens=4, **kw)),
    "lora_branch": Method(
        lambda **kw: UniPELTConfig(methods=("lora",), gated=False, r=2, **kw), starts_as_base=True, mergeable=True
    ),
    "mam": Method(lambda **kw: MAMConfig(num_virtual_tokens=4, bottleneck_size=4, **kw)),
    "s4": Method(
        lambda **kw: S4Config(
            grouping="uniform", strategies=[("adapter", "lora"), ("prefix", "bitfit", "lora")], budget=0.1, **kw
        )
    ),
    "composed": Method(composed),
}


def randomise(model: nn.Module, adapter: str = "default", seed: int = 0, std: float = 0.2) -> None:
    """Give an adapter weights that matter, the same at every call."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
