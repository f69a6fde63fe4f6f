"""The commands of `hf-peft-ext`, each in a module imported when it runs; `hf_peft_ext_cli` has their options."""

from hf_peft_ext_cli import app as app
