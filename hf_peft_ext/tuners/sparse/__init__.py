"""Sparse fine-tuning: a few entries of the base model's parameters are trained (FISH mask, LT-SFT, diff pruning)."""
