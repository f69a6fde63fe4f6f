"""load_adapter: what stock peft loads well it loads with equal logits; the attacks that stock peft lets through it
refuses, and after each refusal the base model is what it was, down to its hooks.

Each attack is first run on stock peft, so that the test says so when peft closes the hole.
"""

import copy
import hashlib
import json
import shutil
import signal
import time
from contextlib import contextmanager

import pytest
import torch
from huggingface_hub import upload_file
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from peft import (
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PeftModelForSequenceClassification,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForSequenceClassification, BitsAndBytesConfig

from hf_peft_ext import ComposedConfig, Placement, UniPELTConfig, load_adapter
from hf_peft_ext.hub_cards import push_adapter
from hf_peft_ext.loading import expected_tensors
from hf_peft_ext.loading.config import ONLY, STOCK
from hf_peft_ext.validation.module_patterns import matching

from .backbones import BACKBONES, SPECIAL, VOCAB, output
from .hub_server import STRANGER
from .methods import METHODS, OTHERS, randomise

# peft's advice on settings that are as they should be here
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    # 2026-11: peft 0.21's prefix tuning calls models by the name that transformers 5.24 gave up
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
QV = {"target_modules": ["q_proj", "v_proj"]}
CAUSAL = {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}
STOCK_METHODS = {
    "lora": lambda: LoraConfig(**QV),
    "lora_causal": lambda: LoraConfig(task_type="CAUSAL_LM", use_rslora=True, lora_alpha=3, **QV),
    "lora_dora": lambda: LoraConfig(use_dora=True, **QV),
    "lora_modules_to_save": lambda: LoraConfig(modules_to_save=["lm_head"], **QV),
    "lora_tokens": lambda: LoraConfig(trainable_token_indices=[1, 2, 5], **QV),
    "lora_ranks": lambda: LoraConfig(rank_pattern={"layers.0.self_attn.q_proj": 3}, **QV),
    "lora_rank_patterns": lambda: LoraConfig(
        rank_pattern={r".*\.0\..*q_proj": 3, "v_proj": 2}, alpha_pattern={r"^model\.layers\.1.*": 3}, **QV
    ),
    "lora_bias": lambda: LoraConfig(lora_bias=True, **QV),
    "lora_all_linear": lambda: LoraConfig(target_modules="all-linear", layers_to_transform=None, r=4),
    "lora_some_layers": lambda: LoraConfig(layers_to_transform=[1], layers_pattern="layers", **QV),
    "lora_pattern": lambda: LoraConfig(target_modules=r".*\.[qv]_proj", exclude_modules=r".*\.0\..*q_proj"),
    "lora_eva": lambda: LoraConfig(init_lora_weights="eva", **QV),
    "ia3": lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "ia3_pattern": lambda: IA3Config(target_modules=r".*(k|down)_proj", feedforward_modules=r".*down_proj"),
    "loha": lambda: LoHaConfig(**QV),
    "lokr": lambda: LoKrConfig(**QV),
    "oft": lambda: OFTConfig(oft_block_size=8, r=0, **QV),
    "hra": lambda: HRAConfig(**QV),
    "ln_tuning": lambda: LNTuningConfig(target_modules=["input_layernorm"]),
    "trainable_tokens": lambda: TrainableTokensConfig(token_indices=[1, 2, 3]),
    "prefix_tuning": lambda: PrefixTuningConfig(**CAUSAL),
    "prefix_tuning_projected": lambda: PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=8, **CAUSAL),
    "prompt_tuning": lambda: PromptTuningConfig(**CAUSAL),
    "p_tuning": lambda: PromptEncoderConfig(encoder_hidden_size=8, **CAUSAL),
}


def fingerprint(model):
    """A hash of all that loading could change: weights, buffers, modules, hooks, configs."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict(keep_vars=True).items():
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape), tensor.requires_grad)).encode())
        digest.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    for name, module in model.named_modules():
        hooks = [len(hooks) for key, hooks in sorted(vars(module).items()) if key.endswith("_hooks")]
        digest.update(repr((name, type(module), module.training, hooks, sorted(vars(module)))).encode())
    digest.update(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    return digest.hexdigest()


def saved(folder, config, backbone="llama"):
    """A folder with an adapter whose weights matter."""
    model = get_peft_model(BACKBONES[backbone].build(), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder)
    return folder


def rewrite(folder, **fields):
    """Change fields of the config, as JSON."""
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def reweigh(folder, change):
    """Change the tensors."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


def refused(folder, message, backbone="llama", **kwargs):
    """Loading is refused with a ValueError, and the base model is as before."""
    base = BACKBONES[backbone].build()
    before = fingerprint(base)
    with pytest.raises(ValueError, match=message):
        load_adapter(base, folder, **kwargs)
    assert fingerprint(base) == before


# What is well-formed loads as in stock peft


def assert_equal_to_stock(folder, family):
    stock = PeftModel.from_pretrained(family.build(), folder)
    base = family.build()
    weights = [(tensor, tensor.clone()) for tensor in (*base.parameters(), *base.buffers())]
    loaded = load_adapter(base, folder)
    inputs = family.inputs()
    with torch.no_grad():
        assert torch.equal(output(loaded, inputs), output(stock, inputs))
        assert not torch.equal(output(loaded, inputs), output(family.build(), inputs))
    assert type(loaded) is type(stock)
    assert loaded.training == stock.training
    kinds = {name: (p.dtype, p.requires_grad) for name, p in stock.named_parameters()}
    assert {name: (p.dtype, p.requires_grad) for name, p in loaded.named_parameters()} == kinds
    assert all(torch.equal(tensor, before) for tensor, before in weights)


@pytest.mark.parametrize("backbone", ["bert", "llama", "t5"])
@pytest.mark.parametrize("method", METHODS)
def test_our_methods(method, backbone, tmp_path):
    assert_equal_to_stock(saved(tmp_path, METHODS[method](), backbone), BACKBONES[backbone])


@pytest.mark.parametrize("method", STOCK_METHODS)
def test_stock_methods(method, tmp_path):
    assert_equal_to_stock(saved(tmp_path, STOCK_METHODS[method]()), BACKBONES["llama"])


def test_every_stock_type_is_tried():
    assert {make().peft_type.value for make in STOCK_METHODS.values()} == set(STOCK)


def test_modules_to_save_of_ours(tmp_path):
    config = METHODS["unipelt"](modules_to_save=["pooler"], trainable_token_indices=[3, 4])
    assert_equal_to_stock(saved(tmp_path, config, "bert"), BACKBONES["bert"])


@pytest.mark.parametrize("make", [METHODS["unipelt"], LoraConfig], ids=["unipelt", "lora"])
def test_a_classifier(make, tmp_path):
    """With a task type, peft saves the head too, on its own account."""
    tiny = AutoConfig.for_model("bert", vocab_size=VOCAB, num_labels=2, **SPECIAL, **BACKBONES["bert"].config)
    base = AutoModelForSequenceClassification.from_config(tiny)
    bases = [copy.deepcopy(base) for _ in range(2)]
    model = get_peft_model(base, make(task_type="SEQ_CLS"))
    randomise(model)
    model.save_pretrained(tmp_path)
    loaded, inputs = load_adapter(bases[0], tmp_path), BACKBONES["bert"].inputs()
    with torch.no_grad():
        assert torch.equal(output(loaded, inputs), output(PeftModel.from_pretrained(bases[1], tmp_path), inputs))
    assert type(loaded) is PeftModelForSequenceClassification
    assert any("classifier" in key for key in load_file(tmp_path / WEIGHTS))


def test_a_second_adapter(tmp_path):
    """A PeftModel gets a further adapter, of ours or of peft's, with the logits that stock peft gives."""
    family, inputs = BACKBONES["llama"], BACKBONES["llama"].inputs()
    for name, make in {"ours": METHODS["unipelt"], "stock": STOCK_METHODS["lora_pattern"]}.items():
        saved(tmp_path / name, make())
        model, stock = (get_peft_model(family.build(), make()).eval() for _ in range(2))
        stock.load_adapter(tmp_path / name, "second")
        assert load_adapter(model, tmp_path / name, "second") is model
        for adapted in (model, stock):
            adapted.set_adapter("second")
        with torch.no_grad():
            assert torch.equal(output(model, inputs), output(stock, inputs))
        with pytest.raises(ValueError, match="`adapter_name` \\(='second'\\) is taken"):
            load_adapter(model, tmp_path / name, "second")


def test_is_trainable(tmp_path):
    model = load_adapter(BACKBONES["llama"].build(), saved(tmp_path, METHODS["unipelt"]()), is_trainable=True)
    assert all(p.requires_grad == (".sublayer_of." in name) for name, p in model.named_parameters())
    load_adapter(model, tmp_path, "second", is_trainable=True)
    assert all(p.requires_grad == (".sublayer_of." in name) for name, p in model.named_parameters())
    saved(tmp_path / "prompt", STOCK_METHODS["prompt_tuning"]())
    refused(tmp_path / "prompt", "`is_trainable` .* must be False", is_trainable=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype, tmp_path):
    """A file in half or double precision, and a model: as in stock peft."""
    for config in (METHODS["unipelt"](), STOCK_METHODS["lora"]()):
        saved(tmp_path, config)
        reweigh(tmp_path, lambda tensors: tensors.update({k: t.to(dtype) for k, t in tensors.items()}))
        stock = PeftModel.from_pretrained(BACKBONES["llama"].build().to(dtype), tmp_path)
        loaded = load_adapter(BACKBONES["llama"].build().to(dtype), tmp_path)
        kinds = {name: p.dtype for name, p in stock.named_parameters()}
        assert {name: p.dtype for name, p in loaded.named_parameters()} == kinds
        for name, parameter in stock.named_parameters():
            assert torch.equal(loaded.get_parameter(name), parameter), name


@pytest.mark.parametrize("method", ["unipelt", "lora", "lora_dora", "prompt_tuning"])
def test_four_bit(method, tmp_path):
    """A backbone in 4 bits: as in stock peft, and unchanged after a refusal."""
    pytest.importorskip("bitsandbytes")
    family = BACKBONES["llama"]
    wide = {"hidden_size": 64, "intermediate_size": 128}
    family.build(**wide).save_pretrained(tmp_path / "base")
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    bases = [
        type(family.build()).from_pretrained(tmp_path / "base", quantization_config=quantised, device_map={"": "cpu"})
        for _ in range(3)
    ]
    model = get_peft_model(bases[0], {**METHODS, **STOCK_METHODS}[method]())
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded, stock = (
        load_adapter(bases[1], tmp_path / "adapter"),
        PeftModel.from_pretrained(bases[2], tmp_path / "adapter"),
    )
    with torch.no_grad():
        assert torch.equal(output(loaded, family.inputs()), output(stock, family.inputs()))


def test_from_a_subfolder(tmp_path):
    saved(tmp_path / "inner", METHODS["mam"]())
    assert list(load_adapter(BACKBONES["llama"].build(), tmp_path, subfolder="inner").peft_config) == ["default"]
    for outside in ("../inner", "/inner"):
        refused(tmp_path / "inner", "`subfolder` .* must lie inside", subfolder=outside)


# The Hub


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """The Hub's cache with one repository of two commits: main is the newer one, v1 the older."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    repo = tmp_path / "cache" / "models--someone--adapter"
    (repo / "refs").mkdir(parents=True)
    commits = {"v1": "1" * 40, "main": "2" * 40}
    for bottleneck_size, (name, commit) in enumerate(commits.items(), 3):
        (repo / "refs" / name).write_text(commit)
        saved(repo / "snapshots" / commit, UniPELTConfig(bottleneck_size=bottleneck_size, num_virtual_tokens=4))
    return commits


@pytest.mark.parametrize("revision", [None, "main", "v1", "1" * 40])
def test_pinned_revision(hub_cache, revision):
    """The revision that is asked for is loaded, and its commit is noted."""
    config = load_adapter(BACKBONES["llama"].build(), "someone/adapter", revision=revision).peft_config["default"]
    commit = hub_cache.get(revision or "main", revision)
    assert config.adapter_revision == commit
    assert config.bottleneck_size == (3 if commit == hub_cache["v1"] else 4)


# 2026-11: huggingface_hub 2.4 gives httpx2 the bytes of LFS files by an old name
@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
def test_over_http(hub, tmp_path):
    """From a private repository: the pinned commit, and of its files the two that are needed."""
    commits = {}
    for r in (2, 3):
        saved(tmp_path / str(r), METHODS["unipelt"](r=r))
        commits[r] = push_adapter(tmp_path / str(r), "ann/adapter", private=True).oid
    upload_file(path_or_fileobj=b"print(1)", path_in_repo="modeling.py", repo_id="ann/adapter")
    upload_file(path_or_fileobj=b"pickle", path_in_repo="adapter_model.bin", repo_id="ann/adapter")
    hub.log.clear()
    for revision, r in ((None, 3), (commits[2], 2), (commits[3], 3)):
        config = load_adapter(BACKBONES["llama"].build(), "ann/adapter", revision=revision).peft_config["default"]
        assert config.r == r
        assert config.adapter_revision == (revision or hub.repos["ann/adapter"].refs["main"])
    fetched = {line.split()[1].rpartition("/")[2] for line in hub.log if line.startswith("GET /ann/adapter/resolve")}
    assert fetched == {CONFIG, WEIGHTS}
    with pytest.raises(RevisionNotFoundError):
        load_adapter(BACKBONES["llama"].build(), "ann/adapter", revision="nope")
    with pytest.raises(RepositoryNotFoundError):
        load_adapter(BACKBONES["llama"].build(), "ann/adapter", revision=commits[2][:8], token=STRANGER)


def test_revision_of_a_folder(tmp_path):
    saved(tmp_path, METHODS["mam"]())
    refused(tmp_path, "`revision` \\(='v1'\\) must be None: a local folder has no revisions.", revision="v1")


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


class Largest(TorchDispatchMode):
    """Notes the largest tensor that is allocated."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result.is_meta:
            self.numel = max(self.numel, result.numel())
        return result


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


@pytest.mark.parametrize("field", ONLY)
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
    ({"peft_type": "XLORA"}, "`peft_type` \\(='XLORA'\\) must be one of those that are checked"),
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


# An adapter is built once, on the model itself


@pytest.mark.parametrize("method", [*METHODS, "lora", "lora_ranks", "lora_modules_to_save", "ia3"])
@pytest.mark.parametrize("further", [False, True], ids=["first", "second"])
def test_no_copy_of_the_model_is_made(method, further, tmp_path, monkeypatch):
    """What takes longest; a head that is larger than the file is copied without data first, as LM heads may be."""
    make = {**METHODS, **STOCK_METHODS}[method]
    saved(tmp_path, make())
    model = get_peft_model(BACKBONES["llama"].build(), make()) if further else BACKBONES["llama"].build()

    def fail(*_):
        raise AssertionError("a copy was made")

    monkeypatch.setattr(expected_tensors, "copy_without_data", fail)
    load_adapter(model, tmp_path, "second")


@pytest.mark.parametrize("method", ["unipelt", "composed", "lora", "ia3"])
@pytest.mark.parametrize("further", [False, True], ids=["first", "second"])
def test_a_refusal_after_building_puts_all_back(method, further, tmp_path):
    """The adapter was built without data already; modules, hooks, logits and the adapters' names are back."""
    make, family = {**METHODS, **STOCK_METHODS}[method], BACKBONES["llama"]
    saved(tmp_path, make())
    model = get_peft_model(family.build(), make()).eval() if further else family.build()
    with torch.no_grad():
        logits = output(model, family.inputs())  # first: it may leave marks of its own
        before = fingerprint(model)
        modules = [id(module) for module in model.modules()]
        for change in (lambda t: t.pop(sorted(t)[0]), lambda t: t.clear()):
            reweigh(tmp_path, change)
            with pytest.raises(ValueError, match=r"lacks tensors"):
                load_adapter(model, tmp_path, "second")
            assert [id(module) for module in model.modules()] == modules
            assert fingerprint(model) == before
            assert torch.equal(output(model, family.inputs()), logits)
    saved(tmp_path, make())
    assert list(load_adapter(model, tmp_path, "second").peft_config) == ["default"] * further + ["second"]


def test_a_head_that_the_file_cannot_hold_is_not_copied(tmp_path):
    """Copying modules with their data would allocate what a config asks for."""
    saved(tmp_path, STOCK_METHODS["lora"]())
    rewrite(tmp_path, modules_to_save=["mlp"])
    base = BACKBONES["llama"].build()
    with pytest.raises(ValueError, match=r"lacks tensors: .*mlp"), Largest() as ours:
        load_adapter(base, tmp_path)
    assert ours.numel < base.model.layers[0].mlp.up_proj.weight.numel()


@pytest.mark.parametrize("method", ["unipelt", "lora_branch"])
def test_what_the_file_does_not_hold(method, tmp_path):
    """Which rows of a fused projection a branch acts on is no tensor of the file, and has its values nevertheless."""
    assert_equal_to_stock(saved(tmp_path, METHODS[method](), "gpt2"), BACKBONES["gpt2"])
