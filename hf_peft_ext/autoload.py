"""Lets peft load adapters of this package in programs that do not import it.

peft looks up the method that adapter_config.json names, and finds ours only after `hf_peft_ext` is imported. Without
that import, loading ends in `KeyError: 'UNIPELT'`. `install_autoload()` writes two small files into the environment's
site-packages; from then on, importing peft there imports this package too.
"""

import sysconfig
from pathlib import Path

MODULE = "_hf_peft_ext_autoload"
CODE = '''"""Imports hf_peft_ext right after peft. Written by hf_peft_ext.install_autoload()."""

import importlib.util
import sys
import warnings


class AfterPeft:
    looking = False

    def find_spec(self, name, path=None, target=None):
        if name != "peft" or self.looking:
            return None
        self.looking = True  # the next line asks this finder, too
        try:
            spec = importlib.util.find_spec(name)
            ours = importlib.util.find_spec("hf_peft_ext")
        finally:
            self.looking = False
        if spec is None or ours is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            try:
                importlib.import_module("hf_peft_ext")
            except ImportError as error:
                warnings.warn(f"hf_peft_ext could not be imported after peft: {error}")

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, AfterPeft())
'''


def install_autoload(directory: str | Path | None = None) -> list[Path]:
    """From now on, `import peft` in this environment imports this package as well.

    Args:
        directory: the site-packages to write to; this environment's by default.

    Returns:
        The two files written.

    Raises:
        OSError: the directory cannot be written.
    """
    site = Path(directory or sysconfig.get_path("purelib"))
    module, start = site / f"{MODULE}.py", site / f"{MODULE}.pth"
    module.write_text(CODE, encoding="utf-8")
    start.write_text(f"import {MODULE}\n", encoding="utf-8")
    return [module, start]


def uninstall_autoload(directory: str | Path | None = None) -> None:
    """Undo `install_autoload`."""
    site = Path(directory or sysconfig.get_path("purelib"))
    for suffix in (".py", ".pth"):
        (site / f"{MODULE}{suffix}").unlink(missing_ok=True)
