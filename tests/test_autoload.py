"""`install_autoload` in fresh interpreters: what `import peft` knows with it, without it and after it is taken back.

Each test starts Python anew, with a temporary folder in the place of the environment's site-packages.
"""

import os
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model

from hf_peft_ext import install_autoload, uninstall_autoload

from .backbones import BACKBONES, output
from .methods import METHODS, randomise

KNOWS = """
import peft
print("UNIPELT" in peft.PeftType.__members__, "UNIPELT" in [t.value for t in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING])
"""


def python(site, code, **environment):
    """Run code in a new interpreter that treats `site` as a site-packages folder; its output, or its last error."""
    start = f"import site, sys; sys.path.insert(0, {str(site)!r}); site.addsitedir({str(site)!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", start + code],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def test_writes_two_files_and_takes_them_back(tmp_path):
    """A module and a .pth that imports it; uninstalling leaves the folder as it was, as often as one likes."""
    (tmp_path / "other.py").write_text("")
    module, start = install_autoload(tmp_path)
    assert module.parent == start.parent == tmp_path
    assert start.suffix == ".pth"
    assert start.read_text() == f"import {module.stem}\n"
    assert install_autoload(str(tmp_path)) == [module, start]
    uninstall_autoload(tmp_path)
    uninstall_autoload(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["other.py"]


def test_costs_nothing_without_peft(tmp_path):
    """An interpreter that never imports peft imports neither peft nor this package nor torch."""
    install_autoload(tmp_path)
    loaded = "import json; print([name for name in ('peft', 'torch', 'hf_peft_ext') if name in sys.modules])"
    assert python(tmp_path, loaded) == "[]"


def test_a_plain_import_of_peft_knows_the_methods(tmp_path):
    """After install_autoload, `import peft` registers the methods."""
    install_autoload(tmp_path)
    assert python(tmp_path, KNOWS) == "True True"


@pytest.mark.slow
def test_without_it_peft_does_not_know_them(tmp_path):
    """Before install_autoload and after uninstall_autoload, `import peft` knows peft's own methods only."""
    assert python(tmp_path, KNOWS) == "False False"
    install_autoload(tmp_path)
    uninstall_autoload(tmp_path)
    assert python(tmp_path, KNOWS) == "False False"


@pytest.mark.slow
def test_loading_needs_it(tmp_path):
    """Loading a saved adapter fails with peft's KeyError without the package; with autoload it works."""
    family, site = BACKBONES["bert"], tmp_path / "site"
    model = get_peft_model(family.build(), METHODS["unipelt"]())
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    family.build().save_pretrained(tmp_path / "base")
    torch.save(family.inputs(), tmp_path / "inputs.pt")
    load = f"""
import torch, transformers
from peft import PeftModel
base = transformers.AutoModel.from_pretrained({str(tmp_path / "base")!r})
model = PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r}).eval()
with torch.no_grad():
    y = model(**torch.load({str(tmp_path / "inputs.pt")!r})).last_hidden_state
torch.save(y, {str(tmp_path / "y.pt")!r})
"""
    site.mkdir()
    assert python(site, load) == "KeyError: 'UNIPELT'"
    install_autoload(site)
    python(site, load)
    with torch.no_grad():
        # another process, another number of threads: the last bit may differ
        torch.testing.assert_close(torch.load(tmp_path / "y.pt"), output(model.eval(), family.inputs()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "import hf_peft_ext, peft",
        "import transformers, peft",
        "import importlib.util; importlib.util.find_spec('peft'); import peft",
        "from transformers import Trainer; import peft",
        "from peft.tuners.lora import LoraConfig",
        "import importlib; importlib.import_module('peft.utils')",
    ],
)
def test_order_of_imports_does_not_matter(tmp_path, first):
    """Whichever way peft comes in first, the methods are registered once."""
    install_autoload(tmp_path)
    assert python(tmp_path, f"{first}\n{KNOWS}") == "True True"


@pytest.mark.slow
def test_package_gone(tmp_path):
    """Where the package was removed and the hook left behind, peft imports as ever."""
    install_autoload(tmp_path)
    hide = """
import importlib.util as util, sys
find = util.find_spec
util.find_spec = lambda name, *args: None if name == "hf_peft_ext" else find(name, *args)
"""
    assert python(tmp_path, hide + KNOWS) == "False False"


def test_default_folder_is_this_environments(monkeypatch, tmp_path):
    """Without an argument, the files go to the running interpreter's site-packages."""
    monkeypatch.setattr("sysconfig.get_path", lambda name: {"purelib": str(tmp_path)}[name])
    assert [file.parent for file in install_autoload()] == [tmp_path, tmp_path]
    uninstall_autoload()
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be_written(tmp_path):
    """A folder that is not there is an OSError, not silence."""
    with pytest.raises(OSError, match="missing"):
        install_autoload(tmp_path / "missing")
