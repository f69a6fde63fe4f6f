"""Prefixes inside the attention of every layer."""

from dataclasses import dataclass

from hf_peft_ext.attach.config import PrefixedConfig
from hf_peft_ext.attach.placement import Placement


@dataclass
class LayerPrefixConfig(PrefixedConfig):
    """Trained keys and values beside each attention's own (`sublayers.Prefix`), cross-attention included.

    Li and Liang 2021 (https://arxiv.org/abs/2101.00190), 10 vectors as for table-to-text. Unlike peft's
    `PrefixTuningConfig`, which fills the cache, the prefix sits inside attention: it works in encoders, beside other
    sub-layers and with any cache, and does not shift positions.

    - The paper puts the prefix in front of the keys, under one softmax (`init="paper"`). Before any training that
      takes attention from the text. Here the prefix has a softmax of its own, and starts as the base model.
    - The paper trains the prefixes through a network (`prefix_projection=True`); plain ones are the default, as in
      peft, since the network is not saved.

    Raises:
        ValueError: a value breaks a rule.
    """

    method = "layer_prefix"

    def to_placements(self) -> list[Placement]:
        return [self.prefix()]
