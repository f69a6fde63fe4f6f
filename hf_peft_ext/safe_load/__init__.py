"""Loads adapters of strangers: everything is checked before anything is allocated or changed."""

from .load import load_adapter as load_adapter
