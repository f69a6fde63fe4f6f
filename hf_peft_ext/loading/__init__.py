"""Loads adapters of strangers: everything is checked before anything is allocated or changed."""

from hf_peft_ext.loading.load import load_adapter as load_adapter
