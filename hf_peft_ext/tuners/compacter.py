"""Compacter and Compacter++: bottlenecks whose matrices are sums of Kronecker products."""

from dataclasses import dataclass, field
from typing import Literal

from hf_peft_ext.attach.config import InitConfig, PlacedConfig
from hf_peft_ext.attach.placement import Placement
from hf_peft_ext.validation.checks import check

COMPACTER_SITES = {"compacter": ("after_attention", "after_ffn"), "compacter++": ("after_ffn",)}


@dataclass
class CompacterConfig(InitConfig, PlacedConfig):
    """Bottleneck adapters with few parameters: W = sum_i A_i (x) (s_i t_i) (`sublayers.PHMBottleneck`).

    Karimi Mahabadi et al. 2021 (https://arxiv.org/abs/2106.04647), with the defaults of its code: after attention and
    after the FFN, before each residual; n = 4, rank 1, d / 32 wide, the tanh form of GELU, one rule (the A_i) for all
    matrices of the adapter. Where we differ:

    - the untrained adapter is the base model: the t_i of W_up start at zero, the A_i with a standard deviation of
      1 / n. `init="paper"`: the A_i start near zero (1e-4, or 1e-2 with a rule in each matrix), and so does W;
    - the code trains the layer norms too: `modules_to_save=["LayerNorm"]`, by the names that the model gives them.

    T-Few's comparison has a rule in each matrix and ReLU: `shared_phm_rule=False, activation="relu"`.

    Args:
        style: "compacter", or "compacter++": after the FFN only.
        phm_dim: n, the number and width of the A_i. It divides the model's width.
        phm_rank: rank of the s_i t_i.
        shared_phm_rule: whether all matrices of the adapter share the A_i.
        reduction_factor: the width is d / reduction_factor, rounded to a multiple of n.
        r: the width, a multiple of n, instead of `reduction_factor`.
        activation: a name in transformers' `ACT2FN`.
        dropout: probability, inside the bottleneck.

    Raises:
        ValueError: a value breaks a rule.
    """

    method = "compacter"

    style: Literal["compacter", "compacter++"] = field(default="compacter", metadata={"help": "Where adapters sit."})
    phm_dim: int = field(default=4, metadata={"help": "Number and width of the Kronecker factors."})
    phm_rank: int = field(default=1, metadata={"help": "Rank of the other factors."})
    shared_phm_rule: bool = field(default=True, metadata={"help": "Whether all matrices share the factors."})
    reduction_factor: float = field(default=32, metadata={"help": "The width as d / reduction_factor."})
    r: int | None = field(default=None, metadata={"help": "Width of the bottleneck."})
    activation: str = field(default="gelu_new", metadata={"help": "Activation."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout inside the bottleneck."})

    def __post_init__(self) -> None:
        check("style", self.style, self.style in COMPACTER_SITES, f"must be one of {', '.join(COMPACTER_SITES)}")
        super().__post_init__()

    def to_placements(self) -> list[Placement]:
        width = {"reduction_factor": self.reduction_factor} if self.r is None else {"r": self.r}
        phm = {"phm_dim": self.phm_dim, "phm_rank": self.phm_rank, "shared_phm_rule": self.shared_phm_rule}
        init = "lora" if self.init == "base" else 1e-4 if self.shared_phm_rule else 1e-2
        options = {**width, **phm, "activation": self.activation, "dropout": self.dropout, "init": init}
        return [Placement("bottleneck", site, options=options) for site in COMPACTER_SITES[self.style]]
