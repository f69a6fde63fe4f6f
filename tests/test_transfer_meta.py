"""The paper's bridge without the large model's weights: the adapter is, bit for bit, that of the ordinary way."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification, TrainingArguments

from hf_peft_ext.pruning import PrunedModel, pruned_copy
from hf_peft_ext.trainers import BridgeTrainer
from hf_peft_ext.transfer import Projections, bridge, delta_bridge, merge_projections, plug

from .backbones import BACKBONES, SPECIAL, output
from .methods import randomise
from .test_transfer_fold import LARGE, every_pair, refuses, small_model


def shapes_of(model):
    """The model without weights."""
    with torch.device("meta"):
        return type(model)(model.config)


def trained(model, inputs, steps=2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        output(model, inputs).square().mean().backward()
        optimizer.step()


def adapter_of(small, large, pruned, inputs, folder, **kwargs):
    """The tensors of the plain adapter after some steps in a bridge."""
    torch.manual_seed(0)  # of W_plug
    plugged = plug(small, large)
    trained(bridge(plugged, pruned, **kwargs), inputs)
    merge_projections(plugged).save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors")


def assert_equal(found, wanted):
    assert wanted
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(("family", "kind"), every_pair)
def test_without_weights(family, kind, tmp_path):
    small, inputs, large = (
        small_model(family, kind),
        BACKBONES[family].inputs(),
        BACKBONES[family].build(**LARGE[family]),
    )
    pruned_copy(large, 2).save_pretrained(tmp_path / "pruned")
    shapes = shapes_of(large)
    pruned = PrunedModel.from_pretrained(tmp_path / "pruned", shapes)
    found = adapter_of(small, shapes, pruned, inputs, tmp_path / "meta")
    wanted = adapter_of(small, large, pruned_copy(large, 2), inputs, tmp_path / "plain")
    assert_equal(found, wanted)
    model = PeftModel.from_pretrained(BACKBONES[family].build(**LARGE[family]), tmp_path / "meta").eval()
    with torch.no_grad(), model.disable_adapter():
        base = output(model, inputs)
    with torch.no_grad():
        assert (output(model, inputs) - base).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_ladder_from_files(family, tmp_path):
    """All rows were met with the large model; now they are there without it."""
    small, inputs, large = (
        small_model(family, "lora"),
        BACKBONES[family].inputs(),
        BACKBONES[family].build(**LARGE[family]),
    )
    pruned_copy(large, 2).save_pretrained(tmp_path / "pruned")
    shapes, given = shapes_of(large), {"ladder": True, "cache": tmp_path / "rows"}
    wanted = adapter_of(small, large, pruned_copy(large, 2), inputs, tmp_path / "plain", **given)
    pruned = PrunedModel.from_pretrained(tmp_path / "pruned", shapes)
    assert_equal(adapter_of(small, shapes, pruned, inputs, tmp_path / "meta", **given), wanted)
    model = bridge(plug(small, shapes_of(large)), PrunedModel.from_pretrained(tmp_path / "pruned", shapes), **given)
    other = {**inputs, "input_ids": inputs["input_ids"] + 1}
    refuses("`plugged` .='.*'. must have weights.*cache lacks rows", ValueError, lambda: model(**other))


def test_a_head_comes_along(tmp_path):
    def model(**overrides):
        torch.manual_seed(0)
        config = AutoConfig.for_model("bert", vocab_size=60, **{**SPECIAL, **BACKBONES["bert"].config, **overrides})
        return AutoModelForSequenceClassification.from_config(config).eval()

    small = get_peft_model(model(), LoraConfig(task_type="SEQ_CLS", target_modules=["query"])).eval()
    randomise(small)
    large, inputs = model(**LARGE["bert"]), BACKBONES["bert"].inputs()
    wanted = adapter_of(small, shapes_of(large), pruned_copy(large, 2), inputs, tmp_path / "meta")
    assert any("classifier" in name for name in wanted)
    assert_equal(wanted, adapter_of(small, large, pruned_copy(large, 2), inputs, tmp_path / "plain"))


def test_trainer(tmp_path):
    """Its checkpoint is the plain adapter too."""
    large, adapters = BACKBONES["llama"].build(**LARGE["llama"]), []
    rows = [{"input_ids": torch.arange(3, 9), "labels": torch.arange(3, 9)}] * 4
    for given in (large, shapes_of(large)):
        args = TrainingArguments(str(tmp_path), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True)
        pruned = pruned_copy(large, 2)
        torch.manual_seed(0)
        BridgeTrainer(plug(small_model("llama", "lora"), given), args, pruned, "paper", train_dataset=rows).train()
        adapters.append(load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors"))
        large = BACKBONES["llama"].build(**LARGE["llama"])
    assert_equal(*adapters)


def test_errors(tmp_path):
    small, large = small_model("llama", "lora"), BACKBONES["llama"].build(**LARGE["llama"])
    shapes, pruned = shapes_of(large), pruned_copy(large, 2)
    batches, projections = [BACKBONES["llama"].inputs(padding="none")], Projections("least_squares")
    call = lambda: plug(small, shapes, projections, batches=batches)  # noqa: E731
    refuses("`large` .='LlamaForCausalLM'. must have weights, and is on.*least squares", ValueError, call)
    plugged = plug(small, shapes)

    def held():
        with delta_bridge(plugged, pruned):
            pass

    refuses("`plugged` .='LlamaForCausalLM'. must have weights.*a delta bridge runs it", ValueError, held)
    refuses("`plugged` .*must have weights", ValueError, lambda: bridge(plugged, pruned, ladder=True)(**batches[0]))
    pruned_copy(large, 2).save_pretrained(tmp_path)
    refuses(
        "`large` .*must have the shapes",
        ValueError,
        lambda: PrunedModel.from_pretrained(tmp_path, small.get_base_model()),
    )
    wider = shapes_of(BACKBONES["llama"].build(**{**LARGE["llama"], "hidden_size": 2 * large.config.hidden_size}))
    refuses("`large` .*must have the shapes", ValueError, lambda: PrunedModel.from_pretrained(tmp_path, wider))
