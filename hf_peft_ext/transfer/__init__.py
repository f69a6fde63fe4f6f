"""Plug-in transfer: what was tuned on a small model, made to fit a large one that is never trained."""

from .fold import fold as fold
from .plugging import plug as plug
from .projections import Projections as Projections
