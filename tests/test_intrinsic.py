"""Intrinsic dimension: projections against dense matrices and the full gradient, on plain modules and on models of
transformers; what the contract tests do not see.
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from scipy.linalg import hadamard
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

from hf_peft_ext import IntrinsicConfig, load_adapter
from hf_peft_ext.tuners.intrinsic.projections import (
    PROJECTIONS,
    Hadamard,
    Shuffle,
    generator_of,
    power_of_two,
)
from hf_peft_ext.tuners.intrinsic.targets import scale_group, target_parameters

from .backbones import BACKBONES, output
from .methods import randomise

KINDS = ("fastfood", "dense", "sparse")
every_kind = pytest.mark.parametrize("projection", KINDS)
every_variant = pytest.mark.parametrize("variant", ["global", "layer", "tensor"])


class Net(nn.Module):
    """Modules of several kinds, with 1,033 parameters."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)  # 40
        self.norm = nn.BatchNorm2d(4)  # 8
        self.layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])  # 544
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)  # 288
        self.embedding = nn.Embedding(10, 8)  # 80
        self.head = nn.Linear(8, 5)  # 45
        self.shift = nn.Parameter(torch.randn(28))  # 28

    def forward(self, x):  # (batch, 1, 6, 6)
        h = self.norm(self.conv(x)).flatten(2)  # (batch, 4, 16)
        for layer in self.layers:
            h = torch.tanh(layer(h))
        h = h.reshape(len(x), 8, 8) + self.embedding(torch.arange(8))
        h, _ = self.attention(h, h, h)
        return self.head(h.mean(1)) + self.shift[:5]


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return Net().to(dtype).eval()


def tuned(base, **fields):
    model = get_peft_model(base, IntrinsicConfig(**fields))
    randomise(model)
    return model.eval()


def images(dtype=torch.float64):
    return torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=dtype)


def vector_of(model, adapter="default"):
    return next(p for n, p in model.named_parameters() if f".intrinsic_subspace.{adapter}." in n)


def originals(model):
    """The base parameters of a model with an adapter, in order."""
    return [p for n, p in model.named_parameters() if "intrinsic_subspace" not in n]


def matrix(kind, size, d, total, seed=0):
    """P_i, of shape (size, d), column by column."""
    generator = generator_of(seed, "x")
    shuffle = Shuffle(d, generator_of(seed, "")) if kind == "fastfood" else nn.Identity()
    projection = PROJECTIONS[kind](size, d, total, generator)
    return torch.stack([projection(shuffle(column)) for column in torch.eye(d, dtype=torch.float64)], 1)


@pytest.mark.parametrize("n", [1, 2, 16, 32, 64, 512, 2048])
def test_hadamard(n):
    """The transform equals the product with scipy's matrix."""
    x = torch.randn(3, n, dtype=torch.float64)
    expected = x @ torch.tensor(hadamard(n), dtype=torch.float64)
    torch.testing.assert_close(Hadamard()(x), expected)


@pytest.mark.parametrize(("size", "d"), [(100, 10), (64, 64), (37, 50), (3, 200), (1, 1), (300, 7)])
def test_fastfood_is_the_product_of_its_factors(size, d):
    """H G Pi H B, block by block; a tensor smaller than d sees all of theta_d."""
    n, total = power_of_two(d), 1000
    shuffle = Shuffle(d, generator_of(0, ""))
    projection = PROJECTIONS["fastfood"](size, d, total, generator_of(0, "x"))
    h = torch.tensor(hadamard(n), dtype=torch.float64)
    rotation = (h / n**0.5 * shuffle.signs)[shuffle.permutation]  # (n, n)
    blocks = [h @ torch.diag(g.double()) @ rotation for g in projection.gaussian.view(torch.float16)]
    expected = torch.cat(blocks)[:size, :d] / d**0.5
    found = matrix("fastfood", size, d, total)
    torch.testing.assert_close(found, expected)
    assert (found.abs().max(0).values > 0).all()


@every_kind
def test_columns_are_orthonormal_in_expectation(projection):
    """E[P^T P] = (D / d) I for the P of several tensors, smaller and larger than d."""
    sizes, d, draws = (500, 9, 120, 3000), 24, 20
    grams = []
    for seed in range(draws):
        generator = {i: generator_of(seed, str(i)) for i in range(len(sizes))}
        shuffle = Shuffle(d, generator_of(seed, "")) if projection == "fastfood" else nn.Identity()
        parts = [PROJECTIONS[projection](n, d, sum(sizes), generator[i]) for i, n in enumerate(sizes)]
        columns = [torch.cat([part(shuffle(e)) for part in parts]) for e in torch.eye(d, dtype=torch.float64)]
        p = torch.stack(columns, 1)
        grams.append(p.T @ p * d / sum(sizes))
    mean = torch.stack(grams).mean(0)
    assert (mean - torch.eye(d)).abs().max() < 0.08
    assert all((gram.diagonal() - 1).abs().max() < 0.5 for gram in grams)


@every_kind
def test_gradient_is_the_projected_full_gradient(projection):
    """d loss / d theta_d = P^T (d loss / d theta), in double precision, with d above the size of most tensors."""
    model = tuned(net(), d=150, projection=projection)
    vector, base = vector_of(model), originals(model)
    columns = torch.func.jacrev(lambda v: deltas(model, v))(vector.detach())  # (D, d)
    model(images()).square().sum().backward()
    for parameter in base:
        parameter.requires_grad_(True)
    full = torch.autograd.grad(model(images()).square().sum(), base, allow_unused=True)
    flat = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(base, full, strict=True)])
    torch.testing.assert_close(vector.grad, columns.T @ flat, rtol=1e-9, atol=1e-9)


def deltas(model, vector):
    """P theta_d, in the order of the base parameters."""
    name = next(n for n, p in model.named_parameters() if p is vector_of(model))
    layers = {id(layer.original): layer for layer in model.modules() if hasattr(layer, "subspaces")}
    owner, _, field = name.rpartition(".")
    subspace = model.get_submodule(owner)
    kept = subspace._parameters.pop(field)
    subspace.vector = vector
    try:
        return torch.cat([layers[id(p)].delta("default") for p in originals(model)])
    finally:
        del subspace.vector
        subspace._parameters[field] = kept


@every_variant
def test_formula(variant):
    """theta_i = theta_0,i + lambda_i P_i theta_d, with one lambda a group; every parameter moves."""
    base = net()
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = tuned(base, d=60, variant=variant)
    targets = target_parameters(model.base_model.model, model.peft_config["default"])
    groups = list(dict.fromkeys(scale_group(t, variant == "tensor") for t in targets)) if variant != "global" else []
    vector = vector_of(model).detach()
    assert len(vector) == 60
    assert len(groups) == {"global": 0, "layer": 9, "tensor": 16}[variant]
    layers = {f"{t.path}.{t.name}".lstrip("."): t for t in targets}
    merged = model.merge_and_unload()
    again = get_peft_model(net(), IntrinsicConfig(d=60 - len(groups)))  # the same numbers without scales
    with torch.no_grad():
        vector_of(again).copy_(vector[: 60 - len(groups)])
    plain = dict(again.merge_and_unload().named_parameters())
    for name, parameter in merged.named_parameters():
        scale = (
            1 + vector[60 - len(groups) + groups.index(scale_group(layers[name], variant == "tensor"))]
            if groups
            else 1
        )
        torch.testing.assert_close(parameter - before[name], scale * (plain[name] - before[name]))
        assert (parameter != before[name]).any()


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merging_is_exact(projection, dtype):
    """The merged model computes the same numbers as the model with its adapter, bit for bit."""
    model = tuned(net(dtype), d=64, projection=projection)
    with torch.no_grad():
        expected = model(images(dtype))
        model.merge_adapter()
        assert torch.equal(model(images(dtype)), expected)
        with model.disable_adapter():  # disabling unmerges
            torch.testing.assert_close(model(images(dtype)), net(dtype)(images(dtype)), rtol=0.05, atol=0.05)
        again = tuned(net(dtype), d=64, projection=projection).merge_and_unload(safe_merge=True)
        assert torch.equal(again(images(dtype)), expected)
    assert not any(parametrize.is_parametrized(module) for module in again.modules())


def test_safe_merge():
    model = tuned(net(), d=10)
    vector_of(model).data[0] = float("inf")
    with pytest.raises(ValueError, match=r"`safe_merge` .* not finite"):
        model.merge_and_unload(safe_merge=True)


def test_any_module(tmp_path):
    """Convolutions, norms, attention that hands its weights on, bare parameters: all are adapted; unload restores."""
    base = net(torch.float32)
    model = tuned(base, d=64)
    adapted = {layer.name for layer in model.modules() if hasattr(layer, "subspaces")}
    assert adapted >= {"in_proj_weight", "shift", "weight", "bias"}
    assert model.get_nb_trainable_parameters() == (64, 1033 + 64)
    with torch.no_grad():
        expected = model(images(torch.float32))
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(net(torch.float32), tmp_path)
        assert torch.equal(again(images(torch.float32)), expected)
        restored = again.unload()
        assert torch.equal(restored(images(torch.float32)), net(torch.float32)(images(torch.float32)))
    assert list(restored.state_dict()) == list(net().state_dict())


def test_the_file_holds_d_numbers(tmp_path):
    """One tensor of d numbers, and the seed in the config."""
    model = tuned(BACKBONES["bert"].build(), d=300, variant="tensor", seed=7)
    model.save_pretrained(tmp_path)
    [tensor] = load_file(tmp_path / "adapter_model.safetensors").values()
    assert tensor.shape == (300,)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["seed"] == 7
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4 * 300 + 400


SCRIPT = """
import sys, torch
import hf_peft_ext
from peft import PeftModel
from tests.backbones import BACKBONES, output
torch.set_num_threads(int(sys.argv[2]))
model = PeftModel.from_pretrained(BACKBONES["bert"].build(), sys.argv[1]).eval()
weight = model.get_base_model().encoder.layer[0].attention.self.query.weight
torch.save((weight.detach(), output(model, BACKBONES["bert"].inputs()).detach()), sys.argv[3])
"""


def test_the_same_in_every_process(tmp_path):
    """Another process, with other threads, draws the same projection: weights and outputs are equal bit for bit."""
    model = tuned(BACKBONES["bert"].build(), d=300)
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)  # the global generator plays no part
    weights = []
    for threads in ("1", "2"):
        subprocess.run([sys.executable, "-c", SCRIPT, tmp_path, threads, tmp_path / "out.pt"], check=True)
        weights.append(torch.load(tmp_path / "out.pt"))
    own = model.get_base_model().encoder.layer[0].attention.self.query.weight
    assert all(torch.equal(weight, own) for weight, _ in weights)
    with torch.no_grad():
        torch.testing.assert_close(weights[0][1], output(model, BACKBONES["bert"].inputs()), rtol=0, atol=1e-6)


def test_seeds_and_names_give_other_projections():
    one, same, other = (tuned(net(), d=50, seed=seed) for seed in (0, 0, 1))
    with torch.no_grad():
        assert torch.equal(one(images()), same(images()))
        assert not torch.allclose(one(images()), other(images()))
    layers = one.get_base_model().layers
    first, second = ((layer.weight - layer.parametrizations.weight.original) for layer in layers)
    assert not torch.allclose(first, second)


def test_tied_weights_move_together():
    """A tied head gets the update of the embeddings once; merged and unloaded, the weights are still tied."""

    def build():
        torch.manual_seed(0)
        config = BACKBONES["llama"].build().config
        config.tie_word_embeddings = True
        return AutoModelForCausalLM.from_config(config).eval()

    model, inputs = tuned(build(), d=256), BACKBONES["llama"].inputs()
    base = model.get_base_model()
    assert torch.equal(base.lm_head.weight, base.model.embed_tokens.weight)
    assert not torch.equal(base.lm_head.weight, build().lm_head.weight)
    with torch.no_grad():
        expected = output(model, inputs)
        merged = model.merge_and_unload()
        assert torch.equal(output(merged, inputs), expected)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    unloaded = tuned(build(), d=256).unload()
    assert unloaded.lm_head.weight is unloaded.model.embed_tokens.weight


def test_what_is_adapted():
    """All but the head, saved modules and excluded ones; or what `target_modules` and `layers_to_transform` name."""

    def adapted(model, **fields):
        return {f"{t.path}.{t.name}" for t in target_parameters(model, IntrinsicConfig(**fields))}

    bert = BACKBONES["bert"].build()
    names = {name for name, _ in bert.named_parameters()}
    assert adapted(bert) == names
    assert adapted(bert, exclude_modules=["word_embeddings"]) == names - {"embeddings.word_embeddings.weight"}
    assert adapted(bert, target_modules=["query"]) == {n for n in names if ".query." in n}
    assert adapted(bert, target_modules=r".*\.0\..*key") == {n for n in names if ".0." in n and ".key." in n}
    assert adapted(bert, layers_to_transform=1) == {n for n in names if ".layer.1." in n}
    linear = adapted(bert, target_modules="all-linear")
    assert linear < names
    assert not any("LayerNorm" in name or "embeddings" in name for name in linear)
    llama = BACKBONES["llama"].build()
    if not llama.config.tie_word_embeddings:
        assert "lm_head.weight" not in adapted(llama)


def classifier():
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(BACKBONES["bert"].build().config)


def test_head_is_saved_whole(tmp_path):
    """A classifier is trained and saved beside the d numbers, and no part of the subspace."""
    model = tuned(classifier(), d=50, task_type="SEQ_CLS")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 3
    assert sum("classifier.modules_to_save" in name for name in trained) == 2
    model.save_pretrained(tmp_path)
    again = load_adapter(classifier(), tmp_path)
    inputs = BACKBONES["bert"].inputs()
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs).logits, model(**inputs).logits)


@every_kind
def test_safe_loading(projection, tmp_path):
    """`load_adapter` takes it, and refuses a file with another number of numbers."""
    model, inputs = tuned(BACKBONES["bert"].build(), d=100, projection=projection), BACKBONES["bert"].inputs()
    model.save_pretrained(tmp_path)
    again = load_adapter(BACKBONES["bert"].build(), tmp_path)
    with torch.no_grad():
        assert torch.equal(output(again.eval(), inputs), output(model, inputs))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "d": 101}))
    base = BACKBONES["bert"].build()
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"has shape \(100,\), but its config implies \(101,\)"):
        load_adapter(base, tmp_path)
    assert snapshot(base) == before


def test_an_untrusted_config_allocates_no_more_than_the_model(tmp_path):
    """Dense projections may be larger than the model: those are refused before anything is drawn."""
    model = tuned(BACKBONES["bert"].build(), d=10, projection="dense")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "d": 20_000}))
    with pytest.raises(ValueError, match="would allocate"):
        load_adapter(BACKBONES["bert"].build(), tmp_path)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # 2026-11: transformers
@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
def test_trainer_round_trip(tmp_path):
    """Transformers' Trainer trains it under checkpointing and bfloat16 autocast, saves, and the file loads."""
    model = get_peft_model(classifier(), IntrinsicConfig(d=50, variant="layer", task_type="SEQ_CLS"))
    rows = [{"input_ids": [5, 6, 7, i % 9], "labels": i % 2} for i in range(8)]
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=3, learning_rate=0.1, report_to="none", bf16=True, use_cpu=True, save_steps=3,
        gradient_checkpointing=True, disable_tqdm=True, per_device_train_batch_size=4,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows).train()
    vector = vector_of(model)
    assert vector.dtype == torch.float32
    assert vector.abs().sum() > 0
    again = load_adapter(classifier(), tmp_path / "run" / "checkpoint-3")
    assert torch.equal(vector_of(again), vector)


def test_half_precision():
    """A bfloat16 model: the numbers stay in float32, the sum is rounded once, gradients are finite."""
    model = tuned(BACKBONES["bert"].build().to(torch.bfloat16), d=256)
    vector = vector_of(model)
    assert vector.dtype == torch.float32
    weight = model.get_base_model().encoder.layer[0].output.dense
    original, layer = weight.parametrizations.weight.original, weight.parametrizations.weight[0]
    expected = (original.float() + layer.delta("default").view_as(original)).bfloat16()
    assert torch.equal(weight.weight, expected)
    output(model, BACKBONES["bert"].inputs()).float().square().mean().backward()
    assert vector.grad.isfinite().all()
    model.to(torch.float64)  # buffers hold bits, which no cast changes
    torch.testing.assert_close(layer.delta("default"), (expected.double() - original).flatten(), rtol=0.1, atol=0.01)


def test_two_active_adapters_add_up():
    base = net()
    before = base.layers[0].weight.detach().clone()
    model = tuned(base, d=30)
    model.add_adapter("other", IntrinsicConfig(d=40, seed=3, target_modules=["0"]))
    randomise(model, "other")
    weight, parts = model.get_base_model().layers[0], []
    for names in ("default", "other", ["default", "other"]):
        model.base_model.set_adapter(names)
        parts.append((weight.weight - before).detach())
    torch.testing.assert_close(parts[0] + parts[1], parts[2])
    model.delete_adapter("default")
    torch.testing.assert_close(weight.weight - before, parts[1])


def test_several_forwards_before_a_backward():
    """Sums of gradients, and changes of theta_d between forwards, act as on any parameter."""
    model = tuned(net(), d=30)
    (model(images()).sum() + model(2 * images()).sum()).backward()
    both = vector_of(model).grad.clone()
    model.zero_grad()
    model(images()).sum().backward()
    model(2 * images()).sum().backward()
    torch.testing.assert_close(vector_of(model).grad, both)


def test_threads_share_a_model():
    """A forward stores nothing, so that threads can run one model at once."""
    model = tuned(net(), d=30)
    expected = model(images()).detach()
    before = snapshot(model)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(y.detach(), expected) for y in pool.map(lambda _: model(images()), range(12)))
    assert snapshot(model) == before


def snapshot(model):
    """Everything that attaching an adapter could change."""
    modules = [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()]
    return modules, [(name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters()]


def refused(base, match, **fields):
    before = snapshot(base)
    with pytest.raises(ValueError, match=match):
        get_peft_model(base, IntrinsicConfig(**fields))
    assert snapshot(base) == before


def test_refusals():
    """Errors name the field, and the model is as before."""
    for fields, match in (
        ({"d": 0}, r"`d` \(=0\) must be a positive whole number"),
        ({"d": 2**21}, r"`d` \(=2097152\) must be at most 1048576"),
        ({"variant": "said"}, r"`variant` \(='said'\) must be one of global, layer, tensor"),
        ({"projection": "haar"}, r"`projection` \(='haar'\) must be one of fastfood, dense, sparse"),
        ({"seed": -1}, r"`seed` \(=-1\) must be a whole number from 0"),
        ({"trainable_token_indices": [1]}, "`trainable_token_indices` .* must be None"),
    ):
        with pytest.raises(ValueError, match=match):
            IntrinsicConfig(**fields)
    refused(net(), r"`d` \(=9\) must be larger than the number of scales, 9", d=9, variant="layer")
    refused(net(), r"`d` \(=1034\) must be at most the number of adapted parameters, 1033", d=1034)
    refused(net(), r"`target_modules` \(=\['nothing'\]\) matches no module of Net", target_modules=["nothing"])
    refused(net(), r"`exclude_modules` .* leaves no parameter", target_modules=["head"], exclude_modules=["head"], d=2)
    refused(net(), r"`layers_to_transform` \(=\[5\]\) names layer 5, which does not exist", layers_to_transform=5)
    recurrent = nn.Sequential(nn.LSTM(4, 4), nn.Identity())
    refused(recurrent, r"`target_modules` \(='0'\) is of type LSTM, which reads its weights past", d=3)
    packed = nn.Sequential(nn.Linear(4, 4))
    packed[0].weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    refused(packed, "Linear is quantized, but IntrinsicConfig adds to the weights themselves", d=3)
    model = tuned(net(), d=5)
    with pytest.raises(ValueError, match=r"`adapter_names` \(=\['default'\]\) must be None"):
        model(images(), adapter_names=["default"])


def test_the_seed_alone_fixes_it():
    """Four numbers of one projection, so that files of today can be read by later versions."""
    found = matrix("fastfood", 4, 3, 10, seed=5)[:, 0]
    expected = torch.tensor(FIXED, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


FIXED = (-1.2298, 1.2109, 1.2834, -0.5248)
