"""The command line `hf-peft-ext`: its commands and their options.

This package is beside `hf_peft_ext`, since `import hf_peft_ext` imports torch and transformers, which takes seconds.
Each command imports its modules when it runs; `--help` and `--version` import none.
"""

# isort: off
# in the order in which `--help` lists the commands
from hf_peft_ext_cli import training as training
from hf_peft_ext_cli import planning as planning
from hf_peft_ext_cli import adapters as adapters
from hf_peft_ext_cli.app import app as app
