"""PeftModel's own `save_pretrained` and `push_to_hub` with adapters of ours, against peft's stock ones with others.

Over HTTP, against a small Hub (hub_server.py).
"""

import base64
import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from hf_peft_ext import UniPELTConfig, load_adapter
from hf_peft_ext.cli import app
from hf_peft_ext.hub_cards import CardWarning, PushError, write_card
from hf_peft_ext.hub_cards.peft_integration import published_cards
from hf_peft_ext.registry import extend

from .backbones import BACKBONES
from .hub_server import OWNER
from .methods import METHODS, randomise
from .test_push import adapter, contents, logits, run

# 2026-11: huggingface_hub 2.4 gives httpx2 the bytes of LFS files by an old name
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

BERT = BACKBONES["bert"]


def lora():
    return get_peft_model(BERT.build(), LoraConfig(r=2))


def two_adapters(first="default"):
    model = get_peft_model(BERT.build(), METHODS["unipelt"](), adapter_name=first)
    model.add_adapter("other", METHODS["unipelt"]())
    randomise(model, first, seed=0)
    randomise(model, "other", seed=1)
    return model.eval()


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where temporary folders are made."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


# save_pretrained


def test_saving_writes_our_card(tmp_path):
    """A card beside the adapter, without peft's blanks, from the rank that saves alone."""
    adapter().save_pretrained(str(tmp_path / "out"))
    text = (tmp_path / "out" / "README.md").read_text()
    assert "import hf_peft_ext" in text
    assert "[More Information Needed]" not in text
    assert ModelCard(text).data.library_name == "peft"
    adapter().save_pretrained(str(tmp_path / "rank1"), is_main_process=False)
    assert not (tmp_path / "rank1" / "README.md").exists()


def test_saving_again_keeps_edits(tmp_path):
    """A section that the author has added stays, through a second save and through peft's own request for a card."""
    model = adapter()
    model.save_pretrained(str(tmp_path))
    path = tmp_path / "README.md"
    path.write_text(path.read_text() + "\n## Intended use\n\nFor Ann's letters.\n")
    model.save_pretrained(str(tmp_path))
    model.create_or_update_model_card(str(tmp_path))
    assert "## Intended use\n\nFor Ann's letters." in path.read_text()
    assert path.read_text().count("import hf_peft_ext") == 1


def test_what_lay_there_before_does_not_matter(tmp_path):
    """Saved over a file that a process left half written, and over an adapter of another method."""
    adapter(method="bitfit").save_pretrained(str(tmp_path))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"half")
    adapter().save_pretrained(str(tmp_path))
    assert torch.equal(logits(PeftModel.from_pretrained(BERT.build(), str(tmp_path))), logits(adapter()))
    assert "# UniPELT adapter" in (tmp_path / "README.md").read_text()


def test_no_card_before_there_is_an_adapter(tmp_path):
    adapter().create_or_update_model_card(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_several_adapters(tmp_path):
    """Each has its card beside it; selected ones alone are written; the first page leads to the others."""
    model = two_adapters()
    model.save_pretrained(str(tmp_path / "both"))
    cards = {path.relative_to(tmp_path / "both").as_posix() for path in (tmp_path / "both").rglob("README.md")}
    assert cards == {"README.md", "other/README.md"}
    model.save_pretrained(str(tmp_path / "one"), selected_adapters=["other"])
    assert (tmp_path / "one" / "other" / "README.md").exists()
    assert "[other](other/README.md)" in (tmp_path / "one" / "README.md").read_text()


# README.md as it was found -> what is wrong with it
BROKEN = {
    b"---\nlicense: llama-2-community\n---\n# Mine\n": r"`license` \(='llama-2-community'\) must be an identifier",
    b"---\nlicense: [[mit]]\n---\n": r"`license` \(=\['mit'\]\) must be an identifier",
    b"---\nlanguage: no\n---\n": r"`language` \(=False\) must be an ISO 639 code.*; in YAML, write no as 'no'",
    b"---\nlanguage: {en: true}\n---\n": r"`language` \(={'en': True}\) must be an ISO 639 code",
    b"---\nbase_model: ./models/x\n---\n": r"`base_model` \(='./models/x'\) must be an id on the Hub",
    b"---\ndatasets:\n- my data\n---\n": r"`datasets` \(='my data'\) must be an id on the Hub",
    b"---\npipeline_tag: [x]\n---\n": r"`pipeline_tag` \(=\['x'\]\) must be a task",
    b"---\ntags: 5\n---\n": r"`tags` \(=5\) must be words",
    b"---\nno: 5\n---\n": r"`metadata` \(=False\) must have words for keys",
    b"---\nlicense: [\n---\n": "The metadata of the card .* is not valid YAML",
    b"---\ndate: 2026-99-99\n---\n": "The metadata of the card .* is not valid YAML: month",
    b"---\n\nAn introduction.\n\n---\n# Mine\n": "The metadata of the card .* must be a mapping, not str",
    "# Für Ann\n".encode("latin-1"): "README.md is not UTF-8: .* at byte 3",
}


@pytest.mark.parametrize("content", BROKEN)
def test_a_card_that_cannot_be_renewed_is_a_warning(tmp_path, content):
    """The weights are saved, the text stays as it was, and the other adapter gets its card. By itself, an error."""
    (tmp_path / "README.md").write_bytes(content)
    model = two_adapters()
    expected = rf"^The adapter 'default' is saved in {re.escape(str(tmp_path))}, but .*: {BROKEN[content]}"
    with pytest.warns(CardWarning, match=f"(?s){expected}") as warned:
        model.save_pretrained(str(tmp_path))
    assert [warning.filename for warning in warned] == [__file__]
    assert torch.equal(logits(PeftModel.from_pretrained(BERT.build(), str(tmp_path))), logits(model))
    assert (tmp_path / "README.md").read_bytes() == content
    assert "# UniPELT adapter" in (tmp_path / "other" / "README.md").read_text()
    with pytest.raises(ValueError, match=f"(?s)^{BROKEN[content]}"):
        write_card(tmp_path)


@pytest.mark.parametrize("content", [b"---\n\n---\n# Mine\n", b"# Mine\n", b""])
def test_a_card_without_metadata_is_renewed(tmp_path, content):
    (tmp_path / "README.md").write_bytes(content)
    adapter().save_pretrained(str(tmp_path))
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "peft"


# other adapters


def test_other_adapters_keep_peft_s_methods(tmp_path, hub):
    """A LoRA is saved and pushed as without this package."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("save_pretrained", "create_or_update_model_card", "push_to_hub"):
            patch.setattr(PeftModel, name, vars(getattr(PeftModel, name))["stock"])
        lora().save_pretrained(str(tmp_path / "stock"))
        torch.manual_seed(0)
        lora().push_to_hub("ann/stock")
    lora().save_pretrained(str(tmp_path / "ours"))
    lora().push_to_hub("ann/ours")
    assert contents(tmp_path / "ours")["README.md"] == contents(tmp_path / "stock")["README.md"]
    assert hub.files("ann/ours").keys() == hub.files("ann/stock").keys()
    assert hub.files("ann/ours")["README.md"] == hub.files("ann/stock")["README.md"]


def test_extending_twice_does_not_pile_up():
    """A module that is loaded again replaces its method; peft's own stays underneath."""
    before = PeftModel.save_pretrained
    stock = vars(before)["stock"]
    try:

        @extend
        def save_pretrained(stock, model, folder):
            return "mine"

        assert vars(PeftModel.save_pretrained)["stock"] is stock
        assert adapter().save_pretrained("nowhere") == "mine"
    finally:
        PeftModel.save_pretrained = before


# push_to_hub


def test_push_to_hub(hub, temporary):
    """The adapter, its config and our card, with tags; nothing stays behind; pulled, it is what it was."""
    info = adapter().push_to_hub("tiny", tags=["letters"], commit_message="First", private=True, token=OWNER)
    files = hub.files("ann/tiny")
    print("\nann/tiny on the Hub:", *(f"{len(data):>9,} bytes  {name}" for name, data in files.items()), sep="\n")
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= files.keys()
    text = files["README.md"].decode()
    assert 'adapter = "ann/tiny"' in text
    assert "[More Information Needed]" not in text
    assert "letters" in ModelCard(text).data.tags
    assert hub.repos["ann/tiny"].private
    assert hub.repos["ann/tiny"].messages == [("main", "First", "")]
    assert info.commit_url.startswith(f"{hub.url}/ann/tiny/commit/")
    assert not list(temporary.iterdir())
    assert torch.equal(logits(PeftModel.from_pretrained(BERT.build(), "ann/tiny")), logits(adapter()))


def edit(hub, repo_id, text):
    """What an author does on the web page of a repository: a commit that adds a section to the card."""
    put(hub, repo_id, hub.files(repo_id)["README.md"] + text.encode())


def put(hub, repo_id, card, path="README.md"):
    value = {"path": path, "content": base64.b64encode(card).decode()}
    hub.commit(hub.repos[repo_id], "main", "main", [{"key": "file", "value": value}])


def test_edits_on_the_hub_survive_a_second_push(hub, tmp_path):
    """From the model and from the command line, by id and by the short name of the owner."""
    adapter().push_to_hub("ann/tiny")
    edit(hub, "ann/tiny", "\n## Intended use\n\nFor Ann's letters.\n")
    adapter(seed=1).push_to_hub("tiny")
    assert "For Ann's letters." in hub.files("ann/tiny")["README.md"].decode()
    adapter(seed=2).save_pretrained(str(tmp_path / "out"))
    assert run(f"hf-peft-ext push {tmp_path / 'out'} ann/tiny")[0] == 0
    assert "For Ann's letters." in hub.files("ann/tiny")["README.md"].decode()
    assert "For Ann's letters." in (tmp_path / "out" / "README.md").read_text()
    edit(hub, "ann/tiny", "\n## Limits\n\nNone of Bob's.\n")
    assert run(f"hf-peft-ext push {tmp_path / 'out'} ann/tiny --revision next")[0] == 0
    assert "None of Bob's." in hub.files("ann/tiny", "next")["README.md"].decode()
    assert torch.equal(logits(PeftModel.from_pretrained(BERT.build(), "ann/tiny")), logits(adapter(2)))


@pytest.mark.parametrize("content", BROKEN)
def test_an_error_says_that_it_is_on_the_hub(hub, tmp_path, temporary, content):
    """The push is refused with the place of what is wrong, from the model and from the command line."""
    adapter().push_to_hub("ann/tiny")
    put(hub, "ann/tiny", content)
    reason = BROKEN[content].replace("README.md is", "README.md of ann/tiny on the Hub is")
    with pytest.raises(ValueError, match=f"(?s)(^In the card of )?ann/tiny on the Hub.*{reason.split('Hub')[-1]}"):
        adapter().push_to_hub("tiny")
    assert not list(temporary.iterdir())
    adapter().save_pretrained(str(tmp_path / "out"))
    code, text = run(f"hf-peft-ext push {tmp_path / 'out'} ann/tiny")
    assert code == 2
    assert "ann/tiny on the Hub" in text
    (tmp_path / "out" / "README.md").write_text("---\nlicense: here\n---\n")
    if "UTF-8" not in BROKEN[content]:
        assert "`license` (='here')" in run(f"hf-peft-ext push {tmp_path / 'out'} ann/tiny")[1]


def test_an_error_names_the_adapter_on_the_hub(hub):
    """That of a sub-folder, and the first page over adapters in sub-folders."""
    model, wrong = two_adapters("first"), b"---\nlicense: [\n---\n"
    model.push_to_hub("ann/two")
    right = hub.files("ann/two")["other/README.md"]
    put(hub, "ann/two", wrong, "other/README.md")
    with pytest.raises(ValueError, match=r"^In the card of ann/two/other on the Hub: The metadata"):
        model.push_to_hub("ann/two")
    put(hub, "ann/two", right, "other/README.md")
    put(hub, "ann/two", wrong)
    with pytest.raises(ValueError, match=r"^In the card of ann/two on the Hub: The metadata"):
        model.push_to_hub("ann/two")


def test_published_cards(hub):
    assert published_cards("ann/tiny") == {}
    two_adapters().push_to_hub("ann/tiny")
    expected = {name: data.decode() for name, data in hub.files("ann/tiny").items() if name.endswith("README.md")}
    assert expected.keys() == {"README.md", "other/README.md"}
    assert published_cards("ann/tiny") == published_cards("ann/tiny", "not-yet") == expected


@pytest.mark.parametrize("first", ["default", "first"])
def test_several_adapters_are_pushed_each_in_its_folder(first, hub):
    """As peft saves them; each is pulled by its sub-folder, as its card says."""
    model = two_adapters(first)
    model.push_to_hub("ann/two")
    for name in (first, "other"):
        folder = {} if name == "default" else {"subfolder": name}
        model.set_adapter(name)
        assert torch.equal(logits(PeftModel.from_pretrained(BERT.build(), "ann/two", **folder)), logits(model))
    cards = published_cards("ann/two")
    assert 'load_adapter(model, adapter, subfolder="other")' in cards["other/README.md"]
    assert "subfolder" not in cards["README.md"] or first != "default"


def test_a_refused_push_leaves_nothing_behind(hub, temporary):
    with pytest.raises(ValueError, match=r"`revision` \(='dev'\) must be None"):
        adapter().push_to_hub("ann/tiny", revision="dev", create_pr=True)
    with pytest.raises(ValueError, match="Repo id must"):
        adapter().push_to_hub("../tiny")
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("request_", ["GET /api/whoami-v2", "POST /api/repos/create", "POST .*/commit/"])
def test_after_an_error_the_adapter_stays(request_, hub, temporary):
    """Complete, where the error says; the command that it gives pushes it."""
    hub.fail(request_)
    with pytest.raises(PushError) as error:
        adapter().push_to_hub("tiny")
    (folder,) = temporary.iterdir()
    assert torch.equal(logits(PeftModel.from_pretrained(BERT.build(), str(folder))), logits(adapter()))
    command = str(error.value).partition("Run this to finish the push: ")[2]
    assert re.fullmatch(rf"hf-peft-ext push {re.escape(str(folder))} (ann/)?tiny", command)
    assert run(command)[0] == 0
    assert torch.equal(logits(PeftModel.from_pretrained(BERT.build(), "ann/tiny")), logits(adapter()))


# the command line


def test_help():
    text = CliRunner().invoke(app, ["push", "--help"], terminal_width=120).output
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    for words in ("FOLDER", "REPO_ID", "--revision", "--private", "--create-pr", "--commit-message", "--dry-run"):
        assert words in plain
    assert "HF_TOKEN" in plain
    assert "--token" not in plain


def test_dry_run(hub, tmp_path):
    """What would go and what would stay; nothing is sent or written."""
    folder = tmp_path / "out"
    adapter().save_pretrained(str(folder))
    (folder / "training_args.bin").write_bytes(b"[red]pickle[/red]")
    before = contents(folder)
    code, text = run(f"hf-peft-ext push {folder} ann/tiny --dry-run")
    assert code == 0
    assert re.search(r"push +adapter_model.safetensors +[\d,]+ bytes", text)
    assert re.search(r"keep +training_args.bin", text)
    assert contents(folder) == before
    assert not hub.log
    code, text = run(f"hf-peft-ext push {folder} ann/tiny --dry-run --json")
    assert code == 0
    assert json.loads(text) == {"files": ["README.md", "adapter_config.json", "adapter_model.safetensors"]}


REFUSED = {
    "no adapter": ("ann/tiny", "must hold adapter_config.json and adapter_model.safetensors"),
    "pickle": ("ann/tiny", "holds an invalid adapter_model.safetensors"),
    "token": ("ann/tiny", "holds an access token"),
    "licence": ("ann/tiny", r"`license` \(='mine'\)"),
    "id": ("ann/tiny/x", r"`repo_id` \(='ann/tiny/x'\) must be an id on the Hub"),
    "words": ("'ann tiny'", r"`repo_id` \(='ann tiny'\) must be an id on the Hub"),
    "revision": ("ann/tiny --create-pr --revision dev", "`revision`"),
    "branch": ("ann/tiny --revision 'a b'", r"`revision` \(='a b'\) must be"),
    "message": (f"ann/tiny --commit-message hf_{'Ab1' * 10}", "must not hold an access token"),
}


@pytest.mark.parametrize("dry", ["--dry-run", ""])
@pytest.mark.parametrize("case", REFUSED)
def test_a_dry_run_refuses_what_the_push_refuses(case, dry, hub, tmp_path):
    """Both say so in one line, the dry run without a request; nothing is pushed."""
    folder = tmp_path / "out"
    adapter().save_pretrained(str(folder))
    if case == "no adapter":
        (folder / "adapter_config.json").unlink()
    if case == "pickle":
        (folder / "adapter_model.safetensors").write_bytes(b"\x80\x04pickled")
    if case == "token":
        (folder / "training_record.json").write_text(f'{{"command": "x hf_{"Ab1" * 10}"}}')
    if case == "licence":
        (folder / "README.md").write_text("---\nlicense: mine\n---\n")
    before = contents(folder)
    arguments, rule = REFUSED[case]
    code, text = run(f"hf-peft-ext push {folder} {arguments} {dry}")
    assert code == 2, text
    assert re.search(rule, text), text
    assert "Traceback" not in text
    assert (str(folder) in text) == ("`folder`" in text)
    if dry:
        assert contents(folder) == before
        assert not hub.log
    assert not hub.repos


def test_command_opens_a_pull_request(hub, tmp_path):
    adapter().save_pretrained(str(tmp_path / "out"))
    code, text = run(
        f"hf-peft-ext push {tmp_path / 'out'} ann/tiny --private --create-pr --commit-message 'A proposal'"
    )
    assert code == 0
    assert f"{hub.url}/ann/tiny/discussions/1" in text  # progress bars may stand on its line
    assert hub.repos["ann/tiny"].messages == [("refs/pr/1", "A proposal", "")]


def test_command_takes_adapters_of_peft_s_own(hub, tmp_path):
    model = lora()
    randomise(model)
    model.save_pretrained(str(tmp_path / "out"))
    code, text = run(f"hf-peft-ext push {tmp_path / 'out'} ann/lora")
    assert code == 0, text
    assert "import hf_peft_ext" not in hub.files("ann/lora")["README.md"].decode()
    assert torch.equal(logits(PeftModel.from_pretrained(BERT.build(), "ann/lora").eval()), logits(model.eval()))


def test_command_line_errors(hub, tmp_path):
    """One sentence and no traceback; exit code 2 if the folder must be changed, 1 if the Hub failed."""
    folder = tmp_path / "out"
    adapter().save_pretrained(str(folder))
    (folder / "merges.txt").write_text(f"[b]{OWNER}[/b]")
    code, text = run(f"hf-peft-ext push {folder} ann/tiny")
    assert code == 2
    assert text.splitlines()[-1].startswith("Error `file` (='merges.txt') holds an access token of the Hub")
    assert OWNER not in text
    (folder / "merges.txt").unlink()
    hub.fail("POST .*/commit/", "500")
    code, text = run(f"hf-peft-ext push {folder} ann/tiny")
    assert code == 1
    assert text.splitlines()[-1].endswith(f"Run this to finish the push: hf-peft-ext push {folder} ann/tiny")
    Path(folder, "adapter_config.json").unlink()
    assert "must hold adapter_config.json" in run(f"hf-peft-ext push {folder} ann/tiny")[1]


def test_a_pickle_has_no_card(tmp_path):
    """Where somebody asks for a pickle, it is saved as peft does, and no card beside it."""
    model = get_peft_model(BERT.build(), METHODS["bitfit"]())
    model.save_pretrained(str(tmp_path), safe_serialization=False)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.bin"]


@pytest.fixture
def resized(tmp_path):
    """Makes a Llama with four tokens more than the one it was loaded from."""
    BACKBONES["llama"].build().save_pretrained(tmp_path / "base")

    def build():
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(0)
        model.resize_token_embeddings(model.config.vocab_size + 4, mean_resizing=False)
        return model

    return build


def test_new_tokens_are_not_saved_unasked(resized, tmp_path):
    """Embeddings of the base model stay out of the adapter, and a warning says how to save them."""
    model = get_peft_model(resized(), METHODS["unipelt"]())
    with pytest.warns(UserWarning, match="changed from 60 to 64 tokens, and the new embeddings are not saved"):
        model.save_pretrained(tmp_path)
    assert not [key for key in load_file(tmp_path / "adapter_model.safetensors") if "embed" in key or "lm_head" in key]
    load_adapter(resized(), tmp_path)
    with pytest.raises(ValueError, match=r"`save_embedding_layers` \(=True\) must not be True: name the embeddings"):
        model.save_pretrained(tmp_path, save_embedding_layers=True)


@pytest.mark.parametrize(
    "fields", [{"modules_to_save": ["embed_tokens", "lm_head"]}, {"trainable_token_indices": [60]}]
)
def test_new_tokens_are_saved_where_they_are_named(fields, resized, tmp_path):
    model = get_peft_model(resized(), UniPELTConfig(bottleneck_size=4, task_type="CAUSAL_LM", **fields))
    randomise(model, "default", seed=0)
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[3, 60, 61]])
    for loaded in (load_adapter(resized(), tmp_path), PeftModel.from_pretrained(resized(), tmp_path)):
        with torch.no_grad():
            assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)
