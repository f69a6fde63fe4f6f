"""Ranks answer choices: encoding, packing, T-Few's losses, the classifier and its metrics."""
