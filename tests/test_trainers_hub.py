"""Pushes of trainers, over HTTP to a small Hub on this machine: what arrives is looked at byte by byte.

The token given as `hub_token` is in no pushed file, in no file that is left on the disk, and no pickle is pushed.
"""

import io
import json
import zipfile

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, PeftModel

from hf_peft_ext.hub_cards import PushError
from hf_peft_ext.trainers import AdapterTrainer
from hf_peft_ext.trainers import pushing as pushing_module

from .backbones import BACKBONES
from .hub_server import OWNER
from .test_training import classifier
from .tiny_trainers import losses, trainer, two_adapters

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning"),
    # 2026-11: huggingface_hub 2.4 gives httpx2 the bytes of LFS files by an old name
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),
]
REPO = "ann/adapter"
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "training_record.json", "README.md"}
FIGURES = {"figures/gates.png", "figures/losses.png"}
STATE = {"adapter_config.json", "adapter_model.safetensors", "training_record.json", "trainer_state.json"}


@pytest.fixture(autouse=True)
def of_this_test(monkeypatch):
    """transformers keeps its client, with the address of the Hub of an earlier test."""
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)


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


@pytest.mark.parametrize(
    "strategy", [name if name == "checkpoint" else pytest.param(name, marks=pytest.mark.slow) for name in STRATEGIES]
)
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


@pytest.mark.slow
def test_a_failed_push_stops_no_training(hub, tmp_path, monkeypatch):
    """While training goes on a push that fails is a warning; the last one is an error that says what to run."""
    said = []
    monkeypatch.setattr(pushing_module.logger, "warning", said.append)
    made = pushing(tmp_path / "run", "every_save")
    hub.fail(f"POST /api/models/{REPO}/commit/.*", times=100)
    made.train()
    assert made.state.global_step == 8
    assert any("/hub/checkpoint-8" in text and "The push to ann/adapter failed" in text for text in said)
    with pytest.raises(
        PushError, match=r"The push to ann/adapter failed: .* hf-peft-ext push .*/run/hub/final ann/adapt"
    ):
        made.push_to_hub()
    assert {path.name for path in (tmp_path / "run" / "hub").iterdir()} == {"checkpoint-4", "checkpoint-8", "final"}
    no_token({str(path): path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()})
    hub.faults.clear()
    made.push_to_hub()
    files = hub.files(REPO)
    stored = (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    assert files["adapter_model.safetensors"] == stored


@pytest.mark.slow
def test_edits_of_the_card_are_kept(hub, tmp_path):
    """What an author has written into the card, here or on the Hub, is there after further training and pushes."""
    made = pushing(tmp_path / "run", "every_save")
    made.train()
    made.save_model()
    card = tmp_path / "run" / "README.md"
    card.write_text(card.read_text() + "\n\nWritten here by me.\n")
    made.push_to_hub(blocking=False).result()
    assert "Written here by me." in hub.files(REPO)["README.md"].decode()
    api = HfApi(token=OWNER)
    there = hub.files(REPO)["README.md"].decode() + "\n\nWritten on the Hub.\n"
    api.upload_file(path_or_fileobj=there.encode(), path_in_repo="README.md", repo_id=REPO)
    made.args.max_steps = 12
    made.train(resume_from_checkpoint=True)
    made.push_to_hub()
    text = hub.files(REPO)["README.md"].decode()
    assert "Written here by me." in text
    assert "Written on the Hub." in text


@pytest.mark.slow
def test_several_adapters_are_pushed(hub, tmp_path):
    """Each adapter goes into its own folder, the trained one with its record."""
    made = pushing(tmp_path / "run", model=two_adapters())
    made.train()
    made.push_to_hub()
    files = hub.files(REPO).keys()
    assert {f"second/{name}" for name in ADAPTER} <= files
    assert {"first/adapter_model.safetensors", "first/README.md"} <= files
    assert "first/training_record.json" not in files
    loaded = PeftModel.from_pretrained(classifier(), REPO, subfolder="second").eval()
    inputs = BACKBONES["bert"].inputs()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, made.model.eval()(**inputs).logits)


def test_the_card_can_be_asked_for_first(tmp_path):
    """`create_model_card` saves the adapter if it is not there; TRL asks for a card before each checkpoint."""
    made = trainer(tmp_path, cls=Tagged, max_steps=4)
    made.train()
    made.create_model_card(language="de", tasks="text-classification", dataset_tags=["acme/messages"])
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.language, card.data.pipeline_tag) == (["de"], "text-classification")
    assert "acme/messages" in card.data.datasets
    assert (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("cls", [AdapterTrainer, Tagged])
def test_cards_of_stock_types(cls, tmp_path):
    """An adapter of peft's own type gets our card, of which nothing is peft's; a checkpoint gets none."""
    classifier().save_pretrained(tmp_path / "base")
    model = type(classifier()).from_pretrained(tmp_path / "base")
    made = trainer(tmp_path / "run", LoraConfig(task_type="SEQ_CLS"), cls, model, max_steps=4, save_steps=2)
    made.train()
    assert not list((tmp_path / "run").rglob("README.md"))
    for mine in ([], ["mine"]):
        made.save_model()
        card = ModelCard.load(tmp_path / "run" / "README.md")
        tags = ["peft", "transformers", "lora", *cls._tags]
        assert sorted(card.data.tags) == sorted([*tags, *mine])
        assert card.data.base_model is None
        assert card.text.count("### Framework versions") == 1
        card.data.tags.append("mine")
        card.save(tmp_path / "run" / "README.md")
