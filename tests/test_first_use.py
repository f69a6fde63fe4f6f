"""`import hf_peft_ext` only registers its types; `PeftModel` and peft's (IA)^3 are unchanged until the first use."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from hf_peft_ext import registry

from .backbones import BACKBONES
from .methods import METHODS
from .test_safe_load import reweigh, saved

ROOT = Path(__file__).parents[1]

PROGRAM = """
import json, sys
from peft import PeftModel, PeftType, IA3Config
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS, PEFT_TYPE_TO_TUNER_MAPPING as TUNERS

def attributes():
    return {name: value for cls in reversed(PeftModel.__mro__) for name, value in vars(cls).items()}

def changed():
    now = attributes()
    names = [name for name in now.keys() | stock.keys() if now.get(name) is not stock.get(name)]
    return sorted(names) + ["IA3"] * (TUNERS[PeftType.IA3].__module__.split(".")[0] != "peft")

stock = attributes()
import hf_peft_ext
import hf_peft_ext.trainers
results = [changed(), "UNIPELT" in {kind.value for kind in CONFIGS}]
IA3Config()
results.append(changed())
%s
results.append(changed())
hf_peft_ext.extend_peft()
results.append(changed())
print(json.dumps(results))
"""
EVERYTHING = ["add_adapter", "create_or_update_model_card", "load_adapter", "push_to_hub", "save_pretrained", "IA3"]
USES = {
    "a config": "hf_peft_ext.UniPELTConfig()",
    "TFewConfig": "hf_peft_ext.TFewConfig()",
    "a call": "hf_peft_ext.extend_peft()",
    "load_adapter": """
try:
    hf_peft_ext.load_adapter(None, "")
except TypeError:
    pass
""",
}


SLOW_USES = ("TFewConfig", "a call")  # of which "a config" and "load_adapter" make use


@pytest.mark.parametrize("use", [pytest.param(use, marks=[pytest.mark.slow] * (use in SLOW_USES)) for use in USES])
def test_first_use(use):
    """Every attribute of PeftModel and its bases is compared."""
    assert run(PROGRAM % USES[use]) == [[], True, [], EVERYTHING, EVERYTHING]


LOADING = """
import json, sys
import torch
from peft import PeftModel
import hf_peft_ext
from tests.backbones import BACKBONES

extended = hasattr(PeftModel.load_adapter, "stock")

def refused(load):
    try:
        load()
    except ValueError as error:
        return "lacks tensors" in str(error)

def state(model):
    parameters = [(name, p.requires_grad, p.tolist()) for name, p in model.named_parameters()]
    hooks = [len(hooks) for m in model.modules() for key, hooks in vars(m).items() if key.endswith("_hooks")]
    return parameters, hooks, [(name, type(module)) for name, module in model.named_modules()]

"""
FROM_PRETRAINED = """
base = BACKBONES["llama"].build()
base.lm_head.requires_grad_(False)
before, method = state(base), vars(PeftModel)["from_pretrained"]
results = []
for _ in range(2):
    results.append(refused(lambda: PeftModel.from_pretrained(base, sys.argv[1])))
    results.append(state(base) == before)
print(json.dumps([extended, *results, vars(PeftModel)["from_pretrained"] is method]))
"""
UNPICKLED = """
model = torch.load(sys.argv[1] + "/model.pt", weights_only=False)
print(json.dumps([extended, refused(lambda: model.load_adapter(sys.argv[1], "second")), list(model.peft_config)]))
"""


@pytest.fixture
def incomplete(tmp_path):
    """A folder with an adapter's file that lacks a tensor, and with a pickled model."""
    saved(tmp_path, METHODS["unipelt"]())
    reweigh(tmp_path, lambda tensors: tensors.pop(sorted(tensors)[0]))
    torch.save(get_peft_model(BACKBONES["llama"].build(), METHODS["unipelt"]()), tmp_path / "model.pt")
    return tmp_path


def test_the_first_load_restores_the_base_model(incomplete):
    """In a new process the first use is the config that `from_pretrained` reads while it runs."""
    assert run(LOADING + FROM_PRETRAINED, incomplete) == [False, *[True] * 5]


def test_an_unpickled_model_checks_what_it_loads(incomplete):
    """Its first use is the unpickled config: pickle does not call `__post_init__`."""
    assert run(LOADING + UNPICKLED, incomplete) == [False, True, ["default"]]


def run(program, *args):
    """The last line that a new process prints, as JSON."""
    command = [sys.executable, "-c", program, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def test_changes_after_the_first_use_are_made_at_once():
    registry.extend_peft()
    made = []
    registry.on_first_use(lambda: made.append(1))
    registry.extend_peft()
    assert made == [1]


def test_a_change_that_fails_is_tried_again(monkeypatch):
    def fail():
        raise RuntimeError("taken")

    monkeypatch.setattr(registry, "_changes", [fail])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="taken"):
            registry.extend_peft()
