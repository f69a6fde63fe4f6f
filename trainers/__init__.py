"""Trainers that record what an adapter's card tells, and save and push nothing but the adapter."""

from typing import TYPE_CHECKING, Any

from .bridge import BridgeTrainer as BridgeTrainer
from .mixin import AdapterTrainerMixin as AdapterTrainerMixin
from .trainer import AdapterSeq2SeqTrainer as AdapterSeq2SeqTrainer
from .trainer import AdapterTrainer as AdapterTrainer

if TYPE_CHECKING:
    from .sft import AdapterSFTTrainer as AdapterSFTTrainer


def __getattr__(name: str) -> Any:
    if name == "AdapterSFTTrainer":  # TRL is an extra, and slow to import
        from .sft import AdapterSFTTrainer

        return AdapterSFTTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
