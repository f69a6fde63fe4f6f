"""`hf-peft-ext memory` and `cost` with a model of the Hub: they download its config and no weights."""

import base64
import json

import pytest
from huggingface_hub import HfApi
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from hf_peft_ext.cli import app

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMANDS = {
    "memory": ["memory", "ann/llama", "--methods", "full,lora", "--length", "16", "--json"],
    "cost": [
        "cost",
        "--model",
        "ann/llama",
        "--prompted-model",
        "ann/llama",
        "--shots",
        "2",
        "--tokens-per-example",
        "5",
    ],
}


@pytest.fixture
def published(hub, tmp_path):
    """A repository with config and weights; the Hub, whose log is empty."""
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, pad_token_id=0, **SIZES))
    model.save_pretrained(tmp_path / "model")
    HfApi().create_repo("ann/llama")
    files = {path.name: base64.b64encode(path.read_bytes()) for path in (tmp_path / "model").iterdir()}
    assert "model.safetensors" in files
    lines = [{"key": "file", "value": {"path": name, "content": content}} for name, content in files.items()]
    hub.commit(hub.repos["ann/llama"], "main", "main", lines)
    hub.log.clear()
    return hub, sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("command", COMMANDS)
def test_only_the_config_is_downloaded(command, published):
    hub, parameters = published
    done = CliRunner().invoke(app, COMMANDS[command])
    assert done.exit_code == 0, done.output
    fetched = {line.split()[1].rpartition("/")[2] for line in hub.log if "/resolve/" in line}
    assert fetched == {"config.json"}
    if command == "memory":
        assert json.loads(done.stdout)["full fine-tuning"]["trained"] == parameters
    else:
        assert f"{parameters:,} parameters" in done.output


@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_that_is_not_there(command, hub):
    arguments = [argument.replace("ann/llama", "ann/nothing") for argument in COMMANDS[command]]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code in (1, 2)
    assert "ann/nothing" in done.output
    assert len(done.output.splitlines()) == 1
