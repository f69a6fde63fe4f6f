"""A Trainer for the bridge stage of plug-in transfer."""

from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hf_peft_ext.pruning import PrunedModel
from hf_peft_ext.transfer import delta_bridge
from hf_peft_ext.transfer.bridges.bridge import bridge
from hf_peft_ext.transfer.map.bake import plain_state
from hf_peft_ext.validation.checks import check

BRIDGE_WEIGHTS = "bridge.safetensors"


class BridgeTrainer(Trainer):
    """Trains a plugged module in a bridge; the large model is never trained.

    It saves the merged adapter of the large model: a plain LORA, BOTTLENECK or LAYER_PREFIX. A checkpoint also holds
    the trainable parameters of the bridge, to resume from.

    Args:
        plugged: the result of `transfer.plug`, or the large model with a new adapter.
        args: of `Trainer`; a delta bridge needs small steps, such as a learning rate of 2e-4.
        pruned: the pruned copy of the large model, made before the module was plugged in.
        kind: "delta" (follows the large model's activations) or "paper" (is trained together with the module).
        ladder, cache: of the paper's bridge, see `transfer.bridge`.
        kwargs: of `Trainer`.

    Raises:
        ValueError: `kind` is unknown or has no ladder, or the pruned copy is of another model.
    """

    def __init__(
        self,
        plugged: PeftModel,
        args: TrainingArguments,
        pruned: PrunedModel,
        kind: Literal["delta", "paper"] = "delta",
        ladder: bool = False,
        cache: str | Path | None = None,
        **kwargs: Any,
    ):
        check("kind", kind, kind in ("delta", "paper"), "must be delta or paper")
        check("ladder", ladder, kind == "paper" or not ladder, "is for the paper's bridge: a delta bridge needs none")
        self.plugged, self.kind = plugged, kind
        self._delta = delta_bridge(plugged, pruned) if kind == "delta" else None
        model = self._delta.__enter__() if self._delta else bridge(plugged, pruned, ladder=ladder, cache=cache)
        super().__init__(model, args, **kwargs)

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Train on a batch; the large model stays in evaluation mode."""
        self.plugged.eval()
        return super().training_step(model, *args, **kwargs)

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The loss of a batch, for a delta bridge without dropout."""
        if self.kind == "delta":
            model.eval()  # the large model has no dropout there
        return super().compute_loss(model, *args, **kwargs)

    def release(self) -> PeftModel:
        """Take the plugged model out of the bridge, for example to merge it."""
        if self._delta:
            self._delta.__exit__(None, None, None)
            self._delta = None
        return self.plugged

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir or ".")
        self.plugged.save_pretrained(str(folder), state_dict=plain_state(self.plugged))
        weights = {name: p.detach().contiguous().clone() for name, p in self._trained().items()}
        save_file(weights, folder / BRIDGE_WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        state = load_file(Path(resume_from_checkpoint, BRIDGE_WEIGHTS))
        with torch.no_grad():
            for name, parameter in self._trained().items():
                parameter.copy_(state[name])

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.peft_bridge.named_parameters() if p.requires_grad}

    @property
    def peft_bridge(self) -> PeftModel:
        """The bridge, without accelerate's wrappers."""
        return self.accelerator.unwrap_model(self.model)  # pyright: ignore[reportReturnType]
