"""The methods, each a short function from its config to placements, and the tuner that carries them out."""

from peft import PeftType

from ..registry import register, replace_tuner
from .bitfit import BitFitConfig as BitFitConfig
from .bottleneck import BottleneckConfig as BottleneckConfig
from .composed import ComposedModel as ComposedModel
from .composed import fold_prefixes as fold_prefixes
from .config import ComposedConfig as ComposedConfig
from .gates import fix_gates as fix_gates
from .gates import gate_values as gate_values
from .ia3 import IA3Model
from .ladder import LadderConfig as LadderConfig
from .ladder import LadderModel as LadderModel
from .ladder import prune_ladder as prune_ladder
from .layer_prefix import LayerPrefixConfig as LayerPrefixConfig
from .mam import MAMConfig as MAMConfig
from .s4 import S4Config as S4Config
from .tfew import TFewConfig as TFewConfig
from .unipelt import UniPELTConfig as UniPELTConfig

for config in (BottleneckConfig, LayerPrefixConfig, BitFitConfig, UniPELTConfig, MAMConfig, S4Config, ComposedConfig):
    register(config.method, config, ComposedModel)
register(LadderConfig.method, LadderConfig, LadderModel)
replace_tuner(PeftType.IA3, IA3Model)
