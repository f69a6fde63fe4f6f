"""Sparse fine-tuning: products against dense ones, selections against naive ones, phases, files, refusals."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, BertConfig

from hf_peft_ext import SparseConfig, load_adapter, select_sparse_parameters, sparse_search
from hf_peft_ext.tuners.sparse import product
from hf_peft_ext.tuners.sparse.product import SparseProduct, embedding_delta
from hf_peft_ext.tuners.sparse.select import sparse_adapter
from hf_peft_ext.validation.config_schema import MAX_NUMBER, read_json

from .backbones import BACKBONES, PLAIN, SPECIAL, VOCAB, output
from .methods import randomise


def classifier(**kwargs):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=VOCAB, **SPECIAL, **PLAIN, num_labels=3, **kwargs)
    return AutoModelForSequenceClassification.from_config(config).eval()


def batch(rows=4, length=6):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(rows) % 3}


def delta_of(model, name="default"):
    return sparse_adapter(model, name)[0].deltas_of[name]


def targets_of(model, name="default"):
    return sparse_adapter(model, name)[0].targets_of[name]


def dense_parameters(model, name="default"):
    """Base parameter -> its value with the differences added, by plain indexing."""
    base, delta, changed = model.get_base_model(), delta_of(model, name), {}
    for i, target in enumerate(targets_of(model, name)):
        path, parameter = target.uses[0]
        value = base.get_submodule(path).get_parameter(parameter).detach().clone()
        values, index = delta.segment(i)
        value.view(-1)[index] += values.detach()
        changed[f"{path}.{parameter}"] = value
    return changed


@pytest.mark.parametrize("density", [0.01, 0.5])
def test_product_and_its_gradients(density, monkeypatch):
    """S x and both gradients, by entries and by the whole gradient, equal those of a dense S in float64."""
    monkeypatch.setattr(product, "CHUNK", 40)
    torch.manual_seed(0)
    n, d_in, d_out = 11, 20, 15
    k = max(2, int(density * d_in * d_out))
    index = torch.randperm(d_in * d_out)[:k].sort().values
    values = torch.randn(k, dtype=torch.float64, requires_grad=True)
    x = torch.randn(n, d_in, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, v: SparseProduct.apply(x, v, index // d_in, index % d_in, d_out), (x, values)
    )
    weight = product.dense(values, index, torch.Size((d_out, d_in)))
    y = SparseProduct.apply(x, values, index // d_in, index % d_in, d_out)
    torch.testing.assert_close(y, F.linear(x, weight))


def test_embedding_delta_is_a_lookup():
    ids = torch.tensor([[3, 1], [3, 7]])
    index, values = torch.tensor([5, 7, 14, 30]), torch.randn(4)
    table = product.dense(values, index, torch.Size((8, 4)))
    assert torch.equal(embedding_delta(ids, values, index, 4), table[ids])


@pytest.mark.parametrize("backbone", ["bert", "t5", "llama", "gpt2", "opt"])
def test_outputs_are_those_of_changed_parameters(backbone):
    """Hooks on linear leaves, norms and embeddings, tied ones too, act as the changed parameters do."""
    family = BACKBONES[backbone]
    model = get_peft_model(family.build(), SparseConfig(selection="random", density=0.3)).eval()
    randomise(model)
    plain, inputs = family.build(), family.inputs()
    with torch.no_grad():
        named = dict(plain.named_parameters())
        for name, value in dense_parameters(model).items():
            named[name].copy_(value)
        torch.testing.assert_close(output(model, inputs), output(plain, inputs), rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_the_parameters():
    """The gradient of a value is the gradient of the base model's parameter at its index."""
    model = get_peft_model(classifier(), SparseConfig(selection="random", density=0.1, task_type="SEQ_CLS")).eval()
    model(**batch()).loss.backward()
    plain = classifier()
    plain(**batch()).loss.backward()
    for i, target in enumerate(targets_of(model)):
        delta = delta_of(model)
        a, b = delta.places()[i : i + 2]
        gradient = plain.get_parameter(".".join(target.uses[0])).grad.flatten()[delta.segment(i)[1]]
        torch.testing.assert_close(delta.values.grad[a:b], gradient, rtol=1e-4, atol=1e-6)


def test_fisher_takes_the_largest_squared_gradients():
    """The indices are the global top k of the mean squared gradients of single examples, by plain autograd."""
    model = get_peft_model(classifier(), SparseConfig(num_values=200, task_type="SEQ_CLS"))
    start = {name: p.clone() for name, p in model.named_parameters()}
    select_sparse_parameters(model, [batch(3), batch(2)])
    plain, rows = classifier(), [batch(3), batch(2)]
    scores = 0
    for part in rows:
        for i in range(len(part["labels"])):
            plain.zero_grad()
            F.cross_entropy(plain(part["input_ids"][i : i + 1]).logits, part["labels"][i : i + 1]).backward()
            named = (".".join(target.uses[0]) for target in targets_of(model))
            scores = scores + torch.cat([plain.get_parameter(n).grad.flatten() for n in named]).square()
    assert set(delta_of(model).indices.tolist()) == set(scores.topk(200).indices.tolist())
    assert all(torch.equal(p, start[name]) and p.grad is None for name, p in model.named_parameters())
    assert not any("classifier" in path for target in targets_of(model) for path, _ in target.uses)
    assert not any(getattr(module, "sparse", False) for module in model.modules())


def test_fisher_stops_after_num_samples():
    seen = []

    def log_likelihood(base, example):
        seen.append(len(example["labels"]))
        return -base(**example).loss

    model = get_peft_model(classifier(), SparseConfig(num_values=50, num_samples=5, task_type="SEQ_CLS"))
    select_sparse_parameters(model, [batch(4), batch(4)], log_likelihood=log_likelihood)
    assert seen == [1] * 5


def train(parameters, model, extra=None, steps=5, lr=1e-2):
    optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch()).loss + (extra() if extra else 0)
        loss.backward()
        optimizer.step()


def test_lottery_ticket_keeps_what_moved_most_and_rewinds():
    """The first phase is full fine-tuning; its k largest moves are selected, and every value starts again."""
    config = SparseConfig(selection="lottery_ticket", num_values=300, task_type="SEQ_CLS")
    model = get_peft_model(classifier(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), config).train()
    head = {name: p.clone() for name, p in model.named_parameters() if "modules_to_save" in name}
    plain = classifier(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    train(plain.parameters(), plain)
    start = classifier()
    with sparse_search(model):
        train(model.parameters(), model)
    moves = [
        (plain.get_parameter(n) - start.get_parameter(n)).abs().flatten()
        for n in (".".join(target.uses[0]) for target in targets_of(model))
    ]
    best, ours = torch.cat(moves).topk(300), set(delta_of(model).indices.tolist())
    assert len(ours & set(best.indices.tolist())) > 290  # AdamW turns rounding of tiny gradients into whole steps
    assert not delta_of(model).values.any()
    assert all(torch.equal(p, head[name]) for name, p in model.named_parameters() if name in head)
    assert sum(p.numel() for n, p in model.named_parameters() if "deltas_of" in n) == 300
    train(model.parameters(), model)
    assert delta_of(model).values.any()


def test_l1_keeps_moves_small():
    """The penalty is l1 times the mean distance from the start."""
    config = SparseConfig(selection="lottery_ticket", num_values=10, l1=7.0, task_type="SEQ_CLS")
    model = get_peft_model(classifier(), config).train()
    with sparse_search(model) as search, torch.no_grad():
        for w in search.w:
            w.fill_(-0.5)
        assert search.penalty(config).item() == pytest.approx(3.5)


def test_diff_pruning_closes_gates_and_projects():
    """The L0 term is the expected number of open gates; training lowers it; the largest z * w stay as values."""
    config = SparseConfig(selection="diff", num_values=100, l0=1e-3, task_type="SEQ_CLS")
    torch.manual_seed(1)
    model = get_peft_model(classifier(), config).eval()
    with sparse_search(model) as search:
        size = delta_of(model).size
        expected = config.l0 * size * torch.sigmoid(torch.tensor(5.0)).item()
        assert search.penalty(config).item() == pytest.approx(expected, rel=1e-3)
        with torch.no_grad():
            assert torch.equal(model(**batch()).logits, get_peft_model(classifier(), config).eval()(**batch()).logits)
        model.train()
        train(model.parameters(), model, lambda: search.penalty(config), steps=12, lr=0.5)
        assert search.penalty(config).item() < 0.9 * expected
        moved = search.flat()
    index = delta_of(model).indices.long()
    assert set(index.tolist()) == set(moved.abs().topk(100).indices.tolist())
    assert torch.equal(delta_of(model).values, moved[index])


def test_a_failed_search_leaves_the_adapter_unselected():
    model = get_peft_model(classifier(), SparseConfig(selection="diff", num_values=10, task_type="SEQ_CLS"))
    with pytest.raises(KeyboardInterrupt), sparse_search(model):
        raise KeyboardInterrupt
    assert delta_of(model).search is None
    assert not delta_of(model).is_selected


def test_unselected_adapters_are_the_base_and_do_not_train_or_save(tmp_path):
    model = get_peft_model(classifier(), SparseConfig(num_values=20, task_type="SEQ_CLS")).eval()
    assert torch.equal(model(**batch()).logits, classifier()(**batch()).logits)
    with pytest.raises(RuntimeError, match="'default' has no selected entries yet"):
        model.train()(**batch())
    with pytest.raises(ValueError, match=r"`adapter_name` \(=\['default'\]\) has no selected entries to save"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("backbone", ["bert", "t5", "llama"])
def test_merging_is_undone_exactly(backbone):
    """Merged weights are the changed parameters, and unmerging gives every bit back."""
    family = BACKBONES[backbone]
    model = get_peft_model(family.build(), SparseConfig(selection="random", density=0.05)).eval()
    randomise(model)
    expected = dense_parameters(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.merge_adapter()
    for name, value in expected.items():
        assert torch.equal(model.get_base_model().get_parameter(name), value)
    model.unmerge_adapter()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_safe_merge_refuses_infinite_values():
    model = get_peft_model(classifier(), SparseConfig(selection="random", num_values=9)).eval()
    delta_of(model).values.data[3] = torch.inf
    with pytest.raises(ValueError, match="found values that are not finite"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(model.unload()(**batch()).logits, classifier()(**batch()).logits)


def test_two_active_adapters_add_up():
    """Differences of two adapters at the same entries are summed, in the hooks and merged."""
    model = get_peft_model(BACKBONES["bert"].build(), SparseConfig(selection="random", density=0.4)).eval()
    model.add_adapter("other", SparseConfig(selection="random", density=0.4, seed=3, layers_to_transform=[1]))
    randomise(model)
    randomise(model, "other", seed=8)
    model.base_model.set_adapter(["default", "other"])
    inputs = BACKBONES["bert"].inputs()
    with torch.no_grad():
        both = output(model, inputs)
        torch.testing.assert_close(output(model.merge_and_unload(), inputs), both, rtol=1e-4, atol=1e-4)


def test_the_file_holds_indices_and_values_only(tmp_path):
    model = get_peft_model(classifier(), SparseConfig(selection="random", num_values=123, task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    own = {key.rpartition(".")[2]: value for key, value in state.items() if "deltas_of" in key}
    assert {name: (value.shape, value.dtype) for name, value in own.items()} == {
        "indices": ((123,), torch.int32),
        "values": ((123,), torch.float32),
    }
    assert {key for key in state if "deltas_of" not in key} == {
        f"base_model.model.classifier.{name}" for name in ("weight", "bias")
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda i: i[[1, 0, *range(2, len(i))]],
        lambda i: i[[0, 0, *range(2, len(i))]],
        lambda i: torch.cat([i[:-1], torch.tensor([2**30], dtype=i.dtype)]),
        lambda i: torch.cat([torch.tensor([-1], dtype=i.dtype), i[1:]]),
    ],
    ids=["order", "duplicate", "too large", "negative"],
)
@pytest.mark.parametrize("ours", [True, False], ids=["load_adapter", "from_pretrained"])
def test_wrong_indices_are_refused(change, ours, tmp_path):
    """Wrong indices in an untrusted file are refused; the model does not change."""
    model = get_peft_model(classifier(), SparseConfig(selection="random", num_values=40, task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    key = next(key for key in state if key.endswith("indices"))
    save_file(state | {key: change(state[key])}, file, metadata={"format": "pt"})
    base = classifier()
    names = {name for name, _ in base.named_modules()}
    with pytest.raises(ValueError, match=r"`indices` \(=\[.*\]\) must be increasing whole numbers"):
        load_adapter(base, tmp_path) if ours else PeftModel.from_pretrained(base, tmp_path)
    assert {name for name, _ in base.named_modules()} == names
    if ours:
        other = get_peft_model(base, SparseConfig(selection="random", num_values=7, task_type="SEQ_CLS"))
        with pytest.raises(ValueError, match="must be increasing whole numbers"):
            load_adapter(other, tmp_path, "second")
        assert list(other.peft_config) == ["default"]
        base = other.unload()
    assert torch.equal(base(**batch()).logits, classifier()(**batch()).logits)


def test_loads_checked_and_into_the_same_model_only(tmp_path):
    model = get_peft_model(classifier(), SparseConfig(selection="random", num_values=40, task_type="SEQ_CLS")).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        again = load_adapter(classifier(), tmp_path, is_trainable=True).eval()
        assert torch.equal(again(**batch()).logits, model(**batch()).logits)
        assert delta_of(again).values.requires_grad
    with pytest.raises(ValueError, match=r"`target_size` \(=\d+\) must be \d+, as in this model"):
        load_adapter(BACKBONES["llama"].build(), tmp_path)


def test_adapters_of_large_models_load(tmp_path):
    """Counts of a model's parameters, and seeds, may be larger than other numbers of a config."""
    config = BertConfig(**PLAIN | {"hidden_size": 128}, vocab_size=9000, num_labels=3)
    base = AutoModelForSequenceClassification.from_config(config).eval()
    before = copy.deepcopy(base)
    model = get_peft_model(base, SparseConfig(selection="random", density=0.9, seed=20261127, task_type="SEQ_CLS"))
    randomise(model.eval())
    model.save_pretrained(tmp_path)
    saved = read_json(tmp_path / "adapter_config.json")
    assert min(saved["target_size"], len(delta_of(model).values)) > MAX_NUMBER
    with torch.no_grad():
        assert torch.equal(load_adapter(before, tmp_path)(**batch()).logits, model(**batch()).logits)


def test_half_precision_base():
    """In bfloat16 the values are float32, and small ones act on norms and weights alike."""
    base = BACKBONES["llama"].build().to(torch.bfloat16)
    model = get_peft_model(base, SparseConfig(selection="random", density=0.3)).eval()
    randomise(model)
    wide = get_peft_model(BACKBONES["llama"].build(), SparseConfig(selection="random", density=0.3)).eval()
    randomise(wide)
    inputs = BACKBONES["llama"].inputs()
    assert delta_of(model).values.dtype == torch.float32
    close, far = output(model, inputs), output(wide, inputs)
    assert close.dtype == torch.bfloat16
    assert (close.float() - far).abs().mean() < 0.1 * far.abs().mean()
    close.float().square().mean().backward()
    assert delta_of(model).values.grad.isfinite().all()


def test_fields_are_checked():
    for fields, message in (
        ({"selection": "snip"}, "`selection` .* must be one of fisher"),
        ({"density": 1.5}, "`density` .* must be a share"),
        ({"num_values": 0}, "`num_values` .* must be a positive whole number"),
        ({"l0": -1}, "`l0` .* must be a number of 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            SparseConfig(**fields)
    base = classifier()
    before = copy.deepcopy(base.state_dict())
    for fields, message in (
        ({"num_values": 10**9}, r"`num_values` \(=1000000000\) must be at most"),
        ({"target_modules": ["nothing"]}, r"`target_modules` .* leave no parameter to select"),
        ({"layers_to_transform": [9]}, "`layers_to_transform` .* names layer 9"),
    ):
        with pytest.raises(ValueError, match=message):
            get_peft_model(base, SparseConfig(**fields))
    assert before.keys() == base.state_dict().keys()


def test_phases_are_named_in_errors():
    model = get_peft_model(classifier(), SparseConfig(selection="diff", num_values=5, task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match="needs a first phase"):
        select_sparse_parameters(model, [batch()])
    model = get_peft_model(classifier(), SparseConfig(num_values=5, task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match="has no first phase"), sparse_search(model):
        pass
    with pytest.raises(ValueError, match=r"`batches` \(=None\) must be given"):
        select_sparse_parameters(model)
    with pytest.raises(ValueError, match="must hold at least one example"):
        select_sparse_parameters(model, [])
    with pytest.raises(ValueError, match=r"`adapter_name` \(='other'\) is no sparse adapter"):
        select_sparse_parameters(model, [batch()], "other")


def test_chosen_modules_and_layers():
    """`target_modules`, `exclude_modules` and `layers_to_transform` limit the parameters."""
    config = SparseConfig(selection="random", num_values=5, target_modules=["query", "value"], layers_to_transform=[1])
    model = get_peft_model(classifier(), config)
    assert {path.split("layer.")[1] for target in targets_of(model) for path, _ in target.uses} == {
        "1.attention.self.query",
        "1.attention.self.value",
    }
    model = get_peft_model(classifier(), SparseConfig(selection="random", num_values=5, exclude_modules=["LayerNorm"]))
    assert not any("LayerNorm" in path for target in targets_of(model) for path, _ in target.uses)
