"""Adapters on 4-bit models (NF4 with double quantisation): each against the same adapter on a fresh 4-bit model.

On processors with AVX512-BF16, bitsandbytes repacks 4-bit weights at the first evaluation forward on the CPU, after
which training silently has no gradients. The tests that mix evaluation and training are there for that.
"""

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig

from hf_peft_ext import TFewConfig

from .backbones import BACKBONES, output
from .methods import METHODS, randomise

bitsandbytes = pytest.importorskip("bitsandbytes")

WIDE = {  # a 4-bit block is 64 wide, and only whole blocks are repacked
    "bert": {"hidden_size": 64, "intermediate_size": 128},
    "llama": {"hidden_size": 64, "intermediate_size": 128},
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 128},
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CASES = [(method, backbone) for backbone in ("bert", "llama") for method in METHODS] + [
    ("unipelt", "t5"),
    ("s4", "t5"),
]
every_case = pytest.mark.parametrize(("method", "backbone"), CASES)
few_cases = pytest.mark.parametrize(
    ("method", "backbone"), [(m, b) for b in ("bert", "llama", "t5") for m in ("unipelt", "mam", "bitfit")]
)
every_device = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders with the saved base models, made when asked for."""
    made = {}

    def folder(backbone):
        if backbone not in made:
            made[backbone] = tmp_path_factory.mktemp(backbone)
            BACKBONES[backbone].build(**WIDE[backbone]).save_pretrained(made[backbone])
        return made[backbone]

    return folder


@pytest.fixture
def four_bit(folders):
    """Loads a tiny model in 4 bits, the same at every call."""

    def load(backbone, device="cpu"):
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
        cls = type(BACKBONES[backbone].build())
        return cls.from_pretrained(folders(backbone), quantization_config=config, device_map={"": device}).eval()

    return load


def prepared(base, checkpointing="nonreentrant"):
    """What peft's documentation does with a 4-bit model before it gets an adapter."""
    kwargs = {"use_reentrant": checkpointing == "reentrant"}
    return prepare_model_for_kbit_training(
        base, use_gradient_checkpointing=checkpointing != "none", gradient_checkpointing_kwargs=kwargs
    )


def inputs_for(backbone, device="cpu"):
    return {key: value.to(device) for key, value in BACKBONES[backbone].inputs().items()}


def gradients(model, inputs):
    """Backward of one batch: name -> gradient of every adapter weight."""
    model.zero_grad()
    kwargs = {} if model.base_model.model.config.model_type == "bert" else {"use_cache": False}
    y = output(model, inputs, **kwargs).float()
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(
        y.device
    )  # not y y: after a layer norm, that is constant
    (y * probe).mean().backward()
    dead = ("pooler", "is_decoder")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and not any(d in n for d in dead)}
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    return {name: parameter.grad.clone() for name, parameter in trained.items()}


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        torch.testing.assert_close(second[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@every_device
@every_case
@pytest.mark.parametrize("checkpointing", ["none", "nonreentrant", "reentrant"])
def test_every_adapter_weight_has_a_gradient(method, backbone, device, checkpointing, four_bit):
    """Prepared as peft says, with gradient checkpointing or not, all adapter weights train."""
    base = four_bit(backbone, device)
    assert sum(isinstance(m, bitsandbytes.nn.Linear4bit) for m in base.modules()) > 8
    model = get_peft_model(prepared(base, checkpointing), METHODS[method]())
    randomise(model)
    model.train()
    found = gradients(model, inputs_for(backbone, device))
    assert len(found) > 1
    small = [name for name, g in found.items() if g.abs().max() == 0]
    assert all("key_low_rank" in name or ("trained_bias" in name and "key" in name) for name in small), small


@every_device
@every_case
def test_reload_on_a_fresh_model(method, backbone, device, four_bit, tmp_path):
    """Trained for a step, evaluated, saved; reloaded on a fresh 4-bit model, the outputs are equal."""
    inputs = inputs_for(backbone, device)
    model = get_peft_model(prepared(four_bit(backbone, device)), METHODS[method]())
    randomise(model)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    gradients(model, inputs)
    optimizer.step()
    with torch.no_grad():
        expected = output(model.eval(), inputs)
        model.save_pretrained(tmp_path)
        with model.disable_adapter():
            base = output(model, inputs)
        again = PeftModel.from_pretrained(prepared(four_bit(backbone, device)), tmp_path)
        assert torch.equal(output(again.eval(), inputs), expected)
        assert (expected - base).abs().max() > 1e-2


# bitsandbytes' repacking on the CPU


@few_cases
def test_train_evaluate_train(method, backbone, four_bit):
    """An evaluation forward in between changes no gradient."""
    inputs = inputs_for(backbone)
    model = get_peft_model(prepared(four_bit(backbone)), METHODS[method]())
    randomise(model)
    without_dropout(model)
    first = gradients(model.train(), inputs)
    with torch.no_grad():
        evaluated = output(model.eval(), inputs)
        assert torch.equal(output(model, inputs), evaluated)
    assert_same(first, gradients(model.train(), inputs))


@few_cases
@pytest.mark.parametrize("when", ["before preparing", "before get_peft_model"])
def test_evaluated_before_it_got_an_adapter(method, backbone, when, four_bit):
    """A 4-bit model that was used before trains like a fresh one, up to what the repacking itself rounds away."""
    inputs = inputs_for(backbone)

    def tuned(*evaluate):
        base = four_bit(backbone)
        for stage in ("before preparing", "before get_peft_model"):
            if stage in evaluate:
                with torch.no_grad():
                    output(base.eval(), inputs)
            if stage == "before preparing":
                base = prepared(base)
        model = get_peft_model(base, METHODS[method]())
        randomise(model)
        without_dropout(model)
        return model.train()

    fresh, used = gradients(tuned(), inputs), gradients(tuned(when), inputs)
    assert fresh.keys() == used.keys()
    expected, found = (torch.cat([g.flatten() for g in grads.values()]) for grads in (fresh, used))
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_evaluating_the_base_repacks_nothing_once_an_adapter_is_in(four_bit):
    """No 4-bit weight is repacked by evaluation, also with adapters disabled; a second adapter changes none either."""
    inputs = inputs_for("llama")
    model = get_peft_model(four_bit("llama"), METHODS["unipelt"]()).eval()
    with torch.no_grad():
        output(model, inputs)
        with model.disable_adapter():
            output(model, inputs)
        model.add_adapter("other", METHODS["unipelt"]())
        output(model, inputs)
    leaves = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert leaves
    assert not any(getattr(m.weight.quant_state, "packing_format_for_cpu", False) for m in leaves)


# merging


@every_device
@pytest.mark.parametrize("method", ["lora_branch", "bitfit"])
@pytest.mark.parametrize("backbone", ["bert", "llama"])
def test_merge_into_four_bits(method, backbone, device, four_bit):
    """Merged, a branch is quantised with the weight: near the unmerged outputs; unmerged again, near the start's."""
    inputs = inputs_for(backbone, device)
    model = get_peft_model(four_bit(backbone, device), METHODS[method]())
    randomise(model, std=0.1)
    model.eval()
    with torch.no_grad():
        expected = output(model, inputs)
        with model.disable_adapter():
            base = output(model, inputs)
        model.merge_adapter()
        merged = output(model, inputs)
        model.unmerge_adapter()
        unmerged = output(model, inputs)
    assert (expected - base).norm() > 0.05 * base.norm()
    assert (merged - expected).norm() < 0.5 * (expected - base).norm()
    assert (unmerged - expected).norm() < 0.5 * (expected - base).norm()


@pytest.mark.filterwarnings("ignore:The merged model has biases:UserWarning")
@every_device
@pytest.mark.parametrize("method", ["lora_branch", "bitfit"])
def test_merge_and_unload(method, device, four_bit):
    """merge_and_unload leaves a plain 4-bit model with the adapter in its weights."""
    inputs = inputs_for("llama", device)
    model = get_peft_model(four_bit("llama", device), METHODS[method]())
    randomise(model, std=0.1)
    with torch.no_grad():
        expected = output(model.eval(), inputs)
        base = output(four_bit("llama", device), inputs)
        merged = model.merge_and_unload()
        assert (output(merged, inputs) - expected).norm() < 0.5 * (expected - base).norm()
    assert not any("sublayer_of" in name for name, _ in merged.named_parameters())
    assert sum(isinstance(m, bitsandbytes.nn.Linear4bit) for m in merged.modules()) > 8


@every_device
@every_case
def test_unload(method, backbone, device, four_bit):
    """Unloaded, the 4-bit model gives the outputs of a fresh one."""
    inputs = inputs_for(backbone, device)
    model = get_peft_model(four_bit(backbone, device), METHODS[method]())
    randomise(model)
    fresh = get_peft_model(four_bit(backbone, device), METHODS["bitfit"]())
    with torch.no_grad():
        output(model.eval(), inputs)
        with fresh.disable_adapter():
            assert torch.equal(output(model.unload(), inputs), output(fresh.eval(), inputs))


@every_device
@pytest.mark.parametrize("backbone", WIDE)
def test_tfew(backbone, device, four_bit, tmp_path):
    """T-Few's (IA)^3, of peft's own type: trained, evaluated, trained again, saved, reloaded, mixed."""
    inputs = inputs_for(backbone, device)
    model = get_peft_model(prepared(four_bit(backbone, device)), TFewConfig())
    assert any(type(module).__name__ == "Linear4bit" and hasattr(module, "ia3_l") for module in model.modules())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        found = gradients(model.train(), inputs)
        assert all(g.abs().max() > 0 for g in found.values())
        optimizer.step()
        with torch.no_grad():
            expected = output(model.eval(), inputs)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        again = PeftModel.from_pretrained(prepared(four_bit(backbone, device)), tmp_path).eval()
        assert torch.equal(output(again, inputs), expected)
        with again.disable_adapter():
            base = output(again, inputs)
        assert (expected - base).abs().max() > 1e-2
        mixed = output(again, inputs, adapter_names=["default", "__base__", "default"])
    torch.testing.assert_close(mixed[0], expected[0], rtol=1e-3, atol=1e-3)
    rows = slice(None) if backbone == "t5" else slice(None, -3)  # the rest is padding
    torch.testing.assert_close(mixed[1][rows], base[1][rows], rtol=1e-3, atol=1e-3)
