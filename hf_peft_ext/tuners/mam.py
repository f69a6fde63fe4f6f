"""MAM: prefixes in attention, a scaled parallel adapter beside the FFN."""

from dataclasses import dataclass, field
from typing import Any, Literal

from hf_peft_ext.attach.config import PrefixedConfig
from hf_peft_ext.attach.placement import Placement
from hf_peft_ext.validation.checks import check_count


@dataclass
class MAMConfig(PrefixedConfig):
    """The mix-and-match adapter: few prefix vectors, most parameters beside the FFN.

    He et al. 2022 (https://arxiv.org/abs/2110.04366), section 4.6: 30 prefix vectors (the paper trains them through a
    network 800 wide, `prefix_projection=True`), a parallel bottleneck of 512, s = 4. `MAMConfig.glue()` has the
    paper's setting for GLUE: 16, 16 and s = 2.

    The prefix has a softmax of its own, so that the untrained adapter is the base model. `init="paper"` puts it in
    front of the keys.

    Args:
        bottleneck_size: width of the adapter.
        scaling: s, a number or "learned".
        dropout: dropout inside the adapter.

    Raises:
        ValueError: a value breaks a rule.
    """

    method = "mam"

    num_virtual_tokens: int = field(default=30, metadata={"help": "Prefix vectors in a layer."})
    encoder_hidden_size: int = field(default=800, metadata={"help": "Width of the reparameterisation."})
    bottleneck_size: int = field(default=512, metadata={"help": "Width of the adapter."})
    scaling: float | Literal["learned"] = field(
        default=4.0, metadata={"help": 'Factor on the adapter, a number or "learned".'}
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout inside the adapter."})

    def __post_init__(self) -> None:
        check_count("bottleneck_size", self.bottleneck_size)
        super().__post_init__()

    @classmethod
    def glue(cls, **kwargs: Any) -> "MAMConfig":
        """The paper's setting for GLUE."""
        return cls(**{"num_virtual_tokens": 16, "bottleneck_size": 16, "scaling": 2.0, **kwargs})

    def to_placements(self) -> list[Placement]:
        options = {"r": self.bottleneck_size, "scaling": self.scaling, "dropout": self.dropout, "init": "lora"}
        return [self.prefix(), Placement("bottleneck", "parallel_ffn", options=options)]
