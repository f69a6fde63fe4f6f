"""Transfer of soft prompts between tasks: SPoT and intrinsic prompt tuning, on peft's prompt types."""

from hf_peft_ext.soft_prompts.subspace import PromptSubspace as PromptSubspace
from hf_peft_ext.soft_prompts.subspace import train_in_subspace as train_in_subspace
from hf_peft_ext.soft_prompts.transfer import init_prompt_from as init_prompt_from
from hf_peft_ext.soft_prompts.transfer import prompt_similarity as prompt_similarity
from hf_peft_ext.soft_prompts.transfer import read_prompt as read_prompt
