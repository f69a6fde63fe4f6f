"""Bottleneck adapters: Houlsby, Pfeiffer, parallel and scaled parallel."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from hf_peft_ext.attach.config import InitConfig, PlacedConfig
from hf_peft_ext.attach.placement import Placement
from hf_peft_ext.validation.checks import check

Pruning = Literal["snip", "grasp", "magnitude", "random"]

# style -> its sites, and the paper's defaults; `init` holds with `init="paper"` alone
STYLES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "houlsby": (("after_attention", "after_ffn"), {"r": 64, "activation": "gelu", "init": 1e-3}),
    "pfeiffer": (("after_residual",), {"reduction_factor": 16, "activation": "relu", "init": 0.02}),
    "parallel": (("parallel_ffn",), {"r": 512, "activation": "relu", "init": "lora"}),
    "scaled_parallel": (("parallel_ffn",), {"r": 512, "activation": "relu", "init": "lora", "scaling": 4.0}),
}


@dataclass
class BottleneckConfig(InitConfig, PlacedConfig):
    """Bottleneck adapters (`sublayers.Bottleneck`) at the places of four papers.

    - houlsby: after attention and after the FFN, before each residual. Houlsby et al. 2019
      (https://arxiv.org/abs/1902.00751): 64 wide, GELU. The paper trains the layer norms too:
      `modules_to_save=["LayerNorm"]`, by the names that the model gives them.
    - pfeiffer: after the FFN; reads norm(FFN + residual) and adds to the input of that norm; in pre-norm models,
      after the residual. Pfeiffer et al. 2021 (https://arxiv.org/abs/2005.00247): d / 16 wide, ReLU.
    - parallel, scaled_parallel: beside the FFN, from its input to its output. He et al. 2022
      (https://arxiv.org/abs/2110.04366): 512 wide, ReLU, W_up zero at the start, s = 1 or 4.

    W_up is zero at the start in all styles, so that the untrained adapter is the base model. Houlsby and Pfeiffer draw
    it from a normal distribution of standard deviation 0.001 and 0.02 (`init="paper"`).

    Args:
        style: the placement, with that paper's defaults.
        r: width of the bottleneck; None for the style's.
        reduction_factor: the width as d / reduction_factor, instead of `r`.
        activation: a name in transformers' `ACT2FN`; None for the style's.
        dropout: probability, inside the bottleneck.
        scaling: s, a number or "learned" (starts at 1); None for the style's.
        sparsity: share of the matrices' entries that are pruned before training: SparseAdapter, He et al. 2022
            (https://arxiv.org/abs/2210.04284). A trainer of `hf_peft_ext.trainers` does it, or `prune_bottlenecks`.
            The paper's large-sparse setting is a wider bottleneck with as many entries left.
        pruning: the scores of the entries that stay, over all layers together: "snip" abs(w dL/dw), "grasp"
            w (H dL/dw), "magnitude" abs(w), or "random". All but "random" need random matrices: `init="paper"`.

    Raises:
        ValueError: a value breaks a rule.
    """

    method = "bottleneck"

    style: Literal["houlsby", "pfeiffer", "parallel", "scaled_parallel"] = field(
        default="pfeiffer", metadata={"help": "Where the adapters sit, with that paper's defaults."}
    )
    r: int | None = field(default=None, metadata={"help": "Width of the bottleneck."})
    reduction_factor: float | None = field(default=None, metadata={"help": "The width as d / reduction_factor."})
    activation: str | None = field(default=None, metadata={"help": "Activation; the style's by default."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout inside the bottleneck."})
    scaling: float | Literal["learned"] | None = field(
        default=None, metadata={"help": "Factor; the style's by default."}
    )

    sparsity: float = field(default=0.0, metadata={"help": "Share of the entries pruned before training."})
    pruning: Pruning = field(default="snip", metadata={"help": "The scores of the entries that stay."})

    def __post_init__(self) -> None:
        check("style", self.style, self.style in STYLES, f"must be one of {', '.join(STYLES)}")
        check(
            "pruning",
            self.pruning,
            self.pruning in get_args(Pruning),
            f"must be one of {', '.join(get_args(Pruning))}",
        )
        is_random = self.init == "paper" and STYLES[self.style][1]["init"] != "lora"
        rule = 'needs random matrices, or all of W_up would be pruned: init="paper" with "houlsby" or "pfeiffer"'
        check("pruning", self.pruning, not self.sparsity or self.pruning == "random" or is_random, rule)
        super().__post_init__()

    def to_placements(self) -> list[Placement]:
        sites, defaults = STYLES[self.style]
        options = defaults | {"dropout": self.dropout} | ({} if self.init == "paper" else {"init": "lora"})
        if self.r is not None or self.reduction_factor is not None:
            options |= {"r": self.r, "reduction_factor": self.reduction_factor}
        for key in ("activation", "scaling"):
            if getattr(self, key) is not None:
                options[key] = getattr(self, key)
        if self.sparsity:
            options["sparsity"] = self.sparsity
        return [Placement("bottleneck", site, options=options) for site in sites]
