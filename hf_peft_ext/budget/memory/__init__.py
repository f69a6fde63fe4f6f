"""The memory of a training step, estimated on fake tensors."""

from hf_peft_ext.budget.memory.cards import CARDS as CARDS
from hf_peft_ext.budget.memory.estimate import MemoryEstimate as MemoryEstimate
from hf_peft_ext.budget.memory.estimate import estimate_memory as estimate_memory
from hf_peft_ext.budget.memory.side_by_side import compare_memory as compare_memory
