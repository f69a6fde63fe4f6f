"""Model cards of adapters, and pushes of adapters to the Hub."""

from hf_peft_ext.hub_cards.card import AdapterCard as AdapterCard
from hf_peft_ext.hub_cards.card import write_card as write_card
from hf_peft_ext.hub_cards.card_files import is_as_written as is_as_written
from hf_peft_ext.hub_cards.peft_integration import (
    CardWarning as CardWarning,  # the module extends methods of PeftModel
)
from hf_peft_ext.hub_cards.push import PushError as PushError
from hf_peft_ext.hub_cards.push import publishable as publishable
from hf_peft_ext.hub_cards.push import push_adapter as push_adapter
from hf_peft_ext.hub_cards.record import DatasetRecord as DatasetRecord
from hf_peft_ext.hub_cards.record import Result as Result
from hf_peft_ext.hub_cards.record import TrainingRecord as TrainingRecord
