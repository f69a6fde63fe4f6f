"""TRL's supervised fine-tuning, for adapters."""

try:
    from trl.trainer.sft_trainer import SFTTrainer
except ImportError as error:
    raise ImportError("AdapterSFTTrainer needs TRL: pip install 'hf_peft_ext[trl]'") from error

from .mixin import AdapterTrainerMixin


class AdapterSFTTrainer(AdapterTrainerMixin, SFTTrainer):
    """TRL's `SFTTrainer` for adapters; see `AdapterTrainerMixin` for what it adds."""

    _name = "SFT"
    _tags = ("trl", "sft")
