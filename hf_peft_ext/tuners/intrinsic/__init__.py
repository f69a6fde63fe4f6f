"""Intrinsic dimension: d trained numbers, projected onto all parameters of a model."""
