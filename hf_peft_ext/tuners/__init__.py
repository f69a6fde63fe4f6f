"""The methods and their registration. Each is a config that lists placements; one tuner attaches them."""

from functools import partial

from peft import PeftType

from hf_peft_ext.attach.config import ComposedConfig as ComposedConfig
from hf_peft_ext.attach.gates import fix_gates as fix_gates
from hf_peft_ext.attach.gates import gate_values as gate_values
from hf_peft_ext.attach.tuner import ComposedModel as ComposedModel
from hf_peft_ext.attach.tuner import merge_prefix_projections as merge_prefix_projections
from hf_peft_ext.registry import on_first_use, register, replace_tuner
from hf_peft_ext.tuners.adamix import AdaMixConfig as AdaMixConfig
from hf_peft_ext.tuners.adamix import merge_experts as merge_experts
from hf_peft_ext.tuners.attention_fusion import AttentionFusionConfig as AttentionFusionConfig
from hf_peft_ext.tuners.bitfit import BitFitConfig as BitFitConfig
from hf_peft_ext.tuners.bottleneck import BottleneckConfig as BottleneckConfig
from hf_peft_ext.tuners.compacter import CompacterConfig as CompacterConfig
from hf_peft_ext.tuners.ia3.config import TFewConfig as TFewConfig
from hf_peft_ext.tuners.ia3.tuner import IA3Model
from hf_peft_ext.tuners.intrinsic.config import IntrinsicConfig as IntrinsicConfig
from hf_peft_ext.tuners.intrinsic.tuner import IntrinsicModel as IntrinsicModel
from hf_peft_ext.tuners.ladder.tuner import LadderConfig as LadderConfig
from hf_peft_ext.tuners.ladder.tuner import LadderModel as LadderModel
from hf_peft_ext.tuners.ladder.tuner import prune_ladder as prune_ladder
from hf_peft_ext.tuners.layer_prefix import LayerPrefixConfig as LayerPrefixConfig
from hf_peft_ext.tuners.learning_rates import recommended_learning_rate as recommended_learning_rate
from hf_peft_ext.tuners.mam import MAMConfig as MAMConfig
from hf_peft_ext.tuners.prune_bottlenecks import prune_bottlenecks as prune_bottlenecks
from hf_peft_ext.tuners.random_rank import random_rank_pattern as random_rank_pattern
from hf_peft_ext.tuners.s4.config import S4Config as S4Config
from hf_peft_ext.tuners.sparse.config import SparseConfig as SparseConfig
from hf_peft_ext.tuners.sparse.select import select_sparse_parameters as select_sparse_parameters
from hf_peft_ext.tuners.sparse.select import sparse_search as sparse_search
from hf_peft_ext.tuners.sparse.tuner import SparseModel
from hf_peft_ext.tuners.unipelt import UniPELTConfig as UniPELTConfig

for config in (
    *(BottleneckConfig, CompacterConfig, AdaMixConfig, LayerPrefixConfig, BitFitConfig),
    *(UniPELTConfig, MAMConfig, S4Config, ComposedConfig, AttentionFusionConfig),
):
    register(config.method, config, ComposedModel)
register(LadderConfig.method, LadderConfig, LadderModel)
register(SparseConfig.method, SparseConfig, SparseModel)
register(IntrinsicConfig.method, IntrinsicConfig, IntrinsicModel)
on_first_use(partial(replace_tuner, PeftType.IA3, IA3Model))
