"""Imported prediction heads against the outputs of AdapterHub's own library (tests/adapterhub/make_heads.py)."""

import json
import re
import shutil
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load

from hf_peft_ext import BottleneckConfig, from_adapterhub

from .adapterhub.families import build
from .adapterhub.head_cases import CASES, head_outputs

ARCHIVE = Path(__file__).parent / "adapterhub" / "heads.zip"
with zipfile.ZipFile(ARCHIVE) as archive:
    EXPECTED = load(archive.read("outputs.safetensors"))


@pytest.fixture(scope="session")
def heads(tmp_path_factory):
    """A folder with an adapter and its head for each case."""
    folder = tmp_path_factory.mktemp("heads")
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(folder)
    return folder


def base(name):
    """The base model of a case, with a head of its size."""
    family, auto, _, changes = CASES[name]
    return build(family, auto=auto, **changes)


@pytest.mark.parametrize("name", CASES)
def test_same_outputs_as_the_library(name, heads, tmp_path, record_property):
    """Equal to 1e-4, and after saving and loading with peft; disabled it is the base model with its own head."""
    family, before = CASES[name][0], head_outputs(base(name), CASES[name][0], name)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The prediction head")
        model = from_adapterhub(heads / name, base(name))
    result = head_outputs(model, family, name)
    difference = (result - EXPECTED[name]).abs().max().item()
    record_property("cell", (family, name.removeprefix(f"{family}-")))
    record_property("difference", difference)
    assert difference <= 1e-4
    assert (result - before).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(head_outputs(model, family, name), before)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(name), tmp_path)
    assert torch.equal(head_outputs(again, family, name), result)


HEAD_MODULES = {
    "bert-classification": (["bert.pooler", "classifier"], "SEQ_CLS"),
    "bert-pooled": (["classifier"], "SEQ_CLS"),
    "bert-tagging": (["classifier"], "TOKEN_CLS"),
    "bert-qa": (["qa_outputs"], "QUESTION_ANS"),
    "bert-choice": (["bert.pooler", "classifier"], None),
    "roberta-mlm": (["lm_head.decoder", "lm_head.dense", "lm_head.layer_norm"], None),
    "distilbert-static-classification": (["classifier", "pre_classifier"], "SEQ_CLS"),
    "electra-choice": (["classifier", "sequence_summary"], None),
    "bart-classification": (["classification_head"], "SEQ_CLS"),
    "gpt2-static-classification": (["score"], "SEQ_CLS"),
}


@pytest.mark.parametrize("name", HEAD_MODULES)
def test_modules_and_task(name, heads):
    """The head is saved whole with the adapter; peft adds further names for some tasks."""
    config = from_adapterhub(heads / name, base(name)).peft_config["default"]
    modules, task = HEAD_MODULES[name]
    assert set(modules) <= set(config.modules_to_save)
    assert set(config.modules_to_save) - set(modules) <= {"classifier", "score", "qa_outputs"}
    assert config.task_type == task


def test_labels(heads):
    """The labels of the head become those of the model; those that have no names stay."""
    model = from_adapterhub(
        heads / "bert-classification", build("bert", auto=CASES["bert-classification"][1], num_labels=3)
    )
    assert model.config.id2label == {0: "bad", 1: "good", 2: "fair"}
    assert model.config.label2id == {"bad": 0, "good": 1, "fair": 2}
    assert model.config.problem_type is None
    assert from_adapterhub(heads / "bert-multilabel", base("bert-multilabel")).config.problem_type == (
        "multi_label_classification"
    )
    names = {0: "no", 1: "yes"}
    model = from_adapterhub(heads / "bert-qa", build("bert", auto=CASES["bert-qa"][1], id2label=names))
    assert model.config.id2label == names


def test_training_and_two_heads(heads):
    """A trainable import trains its own copy of the head; a second adapter has another one."""
    name = "roberta-classification"
    model = from_adapterhub(heads / name, base(name), "one", is_trainable=True)
    trained = {key for key, value in model.named_parameters() if value.requires_grad and "classifier" in key}
    assert len(trained) == 4
    assert all(".modules_to_save.one." in key for key in trained)
    first = head_outputs(model.eval(), "roberta", name)
    model.add_adapter("two", BottleneckConfig(task_type="SEQ_CLS"))
    model.set_adapter("two")
    assert (head_outputs(model, "roberta", name) - first).abs().max() > 1e-2
    model.set_adapter("one")
    assert torch.equal(head_outputs(model, "roberta", name), first)


def test_other_number_of_labels(heads):
    """The error says how to load the base; the model does not change; without its head the adapter comes."""
    for name in ("roberta-classification", "roberta-static-classification"):
        model = build("roberta", auto=CASES[name][1])
        modules = list(model.named_modules())
        message = (
            "`num_labels` (=2) must be 3, as the saved head has; load the base with from_pretrained(..., "
            "num_labels=3, id2label={0: 'bad', 2: 'fair', 1: 'good'}), or import without the head (`with_head=False`)."
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            from_adapterhub(heads / name, model)
        assert list(model.named_modules()) == modules
        adapter = from_adapterhub(heads / name, model, with_head=False)
        assert not adapter.peft_config["default"].modules_to_save


# case, class of the base if it is another, changed settings of the head -> why the head is left out
REASONS = [
    ("distilbert-classification", None, {"activation_function": "tanh"},
     "its activation is tanh, that of DistilBertForSequenceClassification is relu."),
    ("roberta-tagging", "roberta-classification", {},
     "its type is 'tagging', which RobertaForSequenceClassification does not have; load the base with "
     "AutoModelForTokenClassification.from_pretrained(..., num_labels=3, id2label={0: 'bad', 2: 'fair', 1: 'good'})."),
    ("bert-static-tagging", "bert-classification", {},
     "it belongs to BertForTokenClassification, the model is BertForSequenceClassification; load the base as "
     "BertForTokenClassification(..., num_labels=3, id2label={0: 'bad', 2: 'fair', 1: 'good'})."),
    ("bert-pooled", None, {"use_pooler": False},
     "it has 1 layer with weights, the head of BertForSequenceClassification has 2 (bert.pooler.dense, classifier)."),
    ("roberta-classification", None, {"use_pooler": True},
     "it reads the pooled output (`use_pooler`), which RobertaForSequenceClassification lacks."),
    ("gpt2-tagging", "gpt2-static-classification", {"head_type": "classification"},
     "it has a bias where score of GPT2ForSequenceClassification has none."),
    ("bert-tagging", None, {"head_type": "dependency_parsing"},
     "transformers has no head of type 'dependency_parsing'."),
]  # fmt: skip


@pytest.mark.parametrize(("name", "other", "changes", "reason"), REASONS)
def test_heads_that_are_left_out(name, other, changes, reason, heads, tmp_path):
    """The warning names the layer, the activation or the class; the adapter comes without the head."""
    shutil.copytree(heads / name, tmp_path / "saved")
    file = tmp_path / "saved" / "head_config.json"
    saved = json.loads(file.read_text())
    if saved["config"]:
        saved["config"] |= changes
    file.write_text(json.dumps(saved))
    with pytest.warns(UserWarning, match=re.escape(f"is not imported: {reason}")):
        model = from_adapterhub(tmp_path / "saved", base(other or name))
    assert not model.peft_config["default"].modules_to_save


def test_inverse_of_a_coupling(heads, tmp_path):
    """The library's heads over the vocabulary apply it; transformers' do not."""
    from hf_peft_ext.loading.adapterhub.heads import import_head

    with pytest.warns(UserWarning, match="the inverse of the invertible adapter precedes its last layer"):
        import_head(heads / "bert-mlm", base("bert-mlm"), [{"inv_adapter": "nice"}], True)


def test_files_that_are_no_heads(heads, tmp_path):
    name = "bert-classification"
    shutil.copytree(heads / name, tmp_path / "saved")
    (tmp_path / "saved" / "model_head.safetensors").unlink()
    with pytest.raises(ValueError, match=re.escape("must hold model_head.safetensors or pytorch_model_head.bin.")):
        from_adapterhub(tmp_path / "saved", base(name))
    (tmp_path / "saved" / "head_config.json").write_text("{}")
    with pytest.raises(ValueError, match=re.escape("must hold the `model_class` and the `config` of a head in")):
        from_adapterhub(tmp_path / "saved", base(name))
