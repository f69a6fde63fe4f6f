"""The four sub-layers and their gate: torch only, one formula a file.

A sub-layer knows nothing of models, adapters or peft. `tuners` attaches it to a module of the base model.
"""

from .additive import Additive as Additive
from .bias import Bias as Bias
from .bottleneck import Bottleneck as Bottleneck
from .gate import Gate as Gate
from .low_rank import LowRank as LowRank
from .prefix import Prefix as Prefix
from .prefix import ProjectedPrefix as ProjectedPrefix
from .prefix import Projection as Projection
