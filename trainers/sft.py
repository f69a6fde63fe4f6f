"""TRL's trainer for supervised fine-tuning, for adapters."""

from typing import Any

try:
    from trl.trainer.sft_trainer import SFTTrainer
except ImportError as error:
    raise ImportError("AdapterSFTTrainer needs TRL: pip install 'hf_peft_ext[trl]'") from error

from hf_peft_ext.trainers.mixin import AdapterTrainerMixin


class AdapterSFTTrainer(AdapterTrainerMixin, SFTTrainer):
    """TRL's `SFTTrainer` for adapters; see `AdapterTrainerMixin` for what it adds."""

    _name = "SFT"
    _tags = ("trl", "sft")

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_dataset(dataset, *args, **kwargs)
        self.recorder.data.add_prepared(prepared, dataset)
        return prepared
