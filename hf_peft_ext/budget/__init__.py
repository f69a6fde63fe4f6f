"""What training and inference cost: memory, operations, money."""

from hf_peft_ext.budget.allocation import BudgetAllocation as BudgetAllocation
from hf_peft_ext.budget.annotation import AnnotationPlan as AnnotationPlan
from hf_peft_ext.budget.annotation import label_or_distil as label_or_distil
from hf_peft_ext.budget.annotation_inputs import AnnotationInputs as AnnotationInputs
from hf_peft_ext.budget.flops import FlopCount as FlopCount
from hf_peft_ext.budget.flops import count_flops as count_flops
from hf_peft_ext.budget.flops import kv_cache_bytes as kv_cache_bytes
from hf_peft_ext.budget.flops import rule_flops as rule_flops
from hf_peft_ext.budget.in_context import CostComparison as CostComparison
from hf_peft_ext.budget.in_context import CostReport as CostReport
from hf_peft_ext.budget.in_context import Workload as Workload
from hf_peft_ext.budget.in_context import compare_by_count as compare_by_count
from hf_peft_ext.budget.in_context import compare_by_rule as compare_by_rule
from hf_peft_ext.budget.in_context import compare_with_in_context as compare_with_in_context
from hf_peft_ext.budget.learning_curves import LearningCurve as LearningCurve
from hf_peft_ext.budget.learning_curves import fit_curve as fit_curve
from hf_peft_ext.budget.memory import MemoryEstimate as MemoryEstimate
from hf_peft_ext.budget.memory import compare_memory as compare_memory
from hf_peft_ext.budget.memory import estimate_memory as estimate_memory
