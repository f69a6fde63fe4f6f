"""The sub-layers and their gate: torch only, one formula a file.

A sub-layer knows nothing of models, adapters or peft; `hf_peft_ext.attach` attaches it to a module of the base model.
"""

from hf_peft_ext.sublayers.bias import Bias as Bias
from hf_peft_ext.sublayers.bottleneck import Bottleneck as Bottleneck
from hf_peft_ext.sublayers.coupling import Coupling as Coupling
from hf_peft_ext.sublayers.experts import ExpertSharing as ExpertSharing
from hf_peft_ext.sublayers.experts import MixtureBottleneck as MixtureBottleneck
from hf_peft_ext.sublayers.fusion import AdapterFusion as AdapterFusion
from hf_peft_ext.sublayers.fusion import AttentionFusion as AttentionFusion
from hf_peft_ext.sublayers.fusion import Fusion as Fusion
from hf_peft_ext.sublayers.gate import Additive as Additive
from hf_peft_ext.sublayers.gate import Gate as Gate
from hf_peft_ext.sublayers.intervention import Intervention as Intervention
from hf_peft_ext.sublayers.low_rank import LowRank as LowRank
from hf_peft_ext.sublayers.normed_bottleneck import NormedBottleneck as NormedBottleneck
from hf_peft_ext.sublayers.normed_bottleneck import OwnNorm as OwnNorm
from hf_peft_ext.sublayers.phm import PHMBottleneck as PHMBottleneck
from hf_peft_ext.sublayers.phm import PHMRule as PHMRule
from hf_peft_ext.sublayers.prefix import Prefix as Prefix
from hf_peft_ext.sublayers.prefix import PrefixForm as PrefixForm
from hf_peft_ext.sublayers.prefix import ProjectedPrefix as ProjectedPrefix
from hf_peft_ext.sublayers.prefix import Projection as Projection
from hf_peft_ext.sublayers.soft_prompt import PromptPosition as PromptPosition
from hf_peft_ext.sublayers.soft_prompt import SoftPrompt as SoftPrompt
