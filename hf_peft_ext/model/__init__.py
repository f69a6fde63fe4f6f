"""Reads a transformers model: its blocks, attention, leaves, and the sites where sub-layers can sit."""
