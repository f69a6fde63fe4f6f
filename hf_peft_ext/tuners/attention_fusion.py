"""Attention fusion: the outputs of several frozen adapters, weighed by trained attention."""

from dataclasses import dataclass

from torch import nn

from hf_peft_ext.attach.fusion import FusionConfig
from hf_peft_ext.attach.layer import TunerLayer
from hf_peft_ext.sublayers import AttentionFusion


@dataclass
class AttentionFusionConfig(FusionConfig):
    """Weigh the outputs of adapters of one model, at each place and for each token (`sublayers.AttentionFusion`).

    The light gate of Cao et al. 2022 (https://aclanthology.org/2022.findings-naacl.64): d numbers at each place. The
    adapters consist of bottlenecks (also of Compacter and AdaMix) or LoRA branches, and stay frozen. The untrained
    fusion is the mean of their outputs.

    Raises:
        ValueError: a value breaks a rule.

    Example:
        >>> model.load_adapter("sst2", "a"), model.load_adapter("qnli", "b")  # doctest: +SKIP
        >>> model.add_adapter("both", AttentionFusionConfig(adapters=["a", "b"]))  # doctest: +SKIP
        >>> model.set_adapter("both")  # doctest: +SKIP
    """

    method = "attention_fusion"

    def sublayer(self, layer: TunerLayer, names: list[str]) -> nn.Module:
        """The attention over the adapters at one place."""
        return AttentionFusion(layer.site.width or layer.site.d_out, names, layer.sublayer_of)
