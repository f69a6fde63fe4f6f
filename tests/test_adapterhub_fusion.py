"""Fusions, stacks and averages of AdapterHub's library: logits that it gave (adapterhub/make_fusions.py), and ours."""

import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from hf_peft_ext import AttentionFusionConfig, BottleneckConfig, from_adapterhub, load_adapter

from .adapterhub.families import batch, build
from .adapterhub.head_cases import CASES

ROOT = Path(__file__).parent / "adapterhub"
FAMILIES = pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "llama", "t5", "bart"])
NAMES = ["news", "mails"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fusion")
    with zipfile.ZipFile(ROOT / "fusion.zip") as archive:
        archive.extractall(folder)
    return folder


def imported(folder, family, names=NAMES):
    """A model with the adapters of a family."""
    for name in names:
        if not (folder / family / "ours" / name).exists():
            adapter = from_adapterhub(folder / family / name, build(family), name)
            adapter.save_pretrained(folder / family / "ours")
    model = build(family)
    for name in names:
        model = load_adapter(model, folder / family / "ours" / name, name)
    return model.eval()


@torch.no_grad()
def logits(model, family):
    return model(**batch(family)).logits


def check(result, expected):
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@FAMILIES
def test_fuse(saved, family, tmp_path):
    """An imported fusion gives the library's logits; peft saves it, and it loads beside its adapters."""
    model, expected = imported(saved, family), load_file(saved / family / "logits.safetensors")["fuse"]
    assert from_adapterhub(saved / family / "fusion", model, "both") is model
    check(logits(model, family), expected)
    assert model.peft_config["both"].value is (family != "distilbert")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    again = imported(saved, family)
    load_adapter(again, tmp_path / "both", "both")
    again.set_adapter("both")
    assert torch.equal(logits(again, family), logits(model, family))


@FAMILIES
def test_stack_and_average(saved, family):
    """`set_adapter` with a list is `Stack`; an untrained fusion with weights is `Average`."""
    model, expected = imported(saved, family), load_file(saved / family / "logits.safetensors")
    model.base_model.set_adapter(NAMES)
    check(logits(model, family), expected["stack"])
    model.set_adapter("news")
    check(logits(model, family), expected["news"])
    model.add_adapter("mean", AttentionFusionConfig(adapters=NAMES, weights=[0.8, 0.2]))
    model.set_adapter("mean")
    check(logits(model.eval(), family), expected["average"])


def test_trained_further(saved):
    """With `is_trainable` the fusion is trained, and its adapters stay frozen."""
    model = from_adapterhub(saved / "bert" / "fusion", imported(saved, "bert"), "both", is_trainable=True)
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"W_Q", "b_Q", "W_K", "b_K", "W_V"}
    assert all(".both." in name for name, p in model.named_parameters() if p.requires_grad)


def edited(saved, target, **changes):
    shutil.copytree(saved / "bert" / "fusion", target)
    config = json.loads((target / "adapter_fusion_config.json").read_text())
    config["config"] |= changes
    (target / "adapter_fusion_config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": False}, "`key` (=False) must be True"),
        ({"query_before_ln": True}, "`query_before_ln` (=True) must be False"),
        ({"residual_before": True}, "`residual_before` (=True) must be False"),
        ({"temperature": True}, "`temperature` (=True) must be False"),
    ],
)
def test_settings(saved, changes, message, tmp_path):
    model = imported(saved, "bert")
    with pytest.raises(ValueError, match=re.escape(message)):
        from_adapterhub(edited(saved, tmp_path / "edited", **changes), model, "both")
    assert [*model.peft_config] == NAMES


def test_what_does_not_fit(saved, tmp_path):
    """A model without the adapters, or with adapters at other places; files that are not there. Nothing changes."""
    fusion = saved / "bert" / "fusion"
    with pytest.raises(TypeError, match=re.escape("`model` (=BertForMaskedLM) must be a PeftModel that has the")):
        from_adapterhub(fusion, build("bert"))
    with pytest.raises(ValueError, match="must be adapters that the model has already"):
        from_adapterhub(fusion, imported(saved, "bert", ["news"]), "both")
    for style, message in (("houlsby", "must be 2, as the adapters have"), ("parallel", "must not be parallel")):
        model = get_peft_model(build("bert"), BottleneckConfig(style=style, r=4), adapter_name="news")
        model.add_adapter("mails", BottleneckConfig(style=style, r=4))
        with pytest.raises(ValueError, match=message):
            from_adapterhub(fusion, model, "both")
        assert [*model.peft_config] == NAMES
        assert not any(".both." in name for name, _ in model.named_modules())
    folder, model = edited(saved, tmp_path / "deeper"), imported(saved, "bert")
    tensors = torch.load(folder / "pytorch_model_adapter_fusion.bin", weights_only=True)
    further = {key.replace("layer.1.", "layer.2."): tensor for key, tensor in tensors.items()}
    torch.save(tensors | further, folder / "pytorch_model_adapter_fusion.bin")
    with pytest.raises(ValueError, match=r"`places` \(=3\) must be 2, as the adapters have"):
        from_adapterhub(folder, model, "both")
    assert [*model.peft_config] == NAMES
    (folder / "adapter_fusion_config.json").write_text("{}")
    with pytest.raises(ValueError, match="must hold the `name` and the `config` of a fusion"):
        from_adapterhub(folder, model, "both")
    folder = edited(saved, tmp_path / "bare")
    (folder / "pytorch_model_adapter_fusion.bin").unlink()
    with pytest.raises(ValueError, match="must hold model_adapter_fusion"):
        from_adapterhub(folder, imported(saved, "bert"), "both")


def test_head_beside_a_fusion(saved, tmp_path):
    """A fusion has its own copy of the head; adapters with heads of their own leave none for it."""
    with zipfile.ZipFile(ROOT / "heads.zip") as archive:
        archive.extractall(tmp_path)
    shutil.copytree(saved / "bert" / "fusion", tmp_path / "fusion")
    for file in (tmp_path / "bert-classification").glob("*head*"):
        shutil.copy(file, tmp_path / "fusion")
    family, auto, _, changes = CASES["bert-classification"]
    model = build(family, auto=auto, **changes)
    imported(saved, "bert")  # saves the adapters
    for name in NAMES:
        model = load_adapter(model, saved / "bert" / "ours" / name, name)
    from_adapterhub(tmp_path / "fusion", model, "both")
    expected = load_file(tmp_path / "bert-classification" / "model_head.safetensors")["heads.mine.4.weight"]
    assert torch.equal(model.get_base_model().classifier.modules_to_save["both"].weight, expected)
    assert model.get_base_model().config.id2label[1] == "good"
    with pytest.warns(UserWarning, match="an adapter of the model has a head of its own"):
        from_adapterhub(tmp_path / "fusion", model, "again")
