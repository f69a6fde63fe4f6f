"""Plug-in transfer: what was tuned on a small model, made to fit a large one that is never trained."""

from ..pruning import Importance as Importance
from ..pruning import ThinModel as ThinModel
from ..pruning import importance as importance
from ..pruning import thin_copy as thin_copy
from ..pruning import thin_sizes as thin_sizes
from .bridge import bridge as bridge
from .decisions import decide as decide
from .delta import delta_bridge as delta_bridge
from .fold import fold as fold
from .plug_in import plug_in as plug_in
from .plugging import plug as plug
from .projections import Projections as Projections
from .result import PlugInResult as PlugInResult
from .settings import PlugInSettings as PlugInSettings
from .similarity import ModuleSimilarity as ModuleSimilarity
from .similarity import module_similarity as module_similarity
from .task import task_for as task_for
from .zeroth_order import MeZO as MeZO
from .zeroth_order import layer_scales as layer_scales
