"""Pushing and pulling over HTTP, against a small Hub (hub_server.py): what arrives is the list, and loads as it was.

Every failure on the way must leave the adapter complete, say what to run, and be mended by running that.
"""

import io
import re
import shlex
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import TrainingArguments
from typer.testing import CliRunner

from hf_peft_ext.cli import app
from hf_peft_ext.hub_cards import PushError, publishable, push_adapter

from .backbones import BACKBONES, output
from .hub_server import OWNER, STRANGER
from .methods import METHODS, randomise

# 2026-11: huggingface_hub 2.4 gives httpx2 the bytes of LFS files by an old name
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

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
    *(
        "merges.txt",
        "spiece.model",
        "source.spm",
        "chat_template.jinja",
        "additional_chat_templates/rag.jinja",
        "figures/loss.png",
    ),
    *("second/adapter_config.json", "second/adapter_model.safetensors", "second/trainer_state.json"),
    *("last-checkpoint/adapter_model.safetensors",),
]
KEPT = [
    *("adapter_model.bin", "training_args.bin", "optimizer.pt", "optimizer.safetensors", "scheduler.pt", "loss.png"),
    *("rng_state.pth", "notes.txt", "train.log", ".env", ".cache/adapter_config.json", "a/.git/README.md", "run.py"),
    *("second/optimizer.pt", "second/training_args.bin", "runs/events.out.tfevents.1", "README.md.bak"),
    *("checkpoint-8/README.md", "checkpoint-8/second/adapter_model.safetensors", "unfinished/checkpoint-9/README.md"),
    *("hub/final/adapter_model.safetensors", "hub/checkpoint-8/checkpoint-8/trainer_state.json"),
]


def test_publishable(tmp_path):
    """The list, in every sub-folder."""
    for name in [*PUBLISHED, *KEPT]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert publishable(tmp_path) == sorted(PUBLISHED)
    assert publishable(tmp_path / "hub" / "checkpoint-8") == ["checkpoint-8/trainer_state.json"]  # as it was staged
    assert publishable(tmp_path / "checkpoint-8") == ["README.md", "second/adapter_model.safetensors"]


def test_an_adapter_named_hub_is_published(tmp_path):
    model = get_peft_model(BERT.build(), METHODS["bitfit"](), adapter_name="hub")
    model.save_pretrained(str(tmp_path))
    assert {"hub/adapter_config.json", "hub/adapter_model.safetensors"} <= {*publishable(tmp_path)}


def test_links_out_of_the_folder_stay(tmp_path):
    """A link counts as what it leads to: inside, by that file's name; outside, never."""
    folder = tmp_path / "out"
    (folder / "second").mkdir(parents=True)
    outside = tmp_path / "README.md"
    for file in (outside, folder / "optimizer.pt", folder / "second" / "adapter_model.safetensors"):
        file.touch()
    (folder / "README.md").symlink_to(outside)
    (folder / "recipe.yaml").symlink_to(folder / "optimizer.pt")
    (folder / "vocab.txt").symlink_to(folder / "vocab.txt")
    (folder / "elsewhere").symlink_to(tmp_path, target_is_directory=True)
    (folder / "adapter_model.safetensors").symlink_to(Path("second") / "adapter_model.safetensors")
    assert publishable(folder) == ["adapter_model.safetensors", "second/adapter_model.safetensors"]
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
    "second/trainer_state.json": (b'"canary"', "holds an access token"),
    "tokenizer_config.json": (b"hf_oauth_eyJhbGciOiJFZERTQSJ9.eyJzY29wZSI6WyJvcGVuaWQ", "holds an access token"),
    "chat_template.jinja": (zipped("canary"), "is no jinja file inside"),
    "second/adapter_model.safetensors": (zipped("canary"), "is no safetensors file inside"),
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


def test_invalid_metadata(folder, hub):
    """What the Hub says of a card's metadata is raised before a file is sent."""
    (folder / "README.md").write_text("---\nbase_model: /data/models/bert\n---\n")
    with pytest.raises(ValueError, match="\"base_model\" with value '/data/models/bert' is not valid"):
        push_adapter(folder, "ann/tiny")
    assert hub.files("ann/tiny").keys() == {".gitattributes"}


def test_other_refusals(folder, hub, tmp_path):
    with pytest.raises(ValueError, match=r"`folder` \(='nowhere'\) must be a folder\."):
        push_adapter("nowhere", "ann/tiny")
    (tmp_path / "only-pickled").mkdir()
    (tmp_path / "only-pickled" / "adapter_config.json").touch()
    (tmp_path / "only-pickled" / "adapter_model.bin").touch()
    with pytest.raises(
        ValueError, match=r"only-pickled'\) must hold adapter_config.json and adapter_model.safetensors"
    ):
        push_adapter(tmp_path / "only-pickled", "ann/tiny")
    with pytest.raises(ValueError, match=r"`revision` \(='dev'\) must be None with `create_pr`"):
        push_adapter(folder, "ann/tiny", revision="dev", create_pr=True)
    with pytest.raises(ValueError, match="Repo id must"):
        push_adapter(folder, "../ann/tiny")
    assert not hub.log


@pytest.mark.parametrize("base", ["/data/models/bert", "./bert", "models/bert/base"])
def test_a_base_model_of_this_machine_is_pointed_out(base, folder, hub):
    """The config is pushed as it stands, with a warning that says what others will miss."""
    config = folder / "adapter_config.json"
    config.write_text(
        config.read_text().replace('"base_model_name_or_path": null', f'"base_model_name_or_path": "{base}"')
    )
    with pytest.warns(
        UserWarning, match=rf"`base_model_name_or_path` \(='{base}'\) in adapter_config.json is a path of"
    ):
        push_adapter(folder, "ann/tiny")
    assert hub.files("ann/tiny")["adapter_config.json"] == config.read_bytes()


# there and back


def test_what_is_pushed_is_the_list_and_loads_as_it_was(folder, hub):
    """The files arrive byte for byte, in one commit, and give the same logits."""
    (folder / "figures").mkdir(exist_ok=True)
    (folder / "figures" / "loss.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for name in KEPT:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"kept")
    info = push_adapter(folder, "tiny", commit_message="First", commit_description="trained\nfor long")
    assert info.commit_url.startswith(f"{hub.url}/ann/tiny/commit/")
    pushed = hub.files("ann/tiny")
    print("\nann/tiny on the Hub:", *(f"{len(data):>9,} bytes  {name}" for name, data in pushed.items()), sep="\n")
    pushed.pop(".gitattributes")
    assert pushed == {name: (folder / name).read_bytes() for name in publishable(folder)}
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "figures/loss.png"} <= pushed.keys()
    assert hub.repos["ann/tiny"].messages == [("main", "First", "trained\nfor long")]
    assert not hub.repos["ann/tiny"].private
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(BERT.build(), "ann/tiny")), logits(adapter()), rtol=0, atol=0
    )


def test_a_recipe_is_pushed_without_local_paths(folder, hub):
    """The file in the folder keeps the paths that repeat the run. Without such paths it goes as it is."""
    (folder / "recipe.yaml").write_text("# mine\nmodel: acme/tiny\n")
    push_adapter(folder, "ann/tiny")
    assert hub.files("ann/tiny")["recipe.yaml"] == b"# mine\nmodel: acme/tiny\n"
    (folder / "recipe.yaml").write_text("model: /home/somebody/models/tiny\n")
    push_adapter(folder, "ann/tiny")
    assert hub.files("ann/tiny")["recipe.yaml"] == b"model: tiny\n"
    assert "somebody" in (folder / "recipe.yaml").read_text()


def test_pushing_the_same_again_commits_nothing(folder, hub):
    first = push_adapter(folder, "ann/tiny")
    assert push_adapter(folder, "ann/tiny").oid == first.oid
    assert len(hub.repos["ann/tiny"].commits) == 2


def secrets_in(files, canary):
    """Files that hold the canary, archives opened."""
    found = []
    for name, data in files.items():
        inside = {}
        if zipfile.is_zipfile(io.BytesIO(data)):
            archive = zipfile.ZipFile(io.BytesIO(data))
            inside = {f"{name}/{part}": archive.read(part) for part in archive.namelist()}
        found += [part for part, content in {name: data, **inside}.items() if canary in content]
    return found


def test_no_token_is_pushed(folder, hub, tmp_path):
    """A token in Trainer's pickled arguments (and elsewhere in the folder) is in nothing that has been sent."""
    canary = "hf_canarycanarycanarycanarycanarycana"
    hub.users[canary] = "ann"
    arguments = TrainingArguments(str(tmp_path / "run"), hub_token=canary, report_to=[], use_cpu=True)
    for home in (folder, folder / "checkpoint-8"):
        home.mkdir(exist_ok=True)
        torch.save(arguments, home / "training_args.bin")
        torch.save({"note": canary}, home / "optimizer.pt")
    (folder / ".env").write_text(f"HF_TOKEN={canary}")
    there = secrets_in(contents(folder), canary.encode())  # the search finds what is there
    assert {".env", "optimizer.pt/optimizer/data.pkl", "checkpoint-8/training_args.bin/training_args/data.pkl"} <= {
        *there
    }
    push_adapter(folder, "ann/tiny", token=canary)
    assert "adapter_model.safetensors" in hub.files("ann/tiny")
    assert secrets_in(hub.files("ann/tiny"), canary.encode()) == []
    assert secrets_in(dict(enumerate(hub.bodies)), canary.encode()) == []


def test_branches(folder, hub):
    """A branch is made from the main one if it is missing; `revision` pulls from it."""
    push_adapter(folder, "ann/tiny", revision="next")
    assert hub.files("ann/tiny").keys() == {".gitattributes"}
    adapter(seed=1).save_pretrained(str(folder))
    push_adapter(folder, "ann/tiny", revision="after/one")
    push_adapter(folder, "ann/tiny", revision="main")
    for revision, seed in {"next": 0, "after/one": 1, "main": 1}.items():
        pulled = PeftModel.from_pretrained(BERT.build(), "ann/tiny", revision=revision)
        assert torch.equal(logits(pulled), logits(adapter(seed)))
    first = push_adapter(folder, "ann/tiny", revision="next").oid
    adapter(seed=2).save_pretrained(str(folder))
    push_adapter(folder, "ann/tiny", revision="next")
    assert torch.equal(logits(PeftModel.from_pretrained(BERT.build(), "ann/tiny", revision=first)), logits(adapter(1)))


def test_private_repositories(folder, hub, monkeypatch):
    """Only their owner sees them; one that exists stays as public or private as it is."""
    push_adapter(folder, "ann/tiny", private=True)
    push_adapter(folder, "ann/tiny", private=False)
    assert hub.repos["ann/tiny"].private
    monkeypatch.delenv("HF_TOKEN")
    for token in (None, STRANGER):
        with pytest.raises((RepositoryNotFoundError, ValueError)):
            PeftModel.from_pretrained(BERT.build(), "ann/tiny", token=token)
    assert torch.equal(logits(PeftModel.from_pretrained(BERT.build(), "ann/tiny", token=OWNER)), logits(adapter()))
    with pytest.raises(PushError, match="Run this to finish the push"):
        push_adapter(folder, "ann/tiny", token=STRANGER)


def test_pull_requests(folder, hub):
    """Anybody may open one; it can be pulled, pushed to by the owner, and leaves the main branch alone."""
    push_adapter(folder, "ann/tiny")
    adapter(seed=1).save_pretrained(str(folder))
    with pytest.raises(PushError, match="no right to write"):
        push_adapter(folder, "ann/tiny", token=STRANGER)
    info = push_adapter(folder, "ann/tiny", token=STRANGER, create_pr=True, commit_message="Better")
    assert (info.pr_num, info.pr_revision, info.pr_url) == (1, "refs/pr/1", f"{hub.url}/ann/tiny/discussions/1")
    assert hub.repos["ann/tiny"].messages[-1] == ("refs/pr/1", "Better", "")
    for revision, seed in {"main": 0, "refs/pr/1": 1}.items():
        pulled = PeftModel.from_pretrained(BERT.build(), "ann/tiny", revision=revision)
        assert torch.equal(logits(pulled), logits(adapter(seed)))
    adapter(seed=2).save_pretrained(str(folder))
    assert push_adapter(folder, "ann/tiny", revision="refs/pr/1").pr_url is None
    pulled = PeftModel.from_pretrained(BERT.build(), "ann/tiny", revision="refs/pr/1")
    assert torch.equal(logits(pulled), logits(adapter(2)))


# what goes wrong on the way

FAULTS = {
    "no repository": ("POST /api/repos/create", "500"),
    "no branch": ("POST /api/models/ann/tiny/branch", "500"),
    "card not checked": ("POST /api/validate-yaml", "500"),
    "no upload": ("POST .*/preupload/", "500"),
    "lost before the weights": ("POST .*/lfs/objects/batch", "drop"),
    "no weights": ("PUT /lfs/", "500"),
    "lost in the middle of the weights": ("PUT /lfs/", "drop"),
    "lost after the weights": ("PUT /lfs/", "deaf"),
    "no commit": ("POST .*/commit/", "500"),
    "lost in the middle of the commit": ("POST .*/commit/", "drop"),
    "lost after the commit": ("POST .*/commit/", "deaf"),
}


def run(command):
    """A command line as an error gives it; its exit code and its output."""
    program, *words = shlex.split(command)
    assert program == "hf-peft-ext"
    result = CliRunner().invoke(app, words, terminal_width=200)
    return result.exit_code, result.output


@pytest.fixture
def patient(monkeypatch):
    """huggingface_hub waits between its attempts; not here."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_push_goes_on_where_it_stopped(fault, folder, hub, patient):
    """An outage longer than the library's own attempts: the folder is as it was, and the error's command finishes."""
    before = contents(folder)
    hub.fail(*FAULTS[fault], times=6)
    with pytest.raises(PushError) as error:
        push_adapter(folder, "ann/tiny", revision="next", private=True, commit_message="It's done")
    assert contents(folder) == before
    message, _, command = str(error.value).partition("Run this to finish the push: ")
    assert message.endswith(f"The adapter is complete in {folder}. ")
    expected = f"hf-peft-ext push {folder} ann/tiny --revision next --private --commit-message 'It'\"'\"'s done'"
    assert command == expected
    hub.faults.clear()
    sent = len([line for line in hub.log if line.startswith("PUT /lfs/") and line.endswith("200")])
    code, text = run(command)
    assert code == 0, text
    arrived = hub.files("ann/tiny", "next")
    assert arrived.keys() - {".gitattributes"} == set(publishable(folder))
    assert all(arrived[name] == (folder / name).read_bytes() for name in publishable(folder))
    assert hub.repos["ann/tiny"].private
    if fault in ("no commit", "lost in the middle of the commit", "lost after the commit", "lost after the weights"):
        uploads = [line for line in hub.log if line.startswith("PUT /lfs/") and line.endswith("200")]
        assert len(uploads) == sent  # not sent again


@pytest.mark.parametrize("kind", ["500", "drop"])
def test_a_short_outage_is_not_noticed(kind, folder, hub, patient):
    hub.fail("PUT /lfs/", kind, times=2)
    push_adapter(folder, "ann/tiny")
    assert torch.equal(logits(PeftModel.from_pretrained(BERT.build(), "ann/tiny")), logits(adapter()))


def test_a_hub_that_cannot_be_reached(folder, hub):
    hub.__exit__()
    with pytest.raises(PushError, match=r"Connection refused.*Run this to finish the push: hf-peft-ext push"):
        push_adapter(folder, "ann/tiny")


def test_a_wrong_token(folder, hub):
    with pytest.raises(PushError, match=r"Invalid username or password.*Run this to finish the push"):
        push_adapter(folder, "ann/tiny", token="hf_wrong")
