"""Pushes of trainers, over HTTP to a small Hub on this machine: what arrives is looked at byte by byte.

The token given as `hub_token` is in no pushed file, in no file that is left on the disk, and no pickle is pushed.
"""

import io
import json
import zipfile

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel

from hf_peft_ext.hub_cards import PushError
from hf_peft_ext.trainers import AdapterTrainer

from .backbones import BACKBONES
from .hub_server import OWNER
from .test_training import classifier, tokenizer
from .test_trainers import losses, trainer, two_adapters

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning"),
]
REPO = "ann/adapter"
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "training_record.json", "README.md"}
FIGURES = {"figures/gates.png", "figures/losses.png"}
STATE = {"adapter_config.json", "adapter_model.safetensors", "training_record.json", "trainer_state.json"}


class Tagged(AdapterTrainer):
    _name = "Tagged"
    _tags = ("tagged",)


def pushing(folder, strategy="end", **kwargs):
    kwargs |= {"push_to_hub": True, "hub_model_id": REPO, "hub_strategy": strategy, "hub_token": OWNER}
    return trainer(folder, cls=Tagged, max_steps=8, save_steps=4, hub_always_push=True, logging_steps=2, **kwargs)


def texts(data):
    """The bytes of a file, and of all that is in it if it is an archive."""
    yield data
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            yield from (archive.read(name) for name in archive.namelist())


def no_token(files):
    for name, data in files.items():
        assert not any(OWNER.encode() in text for text in texts(data)), name


STRATEGIES = {
    "end": (set(), 1),
    "every_save": (set(), 3),
    "checkpoint": ({f"last-checkpoint/{name}" for name in STATE}, 3),
    "all_checkpoints": ({f"checkpoint-{step}/{name}" for step in (4, 8) for name in STATE}, 3),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies(strategy, hub, tmp_path):
    """Each `hub_strategy` pushes the adapter, its card and the state it promises; what arrives loads and is ours."""
    extra, commits = STRATEGIES[strategy]
    made = pushing(tmp_path / "run", strategy)
    made.train()
    made.push_to_hub(language="en", license="mit", tags="mine")
    files = hub.files(REPO)
    assert {*ADAPTER, *FIGURES} | extra == files.keys() - {".gitattributes"}
    no_token(files)
    no_token({str(path): path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()})
    assert len([m for _, m, _ in hub.repos[REPO].messages if m.startswith(("Training in", "End of"))]) == commits
    assert not any((tmp_path / "run" / "hub").rglob("*.*"))
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "peft"
    assert {"tagged", "mine"} <= set(card.data.tags)
    assert (card.data.language, card.data.license) == (["en"], "mit")
    assert REPO in card.text
    record = json.loads(files["training_record.json"])
    assert record["trainer"] == "Tagged"
    assert [entry["loss"] for entry in record["history"] if "loss" in entry] == list(losses(made).values())
    loaded = PeftModel.from_pretrained(classifier(), REPO).eval()
    inputs = BACKBONES["bert"].inputs()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, made.model.eval()(**inputs).logits)
