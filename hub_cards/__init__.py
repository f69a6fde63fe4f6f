"""Cards and safe pushes: what others need to know and to trust of an adapter."""

from .record import DatasetRecord as DatasetRecord
from .record import Result as Result
from .record import TrainingRecord as TrainingRecord
