"""Checks of values, of config files, of patterns that match modules, and of folders; suggestions for wrong names."""
