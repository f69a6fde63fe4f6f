"""Trainers that record what an adapter's card tells, and save and push nothing but the adapter."""

from typing import TYPE_CHECKING, Any

from .bridge import BridgeTrainer as BridgeTrainer
from .choice_data import DataCollatorForChoices as DataCollatorForChoices
from .mixin import AdapterTrainerMixin as AdapterTrainerMixin
from .tfew import TFewTrainer as TFewTrainer
from .tfew_arguments import TFewTrainingArguments as TFewTrainingArguments
from .trainer import AdapterSeq2SeqTrainer as AdapterSeq2SeqTrainer
from .trainer import AdapterTrainer as AdapterTrainer

if TYPE_CHECKING:
    from .search import DesignSpaceSearch as DesignSpaceSearch
    from .sft import AdapterSFTTrainer as AdapterSFTTrainer


def __getattr__(name: str) -> Any:
    if name == "AdapterSFTTrainer":  # TRL is an extra, and slow to import
        from .sft import AdapterSFTTrainer

        return AdapterSFTTrainer
    if name == "DesignSpaceSearch":  # so is Optuna
        from .search import DesignSpaceSearch

        return DesignSpaceSearch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
