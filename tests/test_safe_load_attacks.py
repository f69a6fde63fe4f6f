"""The attacks that stock peft lets through: load_adapter refuses them, and after each refusal the base model is
unchanged, down to its hooks.

Each attack is first run on stock peft, so that the test says so when peft closes the hole.
"""

import signal
import time
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from hf_peft_ext import load_adapter
from hf_peft_ext.validation.module_patterns import matching

from .backbones import BACKBONES, output
from .methods import METHODS
from .saved_adapters import (
    CONFIG,
    EXPECTED_WARNINGS,
    STOCK_METHODS,
    WEIGHTS,
    Largest,
    fingerprint,
    refused,
    reweigh,
    rewrite,
    saved,
)

pytestmark = EXPECTED_WARNINGS
# The attacks: stock peft lets them through


OVERWRITTEN = {
    "q_proj": "model.layers.0.self_attn.q_proj.weight",
    "embeddings": "model.embed_tokens.weight",
    "lm_head": "lm_head.weight",
}


@pytest.mark.parametrize("method", ["lora", "unipelt"])
@pytest.mark.parametrize("target", OVERWRITTEN)
def test_extra_keys_that_overwrite_the_base_model(target, method, tmp_path):
    saved(tmp_path, {**METHODS, **STOCK_METHODS}[method]())
    base, name = BACKBONES["llama"].build(), OVERWRITTEN[target]
    weight = base.get_parameter(name).detach().clone()
    key = f"base_model.model.{name}"
    if (target, method) == ("q_proj", "lora"):
        key = key.replace("q_proj.", "q_proj.base_layer.")
    reweigh(tmp_path, lambda tensors: tensors.update({key: torch.zeros_like(weight)}))
    if method == "lora":
        stock = PeftModel.from_pretrained(base, tmp_path)
        assert not stock.state_dict()[key].any()
    else:  # ours are refused on the stock way too, with the base weights as they were
        with pytest.raises(ValueError, match="holds tensors that are no part of the adapter"):
            PeftModel.from_pretrained(base, tmp_path)
        assert torch.equal(base.get_parameter(name), weight)
    refused(tmp_path, f"holds tensors that its config does not imply: {key}")


def test_adapter_name_that_is_a_path(tmp_path):
    outside = str(tmp_path / "outside")
    saved(tmp_path / "adapter", STOCK_METHODS["lora"]())
    stock = PeftModel.from_pretrained(BACKBONES["llama"].build(), tmp_path / "adapter", adapter_name=outside)
    stock.save_pretrained(tmp_path / "inside")
    assert (tmp_path / "outside" / WEIGHTS).exists()
    for name in (outside, "../up", "a.b", "", "a" * 201, "name\n", "a\\b"):
        refused(tmp_path / "adapter", "`adapter_name` .* must have 1 to 200 characters", adapter_name=name)
    with pytest.raises(ValueError, match=r"`adapter_name` .* must have 1 to 200 characters"):
        get_peft_model(BACKBONES["llama"].build(), METHODS["unipelt"](), adapter_name=outside)


@pytest.mark.parametrize("name", ["weight", "lora_A", "model", "layers", "0", "q_proj", "base_layer", "lm_head"])
@pytest.mark.parametrize("method", ["lora_modules_to_save", "unipelt", "ia3"])
def test_adapter_name_that_is_a_part_of_the_model(method, name, tmp_path):
    """Either it is refused, or it works as any other name."""
    saved(tmp_path, {**METHODS, **STOCK_METHODS}[method]())
    family = BACKBONES["llama"]
    base, plain = family.build(), load_adapter(family.build(), tmp_path)
    before = fingerprint(base)
    try:
        loaded = load_adapter(base, tmp_path, name)
    except ValueError:
        assert fingerprint(base) == before
    else:
        with torch.no_grad():
            assert torch.equal(output(loaded, family.inputs()), output(plain, family.inputs()))


class StillBusyError(Exception):
    pass


@contextmanager
def at_most(seconds):
    """Raise StillBusyError in the main thread after some seconds."""

    def stop(*_):
        raise StillBusyError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


EVIL = r"(\w|.)*\d\d\d"


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "modules_to_save", "sites"])
def test_patterns_that_take_for_ever(field, tmp_path):
    """Stock peft is still matching after a second, and would be for hours."""
    saved(tmp_path, METHODS["unipelt"]() if field == "sites" else STOCK_METHODS["lora"]())
    value = {"rank_pattern": {EVIL: 4}, "modules_to_save": [EVIL], "sites": {"query": EVIL}}.get(field, EVIL)
    rewrite(tmp_path, **{field: value})
    if field != "sites":
        with pytest.raises(StillBusyError), at_most(1):
            PeftModel.from_pretrained(BACKBONES["llama"].build(), tmp_path)
    else:
        with pytest.raises(ValueError, match="takes too long to match"):
            PeftModel.from_pretrained(BACKBONES["llama"].build(), tmp_path)
    start = time.process_time()
    refused(tmp_path, "takes too long to match|must name modules by letters")
    assert time.process_time() - start < 2


def test_a_loaded_config_names_modules_without_expressions(tmp_path):
    """peft matches no regular expression of an untrusted adapter again; the paths stand for it."""
    saved(tmp_path, LoraConfig(target_modules=r".*\.(q|v)_proj"))
    config = load_adapter(BACKBONES["llama"].build(), tmp_path).peft_config["default"]
    layers = range(BACKBONES["llama"].build().config.num_hidden_layers)
    expected = {f"model.layers.{i}.self_attn.{name}_proj" for i in layers for name in "qv"}
    assert set(config.target_modules) == expected


def test_patterns_match_as_in_peft():
    paths = ["model.layers.0.q_proj", "model.layers.1.q_proj", "layers.0.q_proj", "model.layers.0.q_proj.x"]
    assert matching(r".*\.0\..*proj", paths) == ["model.layers.0.q_proj", "layers.0.q_proj"]
    assert matching(["layers.0.q_proj"], paths) == ["model.layers.0.q_proj", "layers.0.q_proj"]
    with pytest.raises(ValueError, match=r"The pattern '\(' is no regular expression"):
        matching("(", paths)


@pytest.mark.parametrize("method", ["lora", "lora_branch"])
def test_rank_of_three_million(method, tmp_path):
    """Stock peft allocates what the config asks for before it compares shapes (here a hundredth of it)."""
    saved(tmp_path, {**METHODS, **STOCK_METHODS}[method]())
    rewrite(tmp_path, r=30_000)
    with pytest.raises((RuntimeError, ValueError), match=r"size mismatch|has shape"), Largest() as stock:
        PeftModel.from_pretrained(BACKBONES["llama"].build(), tmp_path)
    assert stock.numel >= 30_000 * 32
    base = BACKBONES["llama"].build()
    for r, message in ((3_000_000, "`r` \\(=3000000\\) must be a finite number of at most"), (30_000, "has shape")):
        with pytest.raises(ValueError, match=message), Largest() as ours:
            load_adapter(base, rewrite(tmp_path, r=r))
        assert ours.numel < 30_000


def test_what_no_file_has_to_hold_is_not_allocated(tmp_path):
    """The network behind a prefix is not saved, so a small file could ask for a wide one."""
    saved(tmp_path, METHODS["layer_prefix"]())
    rewrite(tmp_path, prefix_projection=True, encoder_hidden_size=2**20)
    refused(tmp_path, "The adapter would allocate .* numbers, but its file must hold")


@pytest.mark.parametrize("method", ["lora", "unipelt"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_weights_that_are_not_finite(value, method, tmp_path):
    saved(tmp_path, {**METHODS, **STOCK_METHODS}[method]())
    reweigh(tmp_path, lambda tensors: next(iter(tensors.values())).view(-1)[3:4].fill_(value))
    if method == "lora":
        PeftModel.from_pretrained(BACKBONES["llama"].build(), tmp_path)
    elif value != 1e30:
        with pytest.raises(ValueError, match="holds weights that are not finite"):
            PeftModel.from_pretrained(BACKBONES["llama"].build(), tmp_path)
    refused(tmp_path, "holds a weight that is not finite")


@pytest.mark.parametrize("text", ["Infinity", "NaN", "1e999"])
def test_alpha_that_is_not_finite(text, tmp_path):
    saved(tmp_path, STOCK_METHODS["lora"]())
    path = tmp_path / CONFIG
    path.write_text(path.read_text().replace('"lora_alpha": 8', f'"lora_alpha": {text}'))
    stock = PeftModel.from_pretrained(BACKBONES["llama"].build(), tmp_path)
    assert not output(stock, BACKBONES["llama"].inputs()).isfinite().all()
    refused(tmp_path, "is not a number|must be a finite number")


@pytest.mark.parametrize("method", ["lora", "unipelt"])
def test_pickles(method, tmp_path):
    saved(tmp_path, {**METHODS, **STOCK_METHODS}[method]())
    torch.save(load_file(tmp_path / WEIGHTS), tmp_path / "adapter_model.bin")
    (tmp_path / WEIGHTS).unlink()
    if method == "lora":
        PeftModel.from_pretrained(BACKBONES["llama"].build(), tmp_path)
    else:
        with pytest.raises(ValueError, match="holds its weights as a pickle"):
            PeftModel.from_pretrained(BACKBONES["llama"].build(), tmp_path)
    refused(tmp_path, "has no adapter_model.safetensors; pickles such as adapter_model.bin are not loaded")
