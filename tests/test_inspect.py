"""`hf-peft-ext inspect` and `import-adapterhub`: what is in an adapter, is it safe, and the sites of a model."""

import json
import pickle
import zipfile
from hashlib import sha256

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from typer.testing import CliRunner

from hf_peft_ext import UniPELTConfig, find_target_modules
from hf_peft_ext.catalogue.adapter_report import inspect_adapter
from hf_peft_ext.catalogue.model_report import inspect_model
from hf_peft_ext.cli import app
from hf_peft_ext.hub_cards import TrainingRecord

from .adapterhub.families import build
from .backbones import BACKBONES, SPECIAL, VOCAB
from .saved_adapters import CONFIG, WEIGHTS, reweigh, rewrite
from .test_docs import ROOT

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def run(*words, columns=None, code=0):
    done = CliRunner().invoke(app, [*words], env={"COLUMNS": str(columns)} if columns else {})
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else done.stderr


@pytest.fixture
def base(tmp_path):
    """A base model on disk."""
    config = AutoConfig.for_model("llama", vocab_size=VOCAB, **SPECIAL, **BACKBONES["llama"].config)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def saved(folder, base, config):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(base, tmp_path):
    """A UniPELT adapter with a training record."""
    folder = saved(tmp_path / "adapter", base, UniPELTConfig(task_type="CAUSAL_LM", r=2, bottleneck_size=4))
    TrainingRecord(gates={"0.query_low_rank": 0.75}).save(folder)
    return folder


def test_an_adapter(adapter, base):
    report = inspect_adapter(adapter)
    assert (report.peft_type, report.base_model, report.task_type) == ("UNIPELT", str(base), "CAUSAL_LM")
    assert report.safe == "yes"
    assert report.stock_peft == "no: UNIPELT is a method of hf_peft_ext, which must be imported first"
    assert report.settings["r"] == 2
    assert report.gates == {"0.query_low_rank": 0.75}
    assert {row.sublayer for row in report.placements} == {"bottleneck", "prefix", "low rank"}
    assert sum(row.parameters for row in report.placements) == report.parameters > 0
    assert report.files[WEIGHTS] == sha256((adapter / WEIGHTS).read_bytes()).hexdigest()
    assert report.dtypes == ["F32"]


def test_a_stock_adapter(base, tmp_path):
    report = inspect_adapter(saved(tmp_path / "lora", base, LoraConfig(task_type="CAUSAL_LM", r=4)))
    assert (report.stock_peft, report.safe) == ("yes", "yes")
    assert [row.size for row in report.placements] == ["r = 4"] * len(report.placements)


def test_a_classifier(tmp_path):
    """The head has as many classes as the adapter's, not as the base model's config says."""
    config = AutoConfig.for_model("bert", vocab_size=VOCAB, **SPECIAL, **BACKBONES["bert"].config)
    config.save_pretrained(tmp_path / "base")
    config.num_labels = 5
    model = AutoModelForSequenceClassification.from_config(config)
    get_peft_model(model, LoraConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path / "adapter")
    assert inspect_adapter(tmp_path / "adapter", base=str(tmp_path / "base")).safe == "yes"


def test_adapters_that_are_not_safe(adapter, base, tmp_path):
    """The reason is that of `load_adapter`; a pickle is named and not read."""
    reweigh(adapter, lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.zeros(3, 3)}))
    assert inspect_adapter(adapter).safe.startswith("no: The adapter's file holds tensors that its config does not")
    reweigh(adapter, lambda tensors: tensors.update({k: t * float("nan") for k, t in tensors.items()}))
    assert "is not finite" in inspect_adapter(adapter, base="nowhere/model").safe
    (adapter / WEIGHTS).unlink()

    class Unpickled:
        def __reduce__(self):
            return (open, (str(tmp_path / "was_run"), "w"))

    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Unpickled()))
    report = inspect_adapter(adapter)
    assert (
        report.safe
        == "no: `path` (='" + str(adapter) + "') must have adapter_model.safetensors; pickles are not read."
    )
    assert report.pickles == ["adapter_model.bin"]
    assert not (tmp_path / "was_run").exists()
    rewrite(adapter, r="x")
    assert inspect_adapter(adapter).safe == "no: `r` (='x') must be of type int."


def test_without_the_base_model(adapter):
    """Config and values are checked, and the report says that the tensors' names are not."""
    assert inspect_adapter(adapter, base=str(adapter / "none")).safe.startswith(
        "not known: config and values are sound"
    )


@pytest.mark.parametrize("columns", [80, 200])
def test_the_command_on_an_adapter(adapter, columns):
    text = run("inspect", str(adapter), columns=columns)
    assert "safe to load  yes" in text
    assert "bottleneck" in text
    assert max(map(len, text.splitlines())) <= max(columns, len(str(adapter)) + 20)
    assert json.loads(run("inspect", str(adapter), "--json"))["safe"] == "yes"


@pytest.mark.parametrize("columns", [80, 200])
def test_the_command_on_a_model(base, columns):
    text = run("inspect", str(base), columns=columns)
    assert "q_proj, v_proj" in text
    assert max(map(len, text.splitlines())) <= columns
    report = json.loads(run("inspect", str(base / "config.json"), "--json"))
    model = AutoModelForCausalLM.from_pretrained(base)
    assert report["target_modules"] == find_target_modules(model)
    assert report["parameters"] == sum(p.numel() for p in model.parameters())
    assert {"query", "after_ffn", "attention"} <= {row["site"] for row in report["sites"]}


def test_a_model_without_blocks():
    """Its report has no sites and no targets."""
    config = AutoConfig.for_model("resnet", embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    report = inspect_model(config)
    assert (report.layers, report.sites, report.target_modules) == (0, [], [])


def test_wrong_paths(tmp_path):
    assert "is neither a file, nor a folder, nor an id" in run("inspect", "not/an/id", code=2)
    (tmp_path / "empty").mkdir()
    assert run("inspect", str(tmp_path / "empty"), code=2).startswith("Error")
    (tmp_path / CONFIG).write_text("{")
    assert "is not strict JSON" in run("inspect", str(tmp_path), code=2)


def test_import_adapterhub(tmp_path):
    build("bert").save_pretrained(tmp_path / "model")
    with zipfile.ZipFile(ROOT / "tests" / "adapterhub" / "bert.zip") as archive:
        archive.extractall(tmp_path)
    words = ["import-adapterhub", str(tmp_path / "unipelt"), str(tmp_path / "out"), "--model", str(tmp_path / "model")]
    result = json.loads(run(*words, "--json"))
    assert result["peft_type"] == "UNIPELT"
    loaded = PeftModel.from_pretrained(build("bert").bert, tmp_path / "out")
    assert loaded.peft_config["default"].peft_type.value == "UNIPELT"
    assert "PEFT type   UNIPELT" in run(*words)
    assert "is neither a folder nor an id" in run("import-adapterhub", "a/b/c", str(tmp_path / "x"), code=2)
    assert "must be one of" in run(*words, "--task-type", "NONE", code=2)


def test_import_adapterhub_with_a_head(tmp_path):
    """The base gets a head of the saved one's type and size; the labels are printed."""
    build("roberta").save_pretrained(tmp_path / "model")
    with zipfile.ZipFile(ROOT / "tests" / "adapterhub" / "heads.zip") as archive:
        archive.extractall(tmp_path)
    for name in ("roberta-classification", "roberta-static-classification"):
        words = ["import-adapterhub", str(tmp_path / name), str(tmp_path / f"{name}-out"), "--model"]
        result = json.loads(run(*words, str(tmp_path / "model"), "--json"))
        assert (result["head"], result["labels"]) == ("classifier, score", "bad, good, fair")
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=3)
        loaded = PeftModel.from_pretrained(base, tmp_path / f"{name}-out")
        assert loaded.peft_config["default"].task_type == "SEQ_CLS"
