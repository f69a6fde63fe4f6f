"""The settings of plug-in transfer."""

from dataclasses import dataclass, field
from typing import Literal

from hf_peft_ext.transfer.bridges.delta import Around
from hf_peft_ext.transfer.map.projections import Init, Order
from hf_peft_ext.validation.checks import check_count, check_names, check_positive


@dataclass
class PlugInSettings:
    """The choices that the paper leaves open, and the length of each stage.

    Args:
        bridge: where the plugged adapter is trained: "delta" (a pruned copy held to the large model), "paper" (a
            pruned copy that is trained with it), or "none".
        around: see `delta_bridge`.
        r, reduce: the size of the pruned copy, see `pruning.pruned_copy`. 16 by parameters is the paper's; in a delta
            bridge 4 does better (`examples/studies`).
        importance: the scores that choose the copy's channels: "magnitude", "activation" (forward passes) or "fisher"
            (gradients of the large model).
        ladder: whether the paper's bridge also reads the inputs of the large model's blocks, cached on disk.
        order, init, sides, train_projections: of W_plug, see `plug` and `Projections`.
        refine: what MeZO trains by forward passes of the large model: "scales" (one for each layer), "module" (the
            adapter), or "none".
        temperature: of the small model's soft labels for rows without answers, see `decide`.
        scales: factors of the adapter to choose from; 0 is added.
        small_steps, small_lr: of the small model's own training, if it has no adapter.
        bridge_steps, bridge_lr: of the bridge. The learning rate is low: the large model has to gain from the steps.
        refine_steps, refine_lr, eps: of MeZO.
        batch_size: rows in a step.
        seed: of all random draws.

    Raises:
        ValueError: a choice is unknown, or a number is not positive.
    """

    bridge: Literal["delta", "paper", "none"] = "delta"
    around: Around = "plugged"
    r: float = 4
    reduce: Literal["width", "parameters"] = "parameters"
    importance: Literal["magnitude", "activation", "fisher"] = "activation"
    ladder: bool = False
    order: Order = "interleaved"
    init: Init = "orthogonal"
    sides: Literal["both", "in", "out"] = "both"
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
