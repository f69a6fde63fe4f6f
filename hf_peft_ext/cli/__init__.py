"""The command line as a module of the package, for `torchrun -m hf_peft_ext.cli train ...`; see `hf_peft_ext_cli`."""

from hf_peft_ext_cli import app

if __name__ == "__main__":
    app()
