"""`import hf_peft_ext` registers its types alone; (IA)^3, cards and pushes stay those of peft until the first use."""

import json
import subprocess
import sys

import pytest

from hf_peft_ext import registry

PROGRAM = """
import json, sys
from peft import PeftModel, PeftType, IA3Config
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS, PEFT_TYPE_TO_TUNER_MAPPING as TUNERS
NAMES = ("save_pretrained", "create_or_update_model_card", "push_to_hub")
stock = [getattr(PeftModel, name) for name in NAMES]

def taken():
    return [TUNERS[PeftType.IA3].__module__.split(".")[0] != "peft",
            *(getattr(PeftModel, name) is not method for name, method in zip(NAMES, stock))]

import hf_peft_ext
import hf_peft_ext.trainers
results = [taken(), "UNIPELT" in {kind.value for kind in CONFIGS}]
IA3Config()
results.append(taken())
%s
results.append(taken())
hf_peft_ext.extend_peft()
results.append(taken())
print(json.dumps(results))
"""
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


@pytest.mark.parametrize("use", USES)
def test_first_use(use):
    run = subprocess.run([sys.executable, "-c", PROGRAM % USES[use]], capture_output=True, text=True, check=True)
    nothing, everything = [False] * 4, [True] * 4
    assert json.loads(run.stdout.splitlines()[-1]) == [nothing, True, nothing, everything, everything]


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
