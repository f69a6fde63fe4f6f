"""The trainers of transformers, for adapters."""

from transformers import Seq2SeqTrainer, Trainer

from hf_peft_ext.trainers.mixin import AdapterTrainerMixin


class AdapterTrainer(AdapterTrainerMixin, Trainer):
    """transformers' `Trainer` for adapters; see `AdapterTrainerMixin` for what it adds."""


class AdapterSeq2SeqTrainer(AdapterTrainerMixin, Seq2SeqTrainer):
    """transformers' `Seq2SeqTrainer` (evaluation by generation) for adapters; see `AdapterTrainerMixin`."""
