"""Cards and safe pushes: what others need to know and to trust of an adapter."""

from hf_peft_ext.hub_cards.card import AdapterCard as AdapterCard
from hf_peft_ext.hub_cards.card import is_as_written as is_as_written
from hf_peft_ext.hub_cards.card import write_card as write_card
from hf_peft_ext.hub_cards.peft_integration import (
    CardWarning as CardWarning,  # what PeftModel's own methods do for adapters of this package
)
from hf_peft_ext.hub_cards.push import PushError as PushError
from hf_peft_ext.hub_cards.push import publishable as publishable
from hf_peft_ext.hub_cards.push import push_adapter as push_adapter
from hf_peft_ext.hub_cards.record import DatasetRecord as DatasetRecord
from hf_peft_ext.hub_cards.record import Result as Result
from hf_peft_ext.hub_cards.record import TrainingRecord as TrainingRecord
