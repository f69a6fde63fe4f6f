"""Loads untrusted adapters: every file is checked before memory is allocated or the model changed."""

from hf_peft_ext.loading.load import load_adapter as load_adapter
