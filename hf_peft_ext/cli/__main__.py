"""`python -m hf_peft_ext.cli` is `hf-peft-ext`, for `torchrun` and `accelerate launch`."""

from hf_peft_ext.cli import app

app()
