"""Measures the intrinsic dimension of a task: how few numbers must be trained."""

from hf_peft_ext.intrinsic_dimension.measure import measure_intrinsic_dimension as measure_intrinsic_dimension
from hf_peft_ext.intrinsic_dimension.result import IntrinsicDimension as IntrinsicDimension
