"""Pruned bottlenecks: scores against naive ones, zeros that stay, files, refusals."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from hf_peft_ext import BottleneckConfig, load_adapter, prune_bottlenecks
from hf_peft_ext.compare.methods import COMPARED_METHODS
from hf_peft_ext.compare.sizes import size_methods
from hf_peft_ext.hub_cards import write_card
from hf_peft_ext.search.search import adapter_parameters
from hf_peft_ext.tuners.prune_bottlenecks import sparse_bottlenecks

from .backbones import BACKBONES, output
from .test_training import classifier, separable
from .tiny_trainers import trainer

# 2026-11: the data loader asks for pinned memory wherever it runs
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
FIELDS = {"task_type": "SEQ_CLS", "r": 20, "sparsity": 0.75, "init": "paper"}


def adapted(**fields):
    torch.manual_seed(3)
    return get_peft_model(classifier(), BottleneckConfig(**(FIELDS | fields)))


def batches():
    rows = separable(8)
    return [{key: torch.stack([row[key] for row in rows[i : i + 4]]) for key in rows[0]} for i in (0, 4)]


def masks(model):
    return torch.cat([m.flatten() for b in sparse_bottlenecks(model, "default") for m in (b.down_mask, b.up_mask)])


def weights(model):
    return [w for b in sparse_bottlenecks(model, "default") for w in (b.down.weight, b.up.weight)]


def top(scores, like):
    kept = torch.zeros_like(like)
    flat = torch.cat([score.flatten() for score in scores])
    kept[flat.topk(round(0.25 * len(flat))).indices] = True
    return kept


def hessian_product(model, gradients, eps=1e-3):
    """H g by differences of gradients, in float64."""

    def gradient(sign):
        for w, g in zip(weights(model), gradients, strict=True):
            w.data.add_(sign * eps * g)
        found = total_gradient(model)
        for w, g in zip(weights(model), gradients, strict=True):
            w.data.sub_(sign * eps * g)
        return found

    return [(a - b) / (2 * eps) for a, b in zip(gradient(1), gradient(-1), strict=True)]


def total_gradient(model):
    for weight in weights(model):
        weight.grad = None
    for batch in batches():
        model(**batch).loss.backward()
    return [weight.grad.clone() for weight in weights(model)]


@pytest.mark.parametrize("pruning", ["snip", "grasp", "magnitude"])
def test_keeps_the_entries_with_the_highest_scores(pruning):
    """A quarter of all layers' entries, by plain gradients, differences of gradients, or sizes."""
    model = adapted(pruning=pruning).double().eval()
    if pruning == "magnitude":
        scores = [w.detach().abs() for w in weights(model)]
    else:
        gradients = total_gradient(model)
        second = hessian_product(model, gradients) if pruning == "grasp" else gradients
        scores = [w.detach() * g for w, g in zip(weights(model), second, strict=True)]
        scores = scores if pruning == "grasp" else [score.abs() for score in scores]
    prune_bottlenecks(model, batches())
    kept = masks(model)
    assert kept.sum() == round(0.25 * len(kept))
    assert (kept == top(scores, kept)).float().mean() > 0.999
    assert torch.equal(torch.cat([w.flatten() for w in weights(model)]) != 0, kept)


@pytest.mark.parametrize("backbone", ["bert", "t5", "llama"])
def test_random_pruning_starts_as_the_base_model(backbone):
    family = BACKBONES[backbone]
    model = get_peft_model(family.build(), BottleneckConfig(r=8, sparsity=0.5, pruning="random")).eval()
    prune_bottlenecks(model, seed=1)
    assert masks(model).float().mean().item() == pytest.approx(0.5, abs=0.01)
    with torch.no_grad():
        start, base = (output(m, family.inputs()) for m in (model, family.build()))
        torch.testing.assert_close(start, base, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pruning", ["snip", "random"])
def test_pruned_entries_stay_zero_in_training(pruning, tmp_path):
    """A trainer prunes first; weight decay and moments move no pruned entry; files and checkpoints keep them."""
    config = BottleneckConfig(**FIELDS, pruning=pruning)
    made = trainer(tmp_path, config, max_steps=6, save_strategy="steps", save_steps=3, weight_decay=0.1)
    made.train()
    model = made.model.eval()
    kept = masks(model)
    assert kept.sum() == round(0.25 * len(kept))
    assert not torch.cat([w.flatten() for w in weights(model)])[~kept].any()
    resumed = trainer(tmp_path, BottleneckConfig(**FIELDS, pruning=pruning), max_steps=6, save_strategy="no")
    resumed.train(str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed.model), weights(model), strict=True))
    model.save_pretrained(tmp_path / "saved")
    for load in (PeftModel.from_pretrained, load_adapter):
        again = load(classifier(), tmp_path / "saved").eval()
        assert torch.equal(masks(again), kept)
        assert torch.equal(again(**batches()[0]).logits, model(**batches()[0]).logits)


def test_the_file_is_dense_with_masks_and_the_card_does_not_count_them(tmp_path):
    model = adapted()
    prune_bottlenecks(model, batches())
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.dtype == torch.bool for t in state.values()) == len(weights(model))
    count = sum(t.numel() for t in state.values() if t.dtype != torch.bool)
    card = write_card(tmp_path).read_text()
    assert f"{count:,} parameters" in card
    assert "SparseAdapter: An Easy Approach" in card


def test_a_comparison_counts_what_is_kept():
    """The large-sparse setting: five times as wide at 80 % has as many matrix entries."""
    wide, narrow = adapted(r=20, sparsity=0.75), adapted(r=5, sparsity=0.0)
    assert adapter_parameters(wide) - adapter_parameters(narrow) == 15 * 2  # biases of two layers

    def empty():
        with torch.device("meta"):
            return classifier()

    sized = size_methods({"sparse_adapter": COMPARED_METHODS["sparse_adapter"]}, 2000, "SEQ_CLS", empty)
    assert sized["sparse_adapter"].parameters == pytest.approx(2000, rel=0.05)


def test_unpruned_adapters_do_not_train_or_save(tmp_path):
    model = adapted()
    with torch.no_grad():
        model.eval()(**batches()[0])
    with pytest.raises(RuntimeError, match=r"`sparsity` \(=0.75\) needs a pruned adapter"):
        model.train()(**batches()[0])
    with pytest.raises(ValueError, match=r"`adapter_name` \(=\['default'\]\) is not pruned to its `sparsity` yet"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`batches` \(=0\) must hold at least one batch"):
        prune_bottlenecks(model)
    with pytest.raises(ValueError, match=r"`adapter_name` \(='default'\) is no adapter with a `sparsity`"):
        prune_bottlenecks(adapted(sparsity=0.0), batches())


def test_fields_are_checked():
    for fields, message in (
        ({"sparsity": 1.0}, r"`sparsity` \(=1.0\) must lie in \[0, 1\)"),
        ({"pruning": "fisher"}, "`pruning` .* must be one of snip, grasp"),
        ({"init": "base"}, "`pruning` .* needs random matrices"),
        ({"style": "parallel"}, "`pruning` .* needs random matrices"),
    ):
        with pytest.raises(ValueError, match=message):
            BottleneckConfig(**(FIELDS | fields))
