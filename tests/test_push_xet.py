"""Pushing and pulling where the Hub stores large files by xet, and the command in a process of its own.

The contents of the store are read back from its xorbs and shards (xet_store.py), which hf_xet has filled.
"""

import os
import subprocess
import sys

import pytest
import torch
from huggingface_hub.utils import _xet
from peft import PeftModel
from safetensors.torch import load_file

from hf_peft_ext.hub_cards import PushError, publishable, push_adapter

from .backbones import BACKBONES
from .hub_server import STRANGER
from .test_push import adapter, logits, run

BERT = BACKBONES["bert"]
xet = pytest.mark.parametrize("hub", ["xet"], indirect=True)


@pytest.fixture(autouse=True)
def hf_xet(monkeypatch):
    """A session of hf_xet for each test, since it reads the environment once."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(_xet, "_GLOBAL_XET_HOLDER", _xet.XetSessionHolder())


@pytest.fixture
def folder(tmp_path):
    adapter().save_pretrained(str(tmp_path / "out"))
    return tmp_path / "out"


@xet
def test_push_and_pull(folder, hub):
    """The weights go as xorbs, none by LFS, and come back by them; what is there is not sent again."""
    push_adapter(folder, "ann/tiny", private=True, revision="next")
    files = hub.files("ann/tiny", "next")
    assert {name: (folder / name).read_bytes() for name in publishable(folder)}.items() <= files.items()
    assert hub.store.xorbs
    assert not hub.lfs
    pulled = PeftModel.from_pretrained(BERT.build(), "ann/tiny", revision="next")
    assert torch.equal(logits(pulled), logits(adapter()))
    assert any("/reconstructions/" in line for line in hub.log)
    adapter(seed=1).save_pretrained(str(folder))
    push_adapter(folder, "ann/tiny")
    assert torch.equal(logits(PeftModel.from_pretrained(BERT.build(), "ann/tiny")), logits(adapter(1)))


@xet
def test_pull_request(folder, hub):
    """Proposed by somebody without the right to write, and pulled by its number."""
    push_adapter(folder, "ann/tiny")
    adapter(seed=1).save_pretrained(str(folder))
    assert push_adapter(folder, "ann/tiny", token=STRANGER, create_pr=True).pr_revision == "refs/pr/1"
    pulled = PeftModel.from_pretrained(BERT.build(), "ann/tiny", revision="refs/pr/1")
    assert torch.equal(logits(pulled), logits(adapter(1)))


@xet
@pytest.mark.parametrize(
    "fault",
    [("POST /v1/xorbs/", "500"), ("POST /v1/xorbs/", "drop"), ("POST /v1/shards", "500"), ("GET .*xet-write", "500")],
    ids=["no xorbs", "lost in the middle of a xorb", "no shards", "no right to write"],
)
def test_a_push_goes_on_where_it_stopped(fault, folder, hub):
    """An outage of the store: the adapter is complete, the error says what to run, and that finishes."""
    before = {name: (folder / name).read_bytes() for name in publishable(folder)}
    hub.fail(*fault, times=20)
    with pytest.raises(PushError) as error:
        push_adapter(folder, "ann/tiny")
    assert {name: (folder / name).read_bytes() for name in publishable(folder)} == before
    assert hub.files("ann/tiny").keys() == {".gitattributes"}
    hub.faults.clear()
    code, text = run(str(error.value).partition("Run this to finish the push: ")[2])
    assert code == 0, text
    assert {name: (folder / name).read_bytes() for name in publishable(folder)}.items() <= hub.files(
        "ann/tiny"
    ).items()


# a process of its own

COMMAND = "from hf_peft_ext.cli import app; app()"
PULL = """
import sys
from peft import PeftModel
from safetensors.torch import save_file
from tests.test_push import BERT, logits

save_file({"logits": logits(PeftModel.from_pretrained(BERT.build(), "ann/tiny"))}, sys.argv[1])
"""


def python(code, *arguments, hub, home, **variables):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        env={**os.environ, **hub.environment(home), **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )


@xet
@pytest.mark.slow
def test_processes(hub, folder, tmp_path):
    """`hf-peft-ext push` in one process, PeftModel.from_pretrained in another, with the Hub named by HF_ENDPOINT."""
    pushed = python(COMMAND, "push", folder, "ann/tiny", "--private", hub=hub, home=tmp_path / "home")
    assert pushed.returncode == 0, pushed.stderr
    print("\n" + pushed.stdout)
    files = hub.files("ann/tiny")
    print("ann/tiny on the Hub:", *(f"{len(data):>9,} bytes  {name}" for name, data in files.items()), sep="\n")
    pulled = python(PULL, tmp_path / "logits", hub=hub, home=tmp_path / "another-home")
    assert pulled.returncode == 0, pulled.stderr
    assert torch.equal(load_file(tmp_path / "logits")["logits"], logits(adapter()))
    stranger = python(PULL, tmp_path / "x", hub=hub, home=tmp_path / "third-home", HF_TOKEN=STRANGER)
    assert "Can't find 'adapter_config.json' at 'ann/tiny'" in stranger.stderr
