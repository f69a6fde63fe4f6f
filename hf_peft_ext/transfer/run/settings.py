"""The choices of a plug-in transfer, and how long each of its stages is."""

from dataclasses import dataclass, field
from typing import Literal

from hf_peft_ext.transfer.bridges.delta import Around
from hf_peft_ext.transfer.map.projections import Init, Order
from hf_peft_ext.validation.checks import check_count, check_names, check_positive


@dataclass
class PlugInSettings:
    """The choices that the paper leaves open, and how long each stage is.

    Args:
        bridge: where the plugged module is trained: "delta" (a thin copy held to the large model), "paper" (a thin
            copy that is trained with it), or "none".
        around: see `delta_bridge`.
        r, reduce: how thin the copy is, see `pruning.pruned_copy`. 16 by parameters is the paper's table; in a delta
            bridge 4 does better (`examples/studies`).
        importance: what chooses its channels: "magnitude", "activation" (forward passes) or "fisher" (gradients of
            the large model, which the others do without).
        ladder: whether the paper's bridge is fed with what the large model makes of the tokens, kept on disk.
        order, init, sides, train_projections: W_plug, see `plug` and `Projections`.
        refine: what MeZO refines by forward passes of the large model: "scales" (one for each layer), "module", or
            "none".
        temperature: of the small model's decisions on rows without answers, see `decide`.
        scales: factors of the module to choose from; 0 is always among them.
        small_steps, small_lr: the small model's own training, where it has no adapter yet.
        bridge_steps, bridge_lr: gentle steps: what is trained in a thin copy has to hold in the large model.
        refine_steps, refine_lr, eps: of MeZO.
        batch_size: rows in a step.
        seed: of everything that is drawn.

    Raises:
        ValueError: a value breaks a rule.
    """

    bridge: Literal["delta", "paper", "none"] = "delta"
    around: Around = "plugged"
    r: float = 4
    reduce: Literal["width", "parameters"] = "parameters"
    importance: Literal["magnitude", "activation", "fisher"] = "activation"
    ladder: bool = False
    order: Order = "interleaved"
    init: Init = "orthogonal"
    sides: Literal["both", "read", "write"] = "both"
    train_projections: bool = True
    refine: Literal["none", "scales", "module"] = "none"
    temperature: float = 1.0
    scales: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 1.0])
    small_steps: int = 300
    small_lr: float = 1e-3
    bridge_steps: int = 200
    bridge_lr: float = 2e-4
    refine_steps: int = 200
    refine_lr: float = 1e-3
    eps: float = 1e-3
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_names("bridge", [self.bridge], ("delta", "paper", "none"))
        check_names("refine", [self.refine], ("none", "scales", "module"))
        for name in ("small_steps", "bridge_steps", "refine_steps", "batch_size"):
            check_count(name, getattr(self, name))
        for name in ("small_lr", "bridge_lr", "refine_lr", "eps", "temperature"):
            check_positive(name, getattr(self, name))
        self.scales = sorted({0.0, *map(float, self.scales)})
