"""Trainers that save and push adapters only, and record the run for the adapter's card."""

import importlib
from typing import TYPE_CHECKING, Any

from hf_peft_ext.trainers.adalora import AdaLoraCallback as AdaLoraCallback
from hf_peft_ext.trainers.bridge import BridgeTrainer as BridgeTrainer
from hf_peft_ext.trainers.choice_data import DataCollatorForChoices as DataCollatorForChoices
from hf_peft_ext.trainers.consistency import AdaMixTrainer as AdaMixTrainer
from hf_peft_ext.trainers.consistency import ConsistencyMixin as ConsistencyMixin
from hf_peft_ext.trainers.distillation import AdapterSoftLabelTrainer as AdapterSoftLabelTrainer
from hf_peft_ext.trainers.distillation import SoftLabelMixin as SoftLabelMixin
from hf_peft_ext.trainers.distillation import SoftLabelTrainer as SoftLabelTrainer
from hf_peft_ext.trainers.mixin import AdapterTrainerMixin as AdapterTrainerMixin
from hf_peft_ext.trainers.relora import ReLoRACallback as ReLoRACallback
from hf_peft_ext.trainers.soft_labels import SoftLabels as SoftLabels
from hf_peft_ext.trainers.soft_labels import soft_labels as soft_labels
from hf_peft_ext.trainers.tfew import TFewTrainer as TFewTrainer
from hf_peft_ext.trainers.tfew_arguments import TFewTrainingArguments as TFewTrainingArguments
from hf_peft_ext.trainers.trainer import AdapterSeq2SeqTrainer as AdapterSeq2SeqTrainer
from hf_peft_ext.trainers.trainer import AdapterTrainer as AdapterTrainer

if TYPE_CHECKING:
    from hf_peft_ext.trainers.embeddings import AdapterEmbeddingTrainer as AdapterEmbeddingTrainer
    from hf_peft_ext.trainers.sft import AdapterSFTTrainer as AdapterSFTTrainer


def __getattr__(name: str) -> Any:
    if name == "AdapterSFTTrainer":  # TRL is an extra, and slow to import
        from hf_peft_ext.trainers.sft import AdapterSFTTrainer

        return AdapterSFTTrainer
    if name == "AdapterEmbeddingTrainer":  # sentence-transformers is an extra, too
        from hf_peft_ext.trainers.embeddings import AdapterEmbeddingTrainer

        return AdapterEmbeddingTrainer
    if name == "compare":  # above the trainers, which it uses; its name is handed on for users
        return importlib.import_module("hf_peft_ext.compare").compare
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
