"""load_adapter refuses fields, tensors and files that are wrong or reach beyond the adapter; the base
model is unchanged.
"""

import json
import shutil
import time

import pytest
import torch
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file

from hf_peft_ext import ComposedConfig, Placement, load_adapter

from .backbones import BACKBONES
from .methods import METHODS, OTHERS
from .saved_adapters import (
    CONFIG,
    EXPECTED_WARNINGS,
    STOCK_METHODS,
    WEIGHTS,
    assert_equal_to_stock,
    fingerprint,
    refused,
    reweigh,
    rewrite,
    saved,
)

pytestmark = EXPECTED_WARNINGS
# Further refusals

FORBIDDEN = {
    "bias": "all",
    "init_lora_weights": "pissa",
    "kasa_config": {"beta": 1e-4},
    "layer_replication": [[0, 2], [0, 2]],
    "megatron_config": {"a": 1},
    "megatron_core": "os",
    "arrow_config": {"top_k": 2},
    "monteclora_config": {"num_samples": 2},
    "use_bdlora": {"nblocks": 2},
    "velora_config": {"num_groups": 2},
    "tokenizer_kwargs": {"trust_remote_code": True},
}


@pytest.mark.parametrize("field", FORBIDDEN)
def test_fields_that_reach_beyond_the_adapter(field, tmp_path):
    saved(tmp_path, STOCK_METHODS["prompt_tuning" if field == "tokenizer_kwargs" else "lora"]())
    refused(rewrite(tmp_path, **{field: FORBIDDEN[field]}), f"`{field}`")


BAD_FIELDS = [
    ({"gatd": True}, "`gatd` \\(=True\\) is not a field of LoraConfig"),
    ({"r": "8"}, "`r` \\(='8'\\) must be of type int"),
    ({"r": True}, "`r` \\(=True\\) must be of type int"),
    ({"lora_dropout": "0"}, "`lora_dropout` \\(='0'\\) must be of type float"),
    ({"lora_dropout": 1.0}, "`lora_dropout` \\(=1.0\\) must lie in \\[0, 1\\)"),
    ({"use_dora": 1}, "`use_dora` \\(=1\\) must be of type bool"),
    ({"target_modules": {"q_proj": 1}}, "`target_modules` .* must be of type"),
    ({"target_modules": ["x"] * 5000}, "`target_modules` .* must have at most 4096 entries"),
    ({"target_modules": "a" * 2**16}, "`target_modules` .* must have at most 32768 characters"),
    ({"target_modules": r"no\.such"}, "`target_modules` .* matches no module"),
    ({"target_modules": ["nosuch"]}, "`target_modules` .* names no module of this model"),
    ({"target_modules": "(q_proj|(?R))"}, "is no regular expression: unknown extension"),
    ({"modules_to_save": [f"x{i}" for i in range(65)]}, "`modules_to_save` .* must have at most 64 entries"),
    ({"bias": None}, "`bias` \\(=None\\) must be of type Literal\\['none', 'all', 'lora_only'\\]"),
    ({"auto_mapping": {"a": [[[[[[1]]]]]]}}, "`auto_mapping` .* 5 levels"),
    ({"peft_type": "XLORA"}, "`peft_type` \\(='XLORA'\\) loads further adapters"),
    ({"peft_type": "NEWEST"}, "`peft_type` \\(='NEWEST'\\) must be one of those that are checked"),
    ({"peft_type": ["LORA"]}, "`peft_type` .* must be one of those"),
    ({"modules_to_save": ["a|b"]}, "`modules_to_save` .* must name modules by"),
    ({"r": -1}, "makes no LoraConfig|does not fit|positive"),
    ({"lora_dropout": 3.0}, "`lora_dropout` \\(=3.0\\) must lie in"),
    ({"trainable_token_indices": [10**5]}, "`token_indices` .* must be rows of 0 to 59"),
    ({"lora_alpha": 2**21}, "`lora_alpha` .* must be a finite number of at most"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_FIELDS, ids=[str(i) for i in range(len(BAD_FIELDS))])
def test_bad_fields(fields, message, tmp_path):
    refused(rewrite(saved(tmp_path, STOCK_METHODS["lora"]()), **fields), message)


def test_many_names_take_no_time(tmp_path):
    """Stock peft compiles a regular expression for each of them and each module: minutes."""
    saved(tmp_path, STOCK_METHODS["lora"]())
    names = [f"x{i}" for i in range(4000)]
    targets = json.loads((tmp_path / CONFIG).read_text())["target_modules"]
    rewrite(tmp_path, target_modules=[*targets, *names], exclude_modules=names, rank_pattern=dict.fromkeys(names, 2))
    start = time.process_time()
    model = load_adapter(BACKBONES["llama"].build(), tmp_path)
    assert time.process_time() - start < 2
    assert model.peft_config["default"].target_modules == set(targets)


def test_a_rank_for_each_module(tmp_path):
    """More names than peft is given one by one, and each still has its rank."""
    ranks = {f"model.layers.{i}.self_attn.{leaf}": 1 + i % 3 for i in range(40) for leaf in ("q_proj", "v_proj")}
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], rank_pattern=ranks)
    model = get_peft_model(BACKBONES["llama"].build(num_hidden_layers=40), config)
    model.save_pretrained(tmp_path)
    loaded = load_adapter(BACKBONES["llama"].build(num_hidden_layers=40), tmp_path)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert {name: p.shape for name, p in loaded.named_parameters()} == shapes


def test_oft_that_never_ends(tmp_path):
    saved(tmp_path, STOCK_METHODS["oft"]())
    refused(rewrite(tmp_path, num_cayley_neumann_terms=2**20), "`num_cayley_neumann_terms` .* must be at most 64")


@pytest.mark.parametrize("method", ["lora", "unipelt"])
def test_fields_of_other_versions_that_say_nothing(method, tmp_path):
    """peft writes all its fields, and another version has others; where they are null nothing is lost."""
    saved(tmp_path, (METHODS | STOCK_METHODS)[method]())
    rewrite(tmp_path, of_peft_0_30=None, of_peft_0_2={}, runtime_config={"ephemeral_gpu_offload": False})
    assert_equal_to_stock(tmp_path, BACKBONES["llama"])


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "norm", "input_layernorm"])
def test_names_on_the_stock_way(name, tmp_path):
    """An adapter may be named like a part of the model, and still its file cannot bring weights of that part along."""
    path = saved(tmp_path, METHODS["unipelt"]()) / WEIGHTS
    base = BACKBONES["llama"].build()
    PeftModel.from_pretrained(base, tmp_path, adapter_name=name).unload()
    before = fingerprint(base)
    part = next(key for key in base.state_dict() if name in key.split("."))
    save_file({**load_file(path), f"base_model.model.{part}": torch.ones_like(base.state_dict()[part])}, path)
    with pytest.raises(ValueError, match="holds tensors that are no part of the adapter"):
        PeftModel.from_pretrained(base, tmp_path, adapter_name=name)
    assert fingerprint(base) == before


@pytest.mark.parametrize("method", ["unipelt", "ladder"])
def test_tensors_of_another_adapter(method, tmp_path):
    """A file cannot bring tensors for an adapter of the model whose name begins as its own does."""
    make = (METHODS | OTHERS)[method]
    path = saved(tmp_path, make()) / WEIGHTS
    model = get_peft_model(BACKBONES["llama"].build(), make(), adapter_name="mine2")
    before = fingerprint(model)
    key = next(name for name, _ in model.named_parameters() if ".mine2." in name)
    save_file({**load_file(path), key: torch.ones_like(model.get_parameter(key))}, path)
    with pytest.raises(ValueError, match="holds tensors that are no part of the adapter"):
        model.load_adapter(str(tmp_path), "mine")
    assert list(model.peft_config) == ["mine2"]
    assert fingerprint(model) == before


def test_tokens_beyond_the_vocabulary(tmp_path):
    saved(tmp_path, TrainableTokensConfig(token_indices=[1, 2, 3]))
    assert_equal_to_stock(tmp_path, BACKBONES["llama"])
    for row in (60, -1):
        refused(rewrite(tmp_path, token_indices=[1, 2, row]), "`token_indices` .* must be rows of")


def test_a_key_that_stands_there_twice(tmp_path):
    """Python's reader of JSON takes the last one, others the first."""
    path = saved(tmp_path, STOCK_METHODS["lora"]()) / CONFIG
    path.write_text(path.read_text().replace("{", '{"r": 4, ', 1))
    refused(tmp_path, "is not strict JSON: duplicate key")


def test_floats_that_are_stored_as_whole_numbers(tmp_path):
    saved(tmp_path, STOCK_METHODS["lora"]())
    reweigh(tmp_path, lambda tensors: tensors.update({k: t.long() for k, t in list(tensors.items())[:1]}))
    refused(tmp_path, "is of type I64, but its config implies torch.float32")


def test_a_header_that_is_longer_than_the_file(tmp_path):
    """By one byte; the length itself takes eight."""
    path = saved(tmp_path, STOCK_METHODS["lora"]()) / WEIGHTS
    size = path.stat().st_size
    path.write_bytes((size - 7).to_bytes(8, "little") + path.read_bytes()[8:])
    refused(tmp_path, f"has a header of {size - 7} bytes, but the file has {size}")


def test_prompts_of_another_model(tmp_path):
    saved(tmp_path, STOCK_METHODS["prefix_tuning"]())
    refused(rewrite(tmp_path, num_layers=1), "`num_layers` \\(=1\\) must be 2, as in this model")
    refused(rewrite(tmp_path, num_layers=2, num_transformer_submodules=3), "`num_transformer_submodules` \\(=3\\)")


def test_another_size_of_model(tmp_path):
    saved(tmp_path, STOCK_METHODS["lora"]())
    base = BACKBONES["llama"].build(hidden_size=16)
    before = fingerprint(base)
    with pytest.raises(ValueError, match="has shape \\(8, 32\\), but its config implies \\(8, 16\\)"):
        load_adapter(base, tmp_path)
    assert fingerprint(base) == before


def test_a_peft_model_is_left_as_it_was(tmp_path):
    saved(tmp_path, METHODS["unipelt"]())
    reweigh(tmp_path, lambda tensors: tensors.pop(next(iter(tensors))))
    model = get_peft_model(BACKBONES["llama"].build(), METHODS["unipelt"]())
    before = fingerprint(model)
    with pytest.raises(ValueError, match="lacks tensors"):
        load_adapter(model, tmp_path, "second")
    assert fingerprint(model) == before
    assert list(model.peft_config) == ["default"]


def test_wrong_types_of_ours_on_the_stock_way(tmp_path):
    """Configs of ours are checked wherever peft reads them."""
    placements = [Placement("low_rank", "query", options={"r": 2})]
    saved(tmp_path, ComposedConfig(placements=placements))
    bad = [
        ({"placements": [{"sublayer": "low_rank", "site": 3}]}, "`placements` .* must be of type"),
        ({"placements": [{"sublayer": "low_rank", "site": "query", "x": 1}]}, "`placements` .* must be of type"),
        ({"layers_to_transform": 2**30}, "`layers_to_transform` .* must be a finite number of at most"),
    ]
    for fields, message in bad:
        shutil.copytree(tmp_path, tmp_path / "bad", dirs_exist_ok=True)
        base = BACKBONES["llama"].build()
        before = fingerprint(base)
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(base, rewrite(tmp_path / "bad", **fields))
        assert fingerprint(base) == before


def test_arguments_of_a_wrong_kind(tmp_path):
    with pytest.raises(TypeError, match="`model` must be a torch module, not str"):
        load_adapter("model", tmp_path)
    with pytest.raises(TypeError, match="`adapter_name` must be text, not NoneType"):
        load_adapter(BACKBONES["llama"].build(), tmp_path, None)
    with pytest.raises(TypeError, match="`id_or_path` must be text, not NoneType"):
        load_adapter(BACKBONES["llama"].build(), None)
    refused("/no/such/folder", "`id_or_path` .* is neither a folder nor an id on the Hub")
    refused(tmp_path, "has no adapter_config.json")
