"""T-Few's (IA)^3: the contract of tests/test_contract.py on every backbone, and against the formula, by hand.

What is saved is loaded again by peft alone, in a process that has never seen this package.
"""

import copy
import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from packaging.version import Version
from peft import IA3Config, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments
from transformers.integrations.peft import MIN_PEFT_VERSION

from hf_peft_ext import TFewConfig

from .backbones import BACKBONES, D, output
from .test_contract import loss

pytestmark = pytest.mark.filterwarnings("ignore:.*leaves parts of the FFN as they are:UserWarning")
every_backbone = pytest.mark.parametrize("backbone", BACKBONES)

SWITCH = {  # linear experts
    **{
        "d_model": D,
        "d_ff": 48,
        "d_kv": 8,
        "num_heads": 4,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_experts": 3,
    },
    **{"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "vocab_size": 60, "decoder_start_token_id": 0},
}
# Fused projections: which outputs are queries. Head by head there are 4 heads of width 8, or 2 groups of 2 queries.
PARTS = torch.arange(3 * D)
QUERIES = {
    "gpt2": PARTS < D,
    "modernbert": PARTS < D,
    "gpt_neox": PARTS % 24 < 8,
    "bloom": PARTS % 24 < 8,
    "falcon": torch.arange(2 * D) % 32 < 16,
}


def randomise(model, adapter="default", seed=0, std=0.4):
    """Scale by weights near one that matter, the same at every call."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, vector in model.named_parameters():
            if name.endswith(f"ia3_l.{adapter}"):
                vector.copy_(1 + std * torch.randn(vector.shape, generator=generator))


def tuned(backbone, config=None, **kwargs):
    family = BACKBONES[backbone]
    model = get_peft_model(family.build(**kwargs), config or TFewConfig())
    randomise(model)
    return model.eval(), family.inputs()


def vectors(model, adapter="default"):
    """Path of the scaled module -> its vector."""
    mark = f".ia3_l.{adapter}"
    return {
        name.removeprefix("base_model.model.").removesuffix(mark): vector
        for name, vector in model.named_parameters()
        if name.endswith(mark)
    }


def is_fused(backbone, vector):
    """Whether a vector scales the outputs of a projection that makes queries too."""
    return vector.shape == (len(QUERIES.get(backbone, ())), 1)


# By hand: the keys, the values, and what the FFN's output projection reads.
BY_HAND = {
    "bert": (["encoder.layer.{}.attention.self.key", "encoder.layer.{}.attention.self.value"],
             ["encoder.layer.{}.output.dense"]),
    "llama": (["model.layers.{}.self_attn.k_proj", "model.layers.{}.self_attn.v_proj"],
              ["model.layers.{}.mlp.down_proj"]),
    "opt": (["model.decoder.layers.{}.self_attn.k_proj", "model.decoder.layers.{}.self_attn.v_proj"],
            ["model.decoder.layers.{}.fc2"]),
    "gpt2": (["transformer.h.{}.attn.c_attn"], ["transformer.h.{}.mlp.c_proj"]),
    "falcon": (["transformer.h.{}.self_attention.query_key_value"], ["transformer.h.{}.mlp.dense_4h_to_h"]),
    "t5": (
        [f"{s}.block.{{}}.layer.0.SelfAttention.{leaf}" for s in ("encoder", "decoder") for leaf in "kv"]
        + [f"decoder.block.{{}}.layer.1.EncDecAttention.{leaf}" for leaf in "kv"],
        ["encoder.block.{}.layer.1.DenseReluDense.wo", "decoder.block.{}.layer.2.DenseReluDense.wo"],
    ),
    "bart": (
        [f"model.{s}.layers.{{}}.self_attn.{leaf}_proj" for s in ("encoder", "decoder") for leaf in "kv"]
        + [f"model.decoder.layers.{{}}.encoder_attn.{leaf}_proj" for leaf in "kv"],
        ["model.encoder.layers.{}.fc2", "model.decoder.layers.{}.fc2"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("backbone", BY_HAND)
@torch.no_grad()
def test_against_the_formula(backbone):
    """l_k * K, l_v * V and W (l_ff * f(...)) by hooks on an untouched model, at sites named by hand."""
    model, inputs = tuned(backbone)
    changed = output(model, inputs)
    scale = vectors(model)
    outputs, reads = ([name.format(i) for name in names for i in (0, 1)] for names in BY_HAND[backbone])
    assert set(scale) == {*outputs, *reads}
    base = BACKBONES[backbone].build()
    for path in outputs:
        own = scale[path].flatten()
        if backbone in QUERIES:
            own = torch.where(QUERIES[backbone], 1.0, own)
        base.get_submodule(path).register_forward_hook(lambda _, args, y, own=own: own * y)
    for path in reads:
        own = scale[path].flatten()
        base.get_submodule(path).register_forward_pre_hook(lambda _, args, own=own: (own * args[0],))
    torch.testing.assert_close(output(base, inputs), changed, rtol=1e-5, atol=1e-5)


@every_backbone
def test_trains_only_the_vectors(backbone):
    """Every number of every vector gets a gradient but those of queries; no base weight does."""
    model, inputs = tuned(backbone)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if n.endswith(".ia3_l.default")}
    loss(output(model, inputs)).backward()
    for path, vector in vectors(model).items():
        gradient = vector.grad.flatten()
        of_queries = QUERIES[backbone] if is_fused(backbone, vector) else gradient.isnan()
        assert not gradient[of_queries].any(), path
        assert (gradient[~of_queries] != 0).float().mean() > 0.5, path  # a ReLU may rest
    assert all(p.grad is None for n, p in model.named_parameters() if n not in trained)


@pytest.mark.parametrize("backbone", QUERIES)
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_queries_stay_at_one(backbone, optimizer, tmp_path):
    """Weight decay and clipping do not move the part for the queries; what is saved says one there."""
    model, inputs = tuned(backbone)
    model.train()
    steps = optimizer(vectors(model).values(), lr=0.05, weight_decay=0.1)
    before = {path: vector.clone() for path, vector in vectors(model).items()}
    for _ in range(3):
        steps.zero_grad()
        loss(output(model, inputs)).backward()
        torch.nn.utils.clip_grad_norm_(vectors(model).values(), 1.0)
        steps.step()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors").values()
    fused = [vector.flatten() for vector in saved if is_fused(backbone, vector)]
    assert len(fused) == 2
    for vector in fused:
        assert (vector[QUERIES[backbone]] == 1).all()
        assert (vector[~QUERIES[backbone]] != 1).all()
    assert all((vector != before[path]).any() for path, vector in vectors(model).items())


def test_queries_stay_at_one_when_training_goes_on(tmp_path):
    """A saved adapter loaded into a model that has got a TFewConfig, and a copy of such a model."""
    model, inputs = tuned("gpt2")
    model.save_pretrained(tmp_path)
    again = get_peft_model(BACKBONES["gpt2"].build(), TFewConfig())
    again.load_adapter(tmp_path, "default", is_trainable=True)
    with torch.no_grad():
        assert torch.equal(output(again.eval(), inputs), output(model, inputs))
    for trained in (again, copy.deepcopy(again)):
        loss(output(trained, inputs)).backward()
        vector = vectors(trained)["transformer.h.0.attn.c_attn"]
        assert not vector.grad.flatten()[:D].any()
        assert vector.grad.flatten()[D:].all()


@every_backbone
def test_saves_a_stock_adapter(backbone, tmp_path):
    """The file holds the vectors only, the config is an IA3Config; reloaded, the outputs are equal to the bit."""
    model, inputs = tuned(backbone)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.removeprefix("base_model.model.").removesuffix(".ia3_l") for key in saved} == set(vectors(model))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "IA3"
    assert config.keys() == IA3Config().to_dict().keys()
    with torch.no_grad():
        expected = output(model, inputs)
        for low_cpu_mem_usage in (False, True):
            base = BACKBONES[backbone].build()
            again = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
            assert torch.equal(output(again, inputs), expected)


ALONE = """
import sys, torch
from pathlib import Path
from peft import IA3Config, PeftModel
from tests.backbones import BACKBONES, output
for name, family in BACKBONES.items():
    folder = Path(sys.argv[1], name)
    model = PeftModel.from_pretrained(family.build(), folder).eval()
    assert type(model.peft_config["default"]) is IA3Config
    with torch.no_grad():
        found = output(model, family.inputs())
        torch.testing.assert_close(found, torch.load(folder / "expected.pt"), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(output(model.merge_and_unload(), family.inputs()), found, rtol=1e-3, atol=1e-3)
assert "hf_peft_ext" not in sys.modules
print("all", len(BACKBONES))
"""


@pytest.mark.slow
def test_peft_alone_loads_it(tmp_path):
    """In a fresh process without this package, plain peft loads the adapters of all backbones, and merges them."""
    for name in BACKBONES:
        model, inputs = tuned(name)
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            torch.save(output(model, inputs), tmp_path / name / "expected.pt")
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ALONE, tmp_path], cwd=root, capture_output=True, text=True
    )
    assert done.stdout.strip() == f"all {len(BACKBONES)}", done.stderr


@pytest.mark.parametrize("backbone", ["bert", "t5", "gpt2"])
@torch.no_grad()
def test_a_second_adapter_of_fewer_layers(backbone):
    """It has vectors in its layers alone, is one of peft's, and leaves the first as it is."""
    model, inputs = tuned(backbone)
    first = output(model, inputs)
    model.add_adapter("other", TFewConfig(layers_to_transform=[0]))
    assert type(model.peft_config["other"]) is IA3Config
    model.set_adapter("other")
    randomise(model, "other", seed=7)
    assert 0 < len(vectors(model, "other")) < len(vectors(model))
    second = output(model, inputs)
    assert (second - first).abs().max() > 1e-3
    model.set_adapter("default")
    assert torch.equal(output(model, inputs), first)
    model.set_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(output(model, inputs), second)


def test_is_a_stock_model():
    """The tuner is peft's own but for what TFewConfig needs; peft's own configs go on as before."""
    model, _ = tuned("llama")
    assert isinstance(model.base_model, peft.IA3Model)
    assert model.peft_type == "IA3"
    stock = get_peft_model(BACKBONES["llama"].build(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    assert set(vectors(stock)) == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    assert not hasattr(peft.IA3Model, "_enable_peft_forward_hooks")  # else leave mixed batches to peft


def test_transformers_own_adapters():
    """`model.add_adapter` of transformers takes the config too, where it takes this version of peft."""
    family = BACKBONES["llama"]
    model, inputs = family.build(), family.inputs()
    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):  # transformers 5.24 asks for one that is not out yet
        with pytest.raises(ValueError, match=f"please use a version >= {MIN_PEFT_VERSION}"):
            model.add_adapter(TFewConfig(), "first")
        return
    with torch.no_grad():
        base = output(model, inputs)
        model.add_adapter(TFewConfig(), "first")
        assert type(model.peft_config["first"]) is IA3Config
        assert torch.equal(output(model, inputs), base)
        randomise(model, "first")
        assert (output(model, inputs) - base).abs().max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["gpt2", "t5"])
def test_trainer_and_resuming(backbone, tmp_path):
    """Trainer trains the vectors; resumed from a checkpoint, it ends where it ends without a stop, queries at one."""
    inputs = BACKBONES[backbone].inputs(batch=8)
    rows = [{**{k: v[i] for k, v in inputs.items()}, "labels": inputs["input_ids"][i]} for i in range(8)]
    if backbone == "t5":
        rows = [{k: v for k, v in row.items() if k != "decoder_input_ids"} for row in rows]

    def train(folder, **kwargs):
        options = {"max_steps": 4, "save_steps": 2, "weight_decay": 0.1, "learning_rate": 0.05, "report_to": "none"}
        args = TrainingArguments(folder, per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True, **options)
        model = get_peft_model(BACKBONES[backbone].build(), TFewConfig())
        Trainer(model, args, train_dataset=rows).train(**kwargs)
        return vectors(model)

    whole = train(tmp_path / "a")
    resumed = train(tmp_path / "b", resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for path, vector in whole.items():
        torch.testing.assert_close(resumed[path], vector)
        assert (vector != 1).any()
    saved = load_file(tmp_path / "a" / "checkpoint-4" / "adapter_model.safetensors")
    fused = [vector.flatten() for vector in saved.values() if is_fused(backbone, vector)]
    assert len(fused) == (2 if backbone == "gpt2" else 0)
    assert all((vector[:D] == 1).all() for vector in fused)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # of a graph break
@pytest.mark.parametrize("backbone", ["llama", "gpt2"])
def test_compiled(backbone):
    """Under torch.compile the outputs and gradients are the same."""
    model, inputs = tuned(backbone)
    expected = output(model, inputs, use_cache=False)
    loss(expected).backward()
    gradients = {path: vector.grad.clone() for path, vector in vectors(model).items()}
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager")
    found = output(compiled, inputs, use_cache=False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    loss(found).backward()
    for path, vector in vectors(model).items():
        torch.testing.assert_close(vector.grad, gradients[path], rtol=1e-3, atol=1e-5)
