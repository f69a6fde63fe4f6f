"""Hybrid, few-shot and transfer methods for Hugging Face peft. Importing this package registers them."""

from importlib.metadata import PackageNotFoundError, version

from . import hub_cards as hub_cards  # from here on, adapters are saved and pushed with their cards
from .adapterhub import from_adapterhub as from_adapterhub
from .autoload import install_autoload as install_autoload
from .autoload import uninstall_autoload as uninstall_autoload
from .placement import Placement as Placement
from .prompts import PromptedDataset as PromptedDataset
from .prompts import PromptTemplate as PromptTemplate
from .prompts import evaluate_templates as evaluate_templates
from .prompts import load_templates as load_templates
from .rank_classification import RankClassifier as RankClassifier
from .rank_classification import score_choices as score_choices
from .safe_load import load_adapter as load_adapter
from .tuners import BitFitConfig as BitFitConfig
from .tuners import BottleneckConfig as BottleneckConfig
from .tuners import ComposedConfig as ComposedConfig
from .tuners import ComposedModel as ComposedModel
from .tuners import LadderConfig as LadderConfig
from .tuners import LayerPrefixConfig as LayerPrefixConfig
from .tuners import MAMConfig as MAMConfig
from .tuners import S4Config as S4Config
from .tuners import TFewConfig as TFewConfig
from .tuners import UniPELTConfig as UniPELTConfig
from .tuners import fix_gates as fix_gates
from .tuners import fold_prefixes as fold_prefixes
from .tuners import gate_values as gate_values
from .tuners import prune_ladder as prune_ladder

try:
    __version__ = version("hf_peft_ext")
except PackageNotFoundError:  # a bare checkout
    __version__ = "0+unknown"
