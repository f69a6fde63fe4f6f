"""Checks of values, of configs from files and of patterns that name modules."""
