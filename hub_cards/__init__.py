"""Cards and safe pushes: what others need to know and to trust of an adapter."""

from .card import AdapterCard as AdapterCard
from .card import is_as_written as is_as_written
from .card import write_card as write_card
from .push import PushError as PushError
from .push import publishable as publishable
from .push import push_adapter as push_adapter
from .record import DatasetRecord as DatasetRecord
from .record import Result as Result
from .record import TrainingRecord as TrainingRecord
from .saving import CardWarning as CardWarning  # what PeftModel's own methods do for adapters of this package
