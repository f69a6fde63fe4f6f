"""Design spaces of parameter-efficient fine-tuning: samplers from S0 to S4, and the comparison of constraints."""

from .compare import Comparison as Comparison
from .compare import compare as compare
from .space import DesignSpace as DesignSpace
