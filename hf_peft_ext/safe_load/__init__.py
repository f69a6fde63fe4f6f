"""Loads adapters of strangers: everything is checked before anything is allocated or changed."""
