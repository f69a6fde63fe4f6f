"""Cards, against the whole text they are to have, the models that their snippets load, and what the adapters hold."""

import importlib.util
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

from hf_peft_ext.hub_cards import AdapterCard, DatasetRecord, Result, TrainingRecord, figures, write_card
from hf_peft_ext.hub_cards.card_edits import COMMENT
from hf_peft_ext.hub_cards.metadata import check_metadata
from hf_peft_ext.hub_cards.record import quantization_of
from hf_peft_ext.hub_cards.saved_adapter import SavedAdapter, layers
from hf_peft_ext.papers import IA3, LADDER, LORA, MAM, S4, UNIPELT

from .backbones import BACKBONES
from .card_pattern import CARD
from .cards import ADAPTERS, BASE, LABELS, OURS, full_record, saved, tokenizer


def card_of(folder: Path, name: str, record: TrainingRecord | None = None, **kwargs) -> str:
    saved(folder, name, **kwargs)
    if record:
        record.save(folder)
    return write_card(folder).read_text()


def code_of(card: str) -> str:
    return re.findall(r"```python\n(.*?)\n```", card, flags=re.DOTALL)[0]


# The whole


def test_whole_card(tmp_path):
    """A run that measured everything, word for word."""
    card = card_of(tmp_path / "unipelt", "unipelt", full_record())
    assert COMMENT.sub("", card).strip() == CARD.strip()


def test_two_cards_of_one_record_are_equal(tmp_path):
    """Written again, nothing changes: not a byte of the card, its figures or its recipe."""
    card_of(tmp_path, "unipelt", full_record())
    names = ["README.md", "recipe.yaml", "figures/gates.png", "figures/losses.png"]
    before = [(tmp_path / name).read_bytes() for name in names]
    write_card(tmp_path)
    assert [(tmp_path / name).read_bytes() for name in names] == before


@pytest.mark.parametrize("name", ADAPTERS)
def test_nothing_is_invented(tmp_path, name):
    """From an adapter alone: no empty section, no placeholder for what was not measured, no folder as base model."""
    card = card_of(tmp_path, name, base=str(tmp_path / "base"))
    assert not re.search(r"More Information|None|nan|\[\]|\{\}|  \n", COMMENT.sub("", card))
    assert str(tmp_path) not in card
    headings = re.findall(r"^#+ (.*)$", card, flags=re.MULTILINE)[1:]
    assert [h for h in headings if h not in ("Use", "Method", "Framework versions", "Citation")] == []
    assert not re.search(r"^(#+ .*)\s+^#", re.sub(r"^# .*", "", card, flags=re.MULTILINE), flags=re.MULTILINE)
    data = ModelCard(card).data.to_dict()
    assert "base_model" not in data
    assert not any(tag.startswith("base_model:") for tag in data["tags"])


def test_it_is_a_model_card(tmp_path):
    """huggingface_hub reads what was written, and AdapterCard gives the same before it is written."""
    card_of(tmp_path, "unipelt", full_record())
    card = AdapterCard.load(tmp_path / "README.md")
    assert isinstance(card, ModelCard)
    assert card.data.eval_results[0].metric_value == 0.85312
    assert AdapterCard.from_adapter(tmp_path).data.to_dict() == card.data.to_dict()


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`folder` \(=.*\) holds no adapter_config.json; save an adapter there\."):
        write_card(tmp_path)
    saved(tmp_path, "bitfit")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match=r"`folder` \(=.*\) holds an invalid adapter_model.safetensors"):
        write_card(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "NOVEL"}')
    with pytest.raises(ValueError, match=r"`peft_type` \(='NOVEL'\) in adapter_config.json must be a type of the"):
        write_card(tmp_path)


# Snippets

RUN = """
import sys, torch
sys.path.insert(0, {root!r})
for name in {names!r}:
    if name == "ia3":
        sys.modules["hf_peft_ext"] = None  # an adapter of a stock type needs peft alone
    else:
        sys.modules.pop("hf_peft_ext", None)
    code = open(f"{{name}}.py").read()
    space = {{"__name__": "snippet"}}
    exec(compile(code, name, "exec"), space)
    torch.save(space["model"](**torch.load(f"{{name}}.inputs")).logits, f"{{name}}.logits")
"""


def test_snippets_run(tmp_path):
    """As they stand on the card, in a fresh process: the model that they load gives the saved one's logits."""
    names = ["ia3", "unipelt", "mam", "bitfit", "ladder"]
    logits = {}
    for name in names:
        model = saved(tmp_path / name, name, base=f"acme/{name}")
        base = tmp_path / "acme" / name
        ADAPTERS[name]().unload().save_pretrained(base)
        tokenizer().save_pretrained(base)
        (tmp_path / f"{name}.py").write_text(code_of(write_card(tmp_path / name, model).read_text()))
        kind = {"unipelt": "bert", "mam": "t5", "bitfit": "gpt2", "ia3": "llama", "ladder": "qwen2"}[name]
        inputs = BACKBONES[kind].inputs()
        torch.save(inputs, tmp_path / f"{name}.inputs")
        with torch.no_grad():
            logits[name] = model(**inputs).logits
    code = RUN.format(root=str(Path(__file__).parents[1]), names=names)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[1] in LABELS
    for name in names:
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.logits"), logits[name])


@pytest.mark.parametrize("name", ADAPTERS)
def test_snippets_import_what_they_need(tmp_path, name):
    """Methods of this package: it first of all. Types of peft's: peft alone."""
    card = card_of(tmp_path, name)
    ours = name in OURS
    assert code_of(card).startswith("import hf_peft_ext") == ours
    assert ("hf_peft_ext" in COMMENT.sub("", card)) == ours
    compile(code_of(card), name, "exec")


def test_snippet_names_the_repository(tmp_path):
    saved(tmp_path, "unipelt")
    code = code_of(write_card(tmp_path, repo_id="me/support").read_text())
    assert 'adapter = "me/support"' in code
    assert f'base = "{BASE}"' in code
    with pytest.raises(ValueError, match=r"`repo_id` \(='a b'\) must be an id on the Hub, such as 'name/adapter'\."):
        write_card(tmp_path, repo_id="a b")


def test_snippet_takes_the_tokenizer_beside_the_adapter(tmp_path):
    saved(tmp_path, "ia3")
    tokenizer().save_pretrained(tmp_path)
    assert "AutoTokenizer.from_pretrained(adapter)" in write_card(tmp_path).read_text()


def test_snippet_counts_the_classes_of_the_head(tmp_path):
    """Without their names, their number is read off the saved head; from the model come the names, and stay."""
    model = saved(tmp_path, "unipelt")
    assert "num_labels=3" in write_card(tmp_path).read_text()
    named = 'id2label={0: "refund", 1: "lost card", 2: "other"}'
    assert named in write_card(tmp_path, model).read_text()
    assert named in write_card(tmp_path).read_text()
    assert TrainingRecord.load(tmp_path) == TrainingRecord(labels=LABELS)


def test_quantisation_of_a_model():
    """As the model's config has it; whole weights have none."""
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    assert quantization_of(SimpleNamespace(quantization_config=four)) == "4-bit NF4, double quantisation"
    assert quantization_of(SimpleNamespace(quantization_config=BitsAndBytesConfig(load_in_8bit=True))) == "8-bit"
    assert quantization_of(SimpleNamespace(quantization_config={"quant_method": "gptq"})) == "gptq"
    assert quantization_of(SimpleNamespace()) is None


def test_a_model_of_ones_own(tmp_path):
    """Not of transformers: the card neither says so nor guesses how to load it."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    get_peft_model(deepcopy(net), LoraConfig(target_modules=["0"], r=2)).save_pretrained(tmp_path)
    card = write_card(tmp_path).read_text()
    assert "transformers" not in card
    code = code_of(card).replace("model = ...", "model = net").replace(tmp_path.name, str(tmp_path))
    space = {"net": net}
    exec(compile(code, "snippet", "exec"), space)
    assert space["model"].peft_config["default"].r == 2


# Method and architecture


@pytest.mark.parametrize(
    ("name", "paper"),
    [("unipelt", UNIPELT), ("mam", MAM), ("s4", S4), ("ladder", LADDER), ("ia3", IA3), ("lora", LORA)],
)
def test_papers(tmp_path, name, paper):
    card = card_of(tmp_path, name)
    assert f"([{paper.title}]({paper.url}))" in card
    assert paper.bibtex in card


@pytest.mark.parametrize("name", ADAPTERS)
def test_parameters_are_those_of_the_file(tmp_path, name):
    """The table's counts add up to the summary's, which is that of the tensors in the file."""
    card = card_of(tmp_path, name)
    count = sum(tensor.numel() for tensor in load_file(tmp_path / "adapter_model.safetensors").values())
    assert f"{count:,} parameters" in card
    assert sum(row.parameters for row in SavedAdapter(tmp_path).rows()) == count
    counts = re.findall(r"^\| .* \| ([\d,]+) \|$", card, flags=re.MULTILINE)
    assert sum(int(cell.replace(",", "")) for cell in counts) == count


def test_places_are_those_of_the_config(tmp_path):
    """Every placement of the config has its row, with its gate; what is saved whole comes last."""
    saved(tmp_path, "unipelt")
    rows = [(row.sublayer, row.site, row.layers, row.size, row.gate) for row in SavedAdapter(tmp_path).rows()]
    assert rows == [
        ("bottleneck", "after the FFN and its residual", "0 to 1", "r = 4", "auto"),
        ("prefix", "keys and values of attention", "0 to 1", "tokens = 4", "auto"),
        ("low rank", "query projection", "0 to 1", "r = 8", "auto"),
        ("low rank", "value projection", "0 to 1", "r = 8", "auto"),
        ("saved whole", "`classifier`", "outside the layers", "", ""),
    ]


def test_groups_of_s4(tmp_path):
    """Which layers have which strategies, and the papers of those that are there."""
    card = card_of(tmp_path, "s4")
    said = "different ones into different layers (layer 0: adapters and LoRA; layer 1: biases)."
    assert said in card
    assert "Ben Zaken" in card
    assert "Prefix-Tuning" not in card


def test_ranks_of_a_stock_type(tmp_path):
    saved(tmp_path, "lora")
    assert [(row.sublayer, row.site, row.size) for row in SavedAdapter(tmp_path).rows()] == [
        ("LORA", "`query`", "r = 2"),
        ("LORA", "`value`", "r = 2"),
    ]


def test_layers():
    """Numbers by stack, encoder first; what lies in no stack is said to."""
    assert layers([f"model.layers.{i}.mlp" for i in (0, 1, 2, 5)]) == "0 to 2, 5"
    hosts = ["decoder.block.0.layer.1.EncDecAttention", "encoder.block.0.layer.0", "encoder.block.1.layer.0"]
    assert layers(hosts) == "encoder 0 to 1, decoder 0"
    assert layers(["embeddings.LayerNorm", "encoder.layer.3.output"]) == "3, outside the layers"


# Metadata


def test_metadata(tmp_path):
    data = ModelCard(card_of(tmp_path / "unipelt", "unipelt", full_record())).data.to_dict()
    assert data["library_name"] == "peft"
    assert (data["base_model"], data["base_model_relation"]) == (BASE, "adapter")
    tags = ["peft", "hf_peft_ext", "transformers", "unipelt", "support", f"base_model:adapter:{BASE}"]
    assert data["tags"] == tags
    assert data["pipeline_tag"] == "text-classification"
    assert data["datasets"] == ["nyu-mll/glue"]
    assert data["metrics"] == ["accuracy", "f1"]
    assert (data["language"], data["license"]) == (["en"], "apache-2.0")
    (index,) = data["model-index"]
    assert index["name"] == "unipelt"
    assert [r["dataset"]["type"] for r in index["results"]] == ["nyu-mll/glue"]  # what is not on the Hub has no id


@pytest.mark.parametrize(
    ("name", "task"),
    [("unipelt", "text-classification"), ("mam", None), ("bitfit", "text-generation"), ("ia3", "text-generation"),
     ("lora", "feature-extraction")],
)  # fmt: skip
def test_pipeline_tag(tmp_path, name, task):
    """By the task type, else by the class of the base model; left out where that leaves a choice."""
    assert ModelCard(card_of(tmp_path, name)).data.pipeline_tag == task


def test_a_folder_here_is_no_base_model(tmp_path, monkeypatch):
    """What looks like an id but is a folder was loaded from there."""
    monkeypatch.chdir(tmp_path)
    assert f"base_model: {BASE}" in card_of(tmp_path / "adapter", "bitfit")
    (tmp_path / BASE).mkdir(parents=True)
    card = write_card(tmp_path / "adapter").read_text()
    assert BASE not in card
    assert "change a `GPT2LMHeadModel` that has no id on the Hub." in card


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("license", "Apache 2.0", r"`license` \(='Apache 2.0'\) must be .*; did you mean 'apache-2.0'\?"),
        ("language", ["english"], r"`language` \(='english'\) must be an ISO 639 code, such as 'en'\."),
        ("language", ["jp"], r"`language` \(='jp'\)"),
        ("pipeline_tag", "classify", r"`pipeline_tag` \(='classify'\) must be a task of the Hub"),
        ("tags", ["a\nb"], r"`tags` \(='a\\nb'\) must be words on one line\."),
        ("datasets", [DatasetRecord("a/b/c", on_hub=True)], r"`datasets` \(='a/b/c'\) must be an id on the Hub"),
    ],
)
def test_wrong_metadata_is_refused(tmp_path, field, value, message):
    """Before anything is written."""
    saved(tmp_path, "bitfit")
    TrainingRecord(**{field: value}, gates={"0.query_low_rank": 0.5}).save(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        write_card(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("base", ["/home/me/model", "./model", "C:\\model", "a/b/c", "..", ""])
def test_paths_are_no_base_models(base):
    with pytest.raises(ValueError, match=r"`base_model` \(='.*'\) must be an id on the Hub, such as 'org/name'\."):
        check_metadata({"base_model": base})


def test_metadata_that_yaml_changes_is_refused():
    with pytest.raises(ValueError, match="must be the same after it was written as YAML and read again"):
        check_metadata({"score": float("nan")})


# Results


def test_results_side_by_side(tmp_path):
    """This adapter first, then LoRA, then the base model; other methods by name; a gap where nothing was measured."""
    results = [Result("f1", 0.5, method="base"), Result("f1", 0.75, 0.0123, 5), Result("em", 12.3456, method="full")]
    card = card_of(tmp_path, "bitfit", TrainingRecord(results=results))
    assert "| metric | this adapter | base model | `full` |" in card
    assert "| `f1` | 0.750 ± 0.012 | 0.5 |  |" in card
    assert "| `em` |  |  | 12.35 |" in card
    assert "Mean ± standard deviation over 5 runs." in card


def test_results_on_data_without_a_name(tmp_path):
    """The split says it all: no column of data that repeats it."""
    results = [Result("f1", 0.5, dataset="eval", split="evaluation"), Result("f1", 0.25, dataset="test", split="test")]
    card = card_of(tmp_path, "bitfit", TrainingRecord(results=results))
    assert "| metric | split | this adapter |" in card
    assert "| `f1` | `evaluation` | 0.5 |" in card
    assert "| `f1` | `test` | 0.25 |" in card


def test_results_that_are_no_numbers_stay_off_the_leaderboard(tmp_path):
    """A diverged run: its card says nan, the Hub's index holds numbers only, and no losses."""
    record = full_record()
    glue = {"dataset": "nyu-mll/glue", "split": "test"}
    record.results = [Result("accuracy", float("nan"), **glue), Result("loss", 0.5, float("inf"), 2, **glue)]
    card = card_of(tmp_path, "unipelt", record)
    assert "| `accuracy` | `nyu-mll/glue` | `test` | nan |" in card
    assert "| `loss` | `nyu-mll/glue` | `test` | 0.5 |" in card  # JSON has no infinity for the spread
    data = ModelCard(card).data.to_dict()
    assert "model-index" not in data
    assert data["metrics"] == ["accuracy"]


# Figures and recipe


def test_figures(tmp_path):
    """Two PNGs, which the card shows; without their numbers they go, and the card is silent."""
    card = card_of(tmp_path, "unipelt", full_record())
    shown = re.findall(r"\]\((figures/.*?)\)", card)
    assert sorted(shown) == ["figures/gates.png", "figures/losses.png"]
    for name in shown:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    TrainingRecord().save(tmp_path)
    assert "figures/" not in COMMENT.sub("", write_card(tmp_path).read_text())
    assert list((tmp_path / "figures").iterdir()) == []


def test_what_is_drawn():
    """Gates by sub-layer and layer; losses and their terms by step, nothing else of the log."""
    grid = figures.gate_grid({"0.query_low_rank": 0.25, "1.query_low_rank": 0.5, "encoder.layer.2.self.target": 1.0})
    assert grid == {"query_low_rank": {0: 0.25, 1: 0.5}, "self.target": {2: 1.0}}
    history = [{"step": i, "loss": 1 / i, "nll": 0.1, "eval_nll": 0.2, "learning_rate": 1e-3} for i in (1, 2)]
    drawn = figures.loss_curves(TrainingRecord(history=history, loss_terms=["nll"]))
    assert drawn == {"loss": [(1, 1.0), (2, 0.5)], "eval_nll": [(1, 0.2), (2, 0.2)], "nll": [(1, 0.1), (2, 0.1)]}


def test_axes_of_losses_read_as_they_are():
    """Losses that are close are not written as differences from one of them, and steps are whole."""
    figure = figures.curves({"eval_loss": [(1, 2.08601), (2, 2.08602), (4, 2.08604)]})
    figure.canvas.draw()
    (axes,) = figure.axes
    assert axes.yaxis.get_offset_text().get_text() == ""
    assert all(float(step) == int(float(step)) for step in axes.get_xticks())


def test_without_matplotlib(tmp_path, monkeypatch):
    """The card says nothing of figures and all else."""
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    card = card_of(tmp_path / "unipelt", "unipelt", full_record())
    assert not (tmp_path / "unipelt" / "figures").exists()
    expected = re.sub(r"!\[.*\)\n\n", "", CARD)
    assert COMMENT.sub("", card).strip() == expected.strip()


def test_recipe(tmp_path):
    """recipe.yaml holds the record's recipe, and the card shows that file."""
    record = full_record()
    card = card_of(tmp_path, "unipelt", record)
    written = (tmp_path / "recipe.yaml").read_text()
    assert yaml.safe_load(written) == record.recipe
    assert f"```yaml\n{written}```" in card


def test_hyperparameters_stand_in_for_a_recipe(tmp_path):
    record = TrainingRecord(hyperparameters={"learning_rate": 5e-4})
    card = card_of(tmp_path, "bitfit", record)
    assert "Training arguments that differ from their defaults:\n\n```yaml\nlearning_rate: 0.0005\n```" in card
    assert not (tmp_path / "recipe.yaml").exists()


# The package


@pytest.mark.skipif(importlib.util.find_spec("tomllib") is None, reason="tomllib came with Python 3.11")
def test_template_is_shipped():
    import tomllib

    root = Path(__file__).parents[1]
    data = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folder = root / "hub_cards"
    others = [path.name for path in folder.iterdir() if path.is_file() and path.suffix != ".py"]
    shipped = [path.name for pattern in data["hf_peft_ext.hub_cards"] for path in folder.glob(pattern)]
    assert sorted(others) == sorted(shipped) == [Path(AdapterCard.default_template_path).name, "hub_values.yaml"]


def test_config_of_the_card_is_the_adapters(tmp_path):
    """What the card calls the method is the type in the config."""
    card_of(tmp_path, "mam")
    assert PeftConfig.from_pretrained(str(tmp_path)).peft_type == "MAM"
    assert "# MAM adapter for `acme/tiny-bert`" in (tmp_path / "README.md").read_text()
