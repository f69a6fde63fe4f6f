"""The bridge stage of plug-in transfer as a Trainer."""

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

TRAINED = "bridge.safetensors"


class BridgeTrainer(Trainer):
    """transformers' `Trainer` for a plugged module in a bridge; the large model is never trained.

    What it saves is the folded adapter of the large model, a plain LORA, BOTTLENECK or LAYER_PREFIX; a checkpoint has
    what is trained beside it, to go on from.

    Args:
        plugged: what `transfer.plug` returned; or the large model with a fresh adapter, without any small one.
        args: as `Trainer` takes them; a delta bridge wants gentle steps, such as a rate of 2e-4.
        thin: the thin copy of the large model, cut before it was plugged.
        kind: "delta" (held to the large model) or "paper" (trained with the module).
        ladder, cache: of the paper's bridge, see `transfer.bridge`.
        kwargs: as `Trainer` takes them.

    Raises:
        ValueError: `kind` is unknown or has no ladder, or the thin copy is not of this large model.
    """

    def __init__(
        self,
        plugged: PeftModel,
        args: TrainingArguments,
        thin: PrunedModel,
        kind: Literal["delta", "paper"] = "delta",
        ladder: bool = False,
        cache: str | Path | None = None,
        **kwargs: Any,
    ):
        check("kind", kind, kind in ("delta", "paper"), "must be delta or paper")
        check("ladder", ladder, kind == "paper" or not ladder, "is for the paper's bridge: a delta bridge needs none")
        self.plugged, self.kind = plugged, kind
        self._held = delta_bridge(plugged, thin) if kind == "delta" else None
        model = self._held.__enter__() if self._held else bridge(plugged, thin, ladder=ladder, cache=cache)
        super().__init__(model, args, **kwargs)

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        self.plugged.eval()
        return super().training_step(model, *args, **kwargs)

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.kind == "delta":
            model.eval()  # dropout would not be the large model's
        return super().compute_loss(model, *args, **kwargs)

    def release(self) -> PeftModel:
        """The plugged model, no longer held to the bridge; to be folded."""
        if self._held:
            self._held.__exit__(None, None, None)
            self._held = None
        return self.plugged

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir or ".")
        self.plugged.save_pretrained(str(folder), state_dict=plain_state(self.plugged))
        save_file({name: p.detach().contiguous().clone() for name, p in self._trained().items()}, folder / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        state = load_file(Path(resume_from_checkpoint, TRAINED))
        with torch.no_grad():
            for name, parameter in self._trained().items():
                parameter.copy_(state[name])

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.peft_bridge.named_parameters() if p.requires_grad}

    @property
    def peft_bridge(self) -> PeftModel:
        return self.accelerator.unwrap_model(self.model)  # pyright: ignore[reportReturnType]
