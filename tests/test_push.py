"""Pushing and pulling over HTTP, against a small Hub (hub_server.py): what arrives is the list, and loads as it was.

Every failure on the way must leave the adapter complete, say what to run, and be mended by running that.
"""

import io
import re
import zipfile
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import save_file

from hf_peft_ext.hub_cards import publishable, push_adapter

from .backbones import BACKBONES, output
from .hub_server import OWNER
from .methods import METHODS, randomise

BERT = BACKBONES["bert"]


def adapter(seed=0, method="unipelt", **kwargs):
    model = get_peft_model(BERT.build(), METHODS[method](**kwargs))
    randomise(model, seed=seed)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return output(model, BERT.inputs())


@pytest.fixture
def folder(tmp_path):
    """A saved adapter."""
    adapter().save_pretrained(str(tmp_path / "out"))
    return tmp_path / "out"


def contents(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# the list

PUBLISHED = [
    *("adapter_config.json", "adapter_model.safetensors", "README.md", "recipe.yaml", "training_record.json"),
    *("trainer_state.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"),
    *("merges.txt", "spiece.model", "chat_template.jinja", "additional_chat_templates/rag.jinja", "figures/loss.png"),
    *("second/adapter_config.json", "second/adapter_model.safetensors", "checkpoint-8/trainer_state.json"),
    *("checkpoint-8/adapter_model.safetensors",),
]
KEPT = [
    *("adapter_model.bin", "training_args.bin", "optimizer.pt", "optimizer.safetensors", "scheduler.pt", "loss.png"),
    *("rng_state.pth", "notes.txt", "train.log", ".env", ".cache/adapter_config.json", "a/.git/README.md", "run.py"),
    *("checkpoint-8/optimizer.pt", "checkpoint-8/training_args.bin", "runs/events.out.tfevents.1", "README.md.bak"),
]


def test_publishable(tmp_path):
    """The list, in every sub-folder."""
    for name in [*PUBLISHED, *KEPT]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert publishable(tmp_path) == sorted(PUBLISHED)


def test_links_out_of_the_folder_stay(tmp_path):
    """A link counts as what it leads to: inside, by that file's name; outside, never."""
    folder = tmp_path / "out"
    (folder / "checkpoint-8").mkdir(parents=True)
    outside = tmp_path / "README.md"
    for file in (outside, folder / "optimizer.pt", folder / "checkpoint-8" / "adapter_model.safetensors"):
        file.touch()
    (folder / "README.md").symlink_to(outside)
    (folder / "recipe.yaml").symlink_to(folder / "optimizer.pt")
    (folder / "vocab.txt").symlink_to(folder / "vocab.txt")
    (folder / "elsewhere").symlink_to(tmp_path, target_is_directory=True)
    (folder / "adapter_model.safetensors").symlink_to(Path("checkpoint-8") / "adapter_model.safetensors")
    assert publishable(folder) == ["adapter_model.safetensors", "checkpoint-8/adapter_model.safetensors"]
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    assert publishable(tmp_path / "link") == publishable(folder)


# refused before anything is sent

LOOKS_LIKE_A_TOKEN = "hf_" + "aB3" * 11 + "c"


def zipped(text):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.pkl", text)
    return buffer.getvalue()


SPOILT = {
    "training_record.json": (f'{{"command": "train --hub_token {LOOKS_LIKE_A_TOKEN}"}}'.encode(), "holds an access"),
    "recipe.yaml": (b"hub_token: canary", "holds an access token"),
    "checkpoint-8/trainer_state.json": (b'"canary"', "holds an access token"),
    "tokenizer_config.json": (b"hf_oauth_eyJhbGciOiJFZERTQSJ9.eyJzY29wZSI6WyJvcGVuaWQ", "holds an access token"),
    "chat_template.jinja": (zipped("canary"), "is no jinja file inside"),
    "checkpoint-8/adapter_model.safetensors": (zipped("canary"), "is no safetensors file inside"),
    "spiece.model": (b"\x80\x04pickled", "is no model file inside"),
    "figures/loss.png": (b"<svg/>", "is no png file inside"),
    "vocab.txt": (b"\xff\xfe", "is no txt file inside"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_file_with_a_token_or_with_other_contents_stops_the_push(name, folder, hub, monkeypatch):
    """The error names the file and does not repeat the token; nothing has been sent."""
    data, rule = SPOILT[name]
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)
    monkeypatch.setenv("HF_TOKEN", "canary")
    with pytest.raises(ValueError, match=re.escape(f"`file` (={name!r}) {rule}")) as error:
        push_adapter(folder, "ann/tiny")
    assert "canary" not in str(error.value)
    assert LOOKS_LIKE_A_TOKEN not in str(error.value)
    assert not hub.log


def test_the_token_given_is_looked_for_too(folder, hub):
    save_file({"x": torch.ones(1)}, folder / "more.safetensors", metadata={"note": "canary"})
    push_adapter(folder, "ann/tiny")
    with pytest.raises(ValueError, match=r"`file` \(='more.safetensors'\) holds an access token of the Hub"):
        push_adapter(folder, "ann/tiny", token="canary")
    with pytest.raises(ValueError, match=r"`commit_message` \(='...'\) must not hold an access token"):
        push_adapter(folder, "ann/tiny", commit_message=f"with {OWNER}")


def test_other_refusals(folder, hub, tmp_path):
    with pytest.raises(ValueError, match=r"`folder` \(='nowhere'\) must be a folder\."):
        push_adapter("nowhere", "ann/tiny")
    with pytest.raises(ValueError, match=r"must hold adapter_config.json and adapter_model.safetensors"):
        push_adapter(tmp_path / "out" / "figures" if (tmp_path / "out" / "figures").exists() else tmp_path, "ann/tiny")
    with pytest.raises(ValueError, match=r"`revision` \(='dev'\) must be None with `create_pr`"):
        push_adapter(folder, "ann/tiny", revision="dev", create_pr=True)
    with pytest.raises(ValueError, match="Repo id must"):
        push_adapter(folder, "../ann/tiny")
    assert not hub.log
