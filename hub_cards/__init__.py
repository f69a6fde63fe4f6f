"""Cards and safe pushes: what others need to know and to trust of an adapter."""

from .card import AdapterCard as AdapterCard
from .card import write_card as write_card
from .record import DatasetRecord as DatasetRecord
from .record import Result as Result
from .record import TrainingRecord as TrainingRecord
