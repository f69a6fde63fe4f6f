"""Pruned copies of models: scores of rows and columns, and a copy that has the best of them."""

from hf_peft_ext.pruning.channels import Channels as Channels
from hf_peft_ext.pruning.channels import find_channels as find_channels
from hf_peft_ext.pruning.importance import Importance as Importance
from hf_peft_ext.pruning.importance import importance as importance
from hf_peft_ext.pruning.prune import PrunedModel as PrunedModel
from hf_peft_ext.pruning.prune import pruned_copy as pruned_copy
from hf_peft_ext.pruning.pruned_config import PrunedSizes as PrunedSizes
from hf_peft_ext.pruning.pruned_config import pruned_config as pruned_config
from hf_peft_ext.pruning.pruned_config import pruned_sizes as pruned_sizes
