"""Recipes run through the real command, on tiny models."""

import json
from pathlib import Path

import datasets
import pytest
import yaml
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from hf_peft_ext.cli import app

from .backbones import BACKBONES
from .test_training import tokenizer

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
FAST = [
    *("training.use_cpu=true", "max_steps=3", "logging_steps=1", "eval_strategy=no", "save_strategy=no"),
    *("load_best_model_at_end=false", "disable_tqdm=true"),
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Recipes name files from the root of the repository; what `datasets` keeps goes away with the test."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders with tiny models and a tokenizer: bert, llama, t5."""
    found = {}
    for name in ("bert", "llama", "t5"):
        found[name] = str(tmp_path_factory.mktemp(name))
        wide = {"hidden_size": 64, "intermediate_size": 128} if name == "llama" else {}  # 4-bit blocks are 64 wide
        BACKBONES[name].build(**wide).save_pretrained(found[name])
        words = tokenizer()
        words.chat_template = CHAT
        words.save_pretrained(found[name])
    return found


@pytest.fixture
def chats(tmp_path):
    """A file of chats, in two splits."""
    file = tmp_path / "chats.jsonl"
    turn = [{"role": "user", "content": "w1 w2 w3"}, {"role": "assistant", "content": "w4 w5 w6 w7"}]
    file.write_text("".join(json.dumps({"messages": turn, "part": part}) + "\n" for part in ("a", "a", "a", "b", "b")))
    return f"data={{data_files: {file}, messages_column: messages, split_column: part, train_split: a, eval_split: b}}"


def run(*arguments):
    return CliRunner().invoke(app, ["train", *map(str, arguments)], env={"COLUMNS": "200"})


def succeed(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def text_classifier(folder, labels=8):
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels)


def classification(models, tmp_path, rows, **data):
    """A recipe for rows of one's own, and its path."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": {"model_name_or_path": models["bert"]},
        "peft": {"peft_type": "BITFIT", "task_type": "SEQ_CLS"},
        "data": {"data_files": str(tmp_path / "rows.jsonl"), **data},
        "training": {"output_dir": str(tmp_path / "out"), "use_cpu": True},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path / "recipe.yaml"
