"""Plug-in transfer: adapters trained on a small model are carried to a large model that is not trained."""

from hf_peft_ext.pruning import Importance as Importance
from hf_peft_ext.pruning import PrunedModel as PrunedModel
from hf_peft_ext.pruning import importance as importance
from hf_peft_ext.pruning import pruned_copy as pruned_copy
from hf_peft_ext.pruning import pruned_sizes as pruned_sizes
from hf_peft_ext.transfer.bridges.bridge import bridge as bridge
from hf_peft_ext.transfer.bridges.delta import delta_bridge as delta_bridge
from hf_peft_ext.transfer.map.bake import merge_projections as merge_projections
from hf_peft_ext.transfer.map.plug import plug as plug
from hf_peft_ext.transfer.map.projections import Projections as Projections
from hf_peft_ext.transfer.refine.distillation import decide as decide
from hf_peft_ext.transfer.refine.mezo import MeZO as MeZO
from hf_peft_ext.transfer.refine.mezo import layer_scales as layer_scales
from hf_peft_ext.transfer.run.plug_in import plug_in as plug_in
from hf_peft_ext.transfer.run.result import PlugInResult as PlugInResult
from hf_peft_ext.transfer.run.settings import PlugInSettings as PlugInSettings
from hf_peft_ext.transfer.run.task import task_for as task_for
from hf_peft_ext.transfer.similarity import ModuleSimilarity as ModuleSimilarity
from hf_peft_ext.transfer.similarity import module_similarity as module_similarity
