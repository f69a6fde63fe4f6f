"""`hf-peft-ext to-lora` on adapters that recipes have trained, and on one without a recipe."""

import json

import pytest
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hf_peft_ext import UniPELTConfig
from hf_peft_ext.cli import app
from hf_peft_ext.recipes.model_rows import instruction_rows, ranked_row

from .methods import randomise
from .recipe_runs import FAST, classification, elsewhere, models, succeed  # noqa: F401
from .test_training import tokenizer

SHORT = ["--steps", "20", "--batch-size", "4", "--learning-rate", "1e-2", "--r", "4"]


def to_lora(*arguments):
    return CliRunner().invoke(app, ["to-lora", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture
def trained(tmp_path, models):  # noqa: F811
    """An adapter of a classifier, trained by a recipe at a high rate, so that it matters."""
    rows = [{"text": f"w{i} w{i % 7} w{i % 5}", "label": i % 2, "part": "ab"[i % 4 == 0]} for i in range(32)]
    recipe = classification(models, tmp_path, rows, split_column="part", train_split="a", eval_split="b")
    peft = "peft={peft_type: UNIPELT, task_type: SEQ_CLS, bottleneck_size: 4}"
    succeed(recipe, peft, *FAST, "learning_rate=0.1", "metrics=[accuracy]")
    return tmp_path / "out"


def test_with_the_recipe_beside_the_adapter(trained, tmp_path):
    """It names model, texts and rows to measure on; the LoRA has the record's labels, and a card."""
    result = to_lora(trained, tmp_path / "lora", *SHORT)
    assert result.exit_code == 0, (result.output, result.exception)
    lines = result.stdout.splitlines()
    assert lines[0].startswith("Distilled: ")
    assert lines[-2].startswith("accuracy: adapter ")
    assert lines[-1].startswith(f"LoRA of rank 4, distilled from UNIPELT, in {tmp_path / 'lora'}")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config["r"]) == ("LORA", "SEQ_CLS", 4)
    assert "Distilled from an adapter of UniPELT" in (tmp_path / "lora" / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "lora").pad_token

    result = to_lora(trained, tmp_path / "json", *SHORT, "--json")
    assert json.loads(result.stdout)["fidelity"]["kl"] > 0


def test_without_a_recipe(tmp_path, models):  # noqa: F811
    """The adapter's config names the model; the texts come from a file, and are needed."""
    base = AutoModelForCausalLM.from_pretrained(models["llama"])
    model = get_peft_model(base, UniPELTConfig(task_type="CAUSAL_LM", bottleneck_size=4, num_virtual_tokens=2))
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    result = to_lora(tmp_path / "adapter", tmp_path / "lora", *SHORT)
    assert result.exit_code == 2
    assert "`texts` (=None) must be given" in result.stderr
    file = tmp_path / "texts.csv"
    file.write_text("mail\n" + "".join(f"w{i} w{i + 1} w{i + 2} w{i % 5}\n" for i in range(400)))
    result = to_lora(tmp_path / "adapter", tmp_path / "lora", *SHORT, "--texts", file)
    assert "`column` (='text') must be a column of" in result.stderr
    result = to_lora(
        tmp_path / "adapter", tmp_path / "lora", *SHORT, "--steps", "60", "--texts", file, "--column", "mail"
    )
    assert result.exit_code == 0, (result.output, result.exception)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models["llama"]), tmp_path / "lora")


def test_errors(tmp_path):
    result = to_lora(tmp_path, tmp_path / "lora")
    assert result.exit_code == 2
    assert "must be a folder with adapter_config.json" in result.stderr


def test_rows_of_language_models():
    """The prompt of an instruction and of answer choices has no labels."""
    words = tokenizer()
    rows = Dataset.from_list([{"prompt": "w1 w2 ", "completion": "w3"}])
    (row,) = instruction_rows(rows, words, None)
    assert row["labels"][:2] == [-100, -100]
    assert row["labels"][2:] == row["input_ids"][2:]
    (row,) = instruction_rows(Dataset.from_list([{"text": "w1 w2"}]), words, None)
    assert row["labels"] == row["input_ids"]
    row = ranked_row({"prompt": "w1 w2", "choices": ["w3", "w4"], "answer": 1}, words, seq2seq=False)
    assert row["labels"][:2] == [-100, -100]
    assert row["labels"][2] == words("w4")["input_ids"][0]
    row = ranked_row({"prompt": "w1 w2", "choices": ["w3", "w4"], "answer": 1}, words, seq2seq=True)
    assert row["labels"][0] == words("w4")["input_ids"][0]
