"""Compares methods on a user's own model and rows: which one to take."""

from hf_peft_ext.compare.comparison import compare as compare
from hf_peft_ext.compare.method_scores import MethodScores as MethodScores
from hf_peft_ext.compare.result import MethodComparison as MethodComparison
from hf_peft_ext.compare.settings import CompareArguments as CompareArguments
