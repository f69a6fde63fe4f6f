"""Hybrid, few-shot and transfer methods for Hugging Face peft. Importing this package registers them."""

from importlib.metadata import PackageNotFoundError, version

from hf_peft_ext import hub_cards as hub_cards
from hf_peft_ext.attach.parameter_groups import sublayer_parameter_groups as sublayer_parameter_groups
from hf_peft_ext.attach.placement import Placement as Placement
from hf_peft_ext.autoload import install_autoload as install_autoload
from hf_peft_ext.autoload import uninstall_autoload as uninstall_autoload
from hf_peft_ext.export import to_lora as to_lora
from hf_peft_ext.loading import load_adapter as load_adapter
from hf_peft_ext.loading.adapterhub import from_adapterhub as from_adapterhub
from hf_peft_ext.model.backbone import load_backbone as load_backbone
from hf_peft_ext.model.find_target_modules import find_target_modules as find_target_modules
from hf_peft_ext.model.find_target_modules import find_target_parameters as find_target_parameters
from hf_peft_ext.model.mean_pooling import MeanPoolingForSequenceClassification as MeanPoolingForSequenceClassification
from hf_peft_ext.prompts import PromptedDataset as PromptedDataset
from hf_peft_ext.prompts import PromptTemplate as PromptTemplate
from hf_peft_ext.prompts import evaluate_templates as evaluate_templates
from hf_peft_ext.prompts import load_templates as load_templates
from hf_peft_ext.ranking.classifier import RankClassifier as RankClassifier
from hf_peft_ext.ranking.classifier import score_choices as score_choices
from hf_peft_ext.registry import extend_peft as extend_peft
from hf_peft_ext.tuners import AdaMixConfig as AdaMixConfig
from hf_peft_ext.tuners import AttentionFusionConfig as AttentionFusionConfig
from hf_peft_ext.tuners import BitFitConfig as BitFitConfig
from hf_peft_ext.tuners import BottleneckConfig as BottleneckConfig
from hf_peft_ext.tuners import CompacterConfig as CompacterConfig
from hf_peft_ext.tuners import ComposedConfig as ComposedConfig
from hf_peft_ext.tuners import ComposedModel as ComposedModel
from hf_peft_ext.tuners import IntrinsicConfig as IntrinsicConfig
from hf_peft_ext.tuners import LadderConfig as LadderConfig
from hf_peft_ext.tuners import LayerPrefixConfig as LayerPrefixConfig
from hf_peft_ext.tuners import MAMConfig as MAMConfig
from hf_peft_ext.tuners import S4Config as S4Config
from hf_peft_ext.tuners import SparseConfig as SparseConfig
from hf_peft_ext.tuners import TFewConfig as TFewConfig
from hf_peft_ext.tuners import UniPELTConfig as UniPELTConfig
from hf_peft_ext.tuners import fix_gates as fix_gates
from hf_peft_ext.tuners import gate_values as gate_values
from hf_peft_ext.tuners import merge_experts as merge_experts
from hf_peft_ext.tuners import merge_prefix_projections as merge_prefix_projections
from hf_peft_ext.tuners import prune_bottlenecks as prune_bottlenecks
from hf_peft_ext.tuners import prune_ladder as prune_ladder
from hf_peft_ext.tuners import random_rank_pattern as random_rank_pattern
from hf_peft_ext.tuners import recommended_learning_rate as recommended_learning_rate
from hf_peft_ext.tuners import select_sparse_parameters as select_sparse_parameters
from hf_peft_ext.tuners import sparse_search as sparse_search

try:
    __version__ = version("hf_peft_ext")
except PackageNotFoundError:  # a bare checkout
    __version__ = "0+unknown"
