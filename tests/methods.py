"""The methods; a row each. Every row runs the whole contract, other settings of a method in part as slow tests."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from torch import nn

from hf_peft_ext import (
    AdaMixConfig,
    BitFitConfig,
    BottleneckConfig,
    CompacterConfig,
    ComposedConfig,
    IntrinsicConfig,
    LadderConfig,
    LayerPrefixConfig,
    MAMConfig,
    Placement,
    S4Config,
    SparseConfig,
    TFewConfig,
    UniPELTConfig,
)

from .backbones import BACKBONES


@dataclass(frozen=True)
class Method:
    """A method, small enough for the tiny models.

    Args:
        config: makes its config.
        starts_as_base: whether the untrained adapter is the base model.
        mergeable: whether it can be merged into the base model's weights.
        mixes: whether the rows of one batch may have different adapters.
        part: what the names of its tensors have before the adapter's name.
        layers: the field that names the layers to adapt.
        refused: families that it cannot be put on -> what the error says of them.
    """

    config: Callable[..., PeftConfig]
    starts_as_base: bool = True
    mergeable: bool = False
    mixes: bool = True
    part: str = "sublayer_of"
    layers: str = "layers_to_transform"
    refused: dict[str, str] = field(default_factory=dict)

    def __call__(self, **kwargs: Any) -> PeftConfig:
        return self.config(**kwargs)

    def owns(self, name: str, adapter: str = "default") -> bool:
        """Whether a parameter is one of the adapter's."""
        return f".{self.part}.{adapter}." in f"{name}."

    def second(self, backbone: str) -> PeftConfig:
        """Another config, of some of the layers; a ladder needs one in each stack."""
        chosen = [1, 3] if self.part == "side_of" and BACKBONES[backbone].kind == "seq2seq" else [0, 1]
        return self(**{self.layers: [1] if self.part == "side_of" and chosen == [0, 1] else chosen})


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
    "parallel": Method(lambda **kw: BottleneckConfig(style="parallel", r=4, **kw)),
    "scaled_parallel": Method(lambda **kw: BottleneckConfig(style="scaled_parallel", r=4, **kw)),
    "compacter": Method(lambda **kw: CompacterConfig(r=8, **kw)),
    "compacter_unshared": Method(
        lambda **kw: CompacterConfig(style="compacter++", r=8, phm_dim=2, shared_phm_rule=False, **kw)
    ),
    "adamix": Method(lambda **kw: AdaMixConfig(r=4, num_experts=3, shared_projection="none", **kw)),
    "layer_prefix": Method(lambda **kw: LayerPrefixConfig(num_virtual_tokens=4, **kw)),
    "projected_prefix": Method(
        lambda **kw: LayerPrefixConfig(
            num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=8, init="paper", **kw
        ),
        starts_as_base=False,
    ),
    "bitfit": Method(BitFitConfig, mergeable=True),
    "unipelt": Method(lambda **kw: UniPELTConfig(bottleneck_size=4, num_virtual_tokens=4, **kw)),
    "unipelt_paper": Method(
        lambda **kw: UniPELTConfig(bottleneck_size=4, num_virtual_tokens=4, init="paper", **kw), starts_as_base=False
    ),
    "unipelt_aplb": Method(
        lambda **kw: UniPELTConfig(
            methods=("adapter", "prefix", "lora", "bitfit"), bottleneck_size=4, num_virtual_tokens=4, **kw
        )
    ),
    "unipelt_nogate": Method(lambda **kw: UniPELTConfig(gated=False, bottleneck_size=4, num_virtual_tokens=4, **kw)),
    "lora_branch": Method(lambda **kw: UniPELTConfig(methods=("lora",), gated=False, r=2, **kw), mergeable=True),
    "mam": Method(lambda **kw: MAMConfig(num_virtual_tokens=4, bottleneck_size=4, **kw)),
    "s4": Method(
        lambda **kw: S4Config(
            grouping="uniform", strategies=[("adapter", "lora"), ("prefix", "bitfit", "lora")], budget=0.1, **kw
        )
    ),
    "composed": Method(composed),
    "intervention": Method(
        lambda **kw: ComposedConfig(placements=[Placement("intervention", "block_output", options={"r": 2})], **kw),
    ),
}
# Methods that are no list of placements.
OTHERS = {
    "tfew": Method(TFewConfig, mergeable=True, part="ia3_l"),
    "ladder": Method(
        lambda **kw: LadderConfig(r=4, **kw),
        mixes=False,
        part="side_of",
        layers="layers_to_keep",
        refused=dict.fromkeys(("albert", "deepseek_v3"), "cannot be cut"),
    ),
    "sparse": Method(
        lambda **kw: SparseConfig(selection="random", density=0.3, **kw),
        mergeable=True,
        mixes=False,
        part="deltas_of",
    ),
    "intrinsic": Method(
        lambda **kw: IntrinsicConfig(d=256, **kw), mergeable=True, mixes=False, part="intrinsic_subspace"
    ),
    "said": Method(
        lambda **kw: IntrinsicConfig(d=256, variant="layer", **kw),
        mergeable=True,
        mixes=False,
        part="intrinsic_subspace",
    ),
}
ALL = METHODS | OTHERS
# Settings and methods that other rows cover on most families: the fast tests run them with `CORE` alone.
VARIANTS = {
    *("houlsby", "parallel", "compacter", "compacter_unshared", "adamix", "projected_prefix"),
    *("unipelt_paper", "unipelt_aplb", "unipelt_nogate", "intervention", "sparse", "intrinsic", "said"),
}
CORE = {"bert", "t5", "llama"}


def is_fast(backbone: str, method: str) -> bool:
    """Whether the fast tests run the contract on a pair: the slow ones run it on all.

    They take every method with `CORE`, and, variants aside, with every third family, so that each family meets
    every third method.
    """
    place = list(BACKBONES).index(backbone) + list(ALL).index(method)
    return backbone in CORE or (method not in VARIANTS and place % 3 == 0)


def randomise(model: nn.Module, adapter: str = "default", seed: int = 0, std: float = 0.2) -> None:
    """Give an adapter weights that matter, the same at every call."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}." in f"{name}.":
                around = 1.0 if ".ia3_l." in name else 0.0  # where it scales
                parameter.copy_(around + torch.randn(parameter.shape, generator=generator) * std)
