"""gate_values and the gates' pooling."""

import gc
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from hf_peft_ext import BottleneckConfig, UniPELTConfig, fix_gates, gate_values
from hf_peft_ext.attach.gates import gate_means, gates

from .adapterhub.families import batch, build
from .backbones import BACKBONES, output
from .methods import randomise


@pytest.mark.parametrize("backbone", BACKBONES)
def test_gate_values(backbone):
    """Every layer and sub-layer, between 0 and 1: one gate an example in encoders, one a token where causal."""
    family = BACKBONES[backbone]
    model = get_peft_model(family.build(), UniPELTConfig(bottleneck_size=4))
    randomise(model)
    inputs = family.inputs()
    values = gate_values(model, inputs)
    sublayers = {name.split(".", 1)[1] for name in values}
    assert {"query_low_rank", "value_low_rank", "attention_prefix", "after_residual_bottleneck"} <= sublayers
    layers = 4 if family.kind == "seq2seq" else 2
    assert {int(name.split(".")[0]) for name in values} == set(range(layers))
    for name, value in values.items():
        assert ((value > 0) & (value < 1)).all()
        causal = family.kind == "decoder" or (family.kind == "seq2seq" and int(name.split(".")[0]) >= 2)
        if not causal:
            assert value.shape == (3,)
        elif "cross_value" in name:
            assert value.shape == (3, 9)  # reads the encoder's tokens
        else:
            assert value.shape == (3, inputs.get("decoder_input_ids", inputs["input_ids"]).shape[1])


@pytest.mark.parametrize("backbone", ["bert", "llama", "t5", "bart"])
@pytest.mark.parametrize("pooling", ["mean", "token"])
def test_pooling_can_be_chosen(backbone, pooling):
    """Both forms of the gate on all kinds of model; padding never counts."""
    family = BACKBONES[backbone]
    model = get_peft_model(family.build(), UniPELTConfig(bottleneck_size=4, gate_pooling=pooling))
    randomise(model)
    inputs = family.inputs()
    values = gate_values(model, inputs)
    for value in values.values():
        assert value.shape == (3,) if pooling == "mean" else value.shape in ((3, 9), (3, 7))
    alone = {key: value[1:2] for key, value in inputs.items()}
    alone |= {key: alone[key][:, :6] for key in ("input_ids", "attention_mask")}
    for name, value in gate_values(model, alone).items():
        if pooling == "mean":
            torch.testing.assert_close(value, values[name][1:2])


@pytest.mark.parametrize("family", ["bert", "distilbert", "deberta", "deberta-v2"])
def test_a_mean_gate_is_the_mean_of_the_token_gates_without_padding(family):
    """Whatever kind of mask the attention modules are given: DeBERTa's is of whole numbers."""
    inputs, models = batch(family), {}
    for pooling in ("mean", "token"):
        models[pooling] = get_peft_model(
            build(family), UniPELTConfig(methods=("lora",), gate_pooling=pooling, layers_to_transform=[0])
        )
        randomise(models[pooling])
    means, tokens = (gate_values(models[pooling], inputs) for pooling in ("mean", "token"))
    mask = inputs["attention_mask"]
    assert means
    for name, mean in means.items():
        torch.testing.assert_close(mean, (tokens[name] * mask).sum(1) / mask.sum(1))


@pytest.mark.parametrize("init", ["base", "paper"])
def test_a_closed_token_gate_removes_the_prefix(init):
    """As g falls to 0 the model is the base model again, which scaled keys would not give."""
    family = BACKBONES["llama"]
    inputs = family.inputs(padding="none")
    model = get_peft_model(family.build(), UniPELTConfig(methods=("prefix",), init=init))
    randomise(model)
    with torch.no_grad():
        base = output(family.build(), inputs)
        assert (output(model.eval(), inputs) - base).abs().max() > 0.1
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.zero_()
            if name.endswith("gate.bias"):
                parameter.fill_(-40)
        torch.testing.assert_close(output(model, inputs), base, rtol=0, atol=1e-5)


def test_nothing_grows_over_forwards():
    """The number of live tensors after ten forwards is that after one."""
    family = BACKBONES["bert"]
    model = get_peft_model(family.build(), UniPELTConfig(bottleneck_size=4)).eval()

    def live(times):
        for _ in range(times):
            with torch.no_grad():
                output(model, family.inputs())
            gate_values(model, family.inputs())
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    assert live(1) == live(10)


def test_without_gates_the_error_says_so():
    model = get_peft_model(BACKBONES["bert"].build(), BottleneckConfig())
    with pytest.raises(ValueError, match="has no active adapter with gates"):
        gate_values(model, BACKBONES["bert"].inputs())


def test_mean_gates_where_tokens_are_flattened():
    """OPT flattens tokens in its FFN: a mean over them would mix examples, so it is refused by name."""
    from hf_peft_ext import ComposedConfig, Placement

    placement = Placement("bottleneck", "after_ffn", gate="mean", options={"r": 2})
    model = get_peft_model(BACKBONES["opt"].build(), ComposedConfig(placements=[placement]))
    with pytest.raises(ValueError, match=r"`gate_pooling` \(='mean'\) needs hidden states of shape"):
        output(model, BACKBONES["opt"].inputs())


@pytest.mark.parametrize("backbone", ["bert", "llama", "t5"])
def test_means_and_fixed_gates(backbone):
    """Means over the tokens that are not padding, by the mask of the stack; fixed, every gate is that constant."""
    family = BACKBONES[backbone]
    model = get_peft_model(family.build(), UniPELTConfig(bottleneck_size=4)).train()
    randomise(model)
    inputs = family.inputs(padding="left" if backbone == "llama" else "right")
    masks = [inputs["attention_mask"]]
    if backbone == "t5":
        masks.append(torch.ones_like(inputs["decoder_input_ids"]))
        masks[1][0, 4:] = 0
        inputs["decoder_attention_mask"] = masks[1]
    values, means = gate_values(model, inputs), gate_means(model, inputs)
    assert means.keys() == values.keys()
    for name, value in values.items():
        mask = next((mask for mask in masks if mask.shape == value.shape), None)
        chosen = value if mask is None else value[mask.bool()]
        assert means[name] == pytest.approx(chosen.mean().item(), rel=1e-5)
    assert fix_gates(model, inputs) == means
    for name, gate in gates(model).items():
        assert gate.is_constant
        assert torch.sigmoid(gate.bias).item() == pytest.approx(means[name], abs=1e-5)
    fixed = gate_values(model, inputs)
    assert {name: value.mean().item() for name, value in fixed.items()} == pytest.approx(means, abs=1e-5)
    assert not any(module._forward_hooks for gate in gates(model).values() for module in gate.modules())
    assert all(module.training for module in model.modules())


def test_gates_of_two_adapters():
    """With two active adapters a name begins with the adapter's; a batch that mixes adapters is refused."""
    model = get_peft_model(BACKBONES["bert"].build(), UniPELTConfig(methods=("lora",), layers_to_transform=[0]))
    model.add_adapter("other", UniPELTConfig(methods=("lora",), layers_to_transform=[0]))
    alone = set(gates(model))
    model.base_model.set_adapter(["default", "other"])
    both = gates(model)
    assert set(both) == {f"{adapter}.{name}" for adapter in ("default", "other") for name in alone}
    assert len({id(gate) for gate in both.values()}) == len(both) == 2 * len(alone)
    inputs = {**BACKBONES["bert"].inputs(), "adapter_names": ["default"] * 3}
    with pytest.raises(ValueError, match=r"`batch` \(=\['adapter_names', .*\) must not mix adapters"):
        gate_values(model, inputs)


@pytest.mark.parametrize("init", [None, -1.5, {"prefix": -5.0, "lora": 1.0}, "paper"])
def test_gates_before_training(init):
    """2 by default, 0 in the paper, or a number for all or for some; kept by a saved config."""
    kwargs = {"init": "paper"} if init == "paper" else {"gate_init": init}
    config = UniPELTConfig(bottleneck_size=4, **kwargs)
    for setting in (config, UniPELTConfig(**json.loads(json.dumps(config.to_dict(), default=list)))):
        for name, gate in gates(get_peft_model(BACKBONES["bert"].build(), setting)).items():
            kind = "prefix" if "prefix" in name else "lora" if "low_rank" in name else "adapter"
            expected = {None: 2.0, "paper": 0.0}.get(init, init) if not isinstance(init, dict) else init.get(kind, 2.0)
            assert gate.bias.item() == expected


SEQ2SEQ = {
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 99, "max_position_embeddings": 64},
}


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("bigbird_pegasus", {"attention_type": "original_full"}),
        ("pegasus_x", {"block_size": 4}),
        ("nllb-moe", {"num_experts": 4, "expert_capacity": 64, "encoder_sparse_step": 2, "decoder_sparse_step": 2}),
    ],
)
def test_decoders_that_do_not_call_themselves_causal(model_type, options):
    """Their attention modules say `is_causal=False`, and get a mask that is causal: no gate may read later tokens."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SEQ2SEQ, **options)
    model = get_peft_model(AutoModelForSeq2SeqLM.from_config(config), UniPELTConfig()).eval()
    randomise(model)
    ids = torch.arange(3, 11)[None]
    decoded = torch.arange(20, 28)[None]
    changed = torch.cat([decoded[:, :5], decoded[:, 5:] + 30], 1)
    with torch.no_grad():
        first, second = (model(input_ids=ids, decoder_input_ids=given).logits for given in (decoded, changed))
    torch.testing.assert_close(first[:, :5], second[:, :5])
    assert not torch.allclose(first[:, 5:], second[:, 5:])


def test_attention_that_is_replaced_by_a_forward(tmp_path):
    """A short text has BigBird replace its attention modules; a reloaded adapter has the same gates all the same."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = AutoConfig.for_model("big_bird", vocab_size=60, block_size=4, pad_token_id=0, **sizes)

    def base():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(config).eval()

    inputs = {"input_ids": torch.arange(3, 12)[None], "attention_mask": torch.tensor([[1] * 6 + [0] * 3])}
    ran = base()
    output(ran, inputs)
    model = get_peft_model(ran, UniPELTConfig(task_type="SEQ_CLS")).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(output(loaded, inputs), output(model, inputs))
    with pytest.raises(ValueError, match="whose padding cannot be read; use 'token'"):
        get_peft_model(base(), UniPELTConfig(task_type="SEQ_CLS", gate_pooling="mean"))
