"""AdaMix: routes in training, averages for inference, merging into one bottleneck, the consistency loss."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import BertForSequenceClassification, TrainingArguments

from hf_peft_ext import AdaMixConfig, ComposedConfig, Placement, load_adapter, merge_experts
from hf_peft_ext.sublayers import Gate, MixtureBottleneck
from hf_peft_ext.trainers import AdaMixTrainer
from hf_peft_ext.trainers.consistency import consistency_loss, labels_at_predictions

from .backbones import BACKBONES, output
from .methods import randomise


def tuned(backbone="bert", **fields):
    model = get_peft_model(BACKBONES[backbone].build(), AdaMixConfig(r=4, num_experts=3, **fields))
    randomise(model)
    return model.eval()


def experts_of(module, x):
    """The outputs of all pairs of experts, shape: (downs, ups, *x.shape)."""
    codes = [module.activation(x @ w.T + b) for w, b in zip(module.down.weights, module.down.biases, strict=True)]
    ups = list(zip(module.up.weights, module.up.biases, strict=True))
    return torch.stack([torch.stack([z @ w.T + b for w, b in ups]) for z in codes])


@pytest.mark.parametrize("shared", ["none", "up", "down"])
def test_formula(shared):
    """Training draws one of the pairs, each of them at some call; else the averages of both matrices act."""
    torch.manual_seed(0)
    module = MixtureBottleneck(6, 4, 3, shared, init=1.0)
    x = torch.randn(2, 5, 6)
    pairs = experts_of(module, x)
    assert pairs.shape[:2] == {"none": (3, 3), "up": (3, 1), "down": (1, 3)}[shared]
    drawn = torch.stack([module(x) for _ in range(100)])
    distances = (drawn.flatten(1)[:, None] - pairs.flatten(2).flatten(0, 1)).abs().amax(-1)  # (calls, pairs)
    nearest = distances.min(1)
    assert nearest.values.max() < 1e-4
    assert len(nearest.indices.unique()) == pairs.shape[0] * pairs.shape[1]
    module.eval()
    w_down, b_down, w_up, b_up = (p.mean(0) for p in (module.down.weights, module.down.biases,
                                                      module.up.weights, module.up.biases))  # fmt: skip
    torch.testing.assert_close(module(x), torch.relu(x @ w_down.T + b_down) @ w_up.T + b_up)
    torch.testing.assert_close(module.add(x, x), x + module(x), rtol=1e-4, atol=1e-5)


def test_a_seed_repeats_the_routes():
    model, inputs = tuned().train(), BACKBONES["bert"].inputs()
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(output(model, inputs))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_a_later_adapter_has_the_mode_of_the_model():
    """An adapter that is added for inference averages its experts, as the others do."""
    model = tuned()
    inputs = BACKBONES["bert"].inputs()
    expected = output(model, inputs)
    model.add_weighted_adapter(["default"], [1.0], "soup")
    model.set_adapter("soup")
    torch.testing.assert_close(output(model, inputs), expected)


def test_every_expert_has_a_gradient():
    """It is zero for an expert that was not drawn, so that data parallelism meets no unused parameter."""
    model = tuned(shared_projection="none").train()
    output(model, BACKBONES["bert"].inputs()).square().mean().backward()
    experts = [p.grad for name, p in model.named_parameters() if name.endswith("weights")]
    assert [[bool(e.any()) for e in grad].count(True) for grad in experts] == [1] * len(experts)


@pytest.mark.parametrize("backbone", ["bert", "t5", "llama"])
def test_merged_experts(backbone, tmp_path):
    """The outputs stay equal bit for bit; the file is that of one bottleneck at each place, and loads as such."""
    family = BACKBONES[backbone]
    model, inputs = tuned(backbone, shared_projection="none"), family.inputs()
    places = family.build().config.num_hidden_layers * (2 if backbone == "t5" else 1)
    with torch.no_grad():
        expected = output(model, inputs)
        assert merge_experts(model) == places
        assert merge_experts(model) == 0
        assert torch.equal(output(model, inputs), expected)
        model.save_pretrained(tmp_path)
        shapes = {p.shape for p in load_file(tmp_path / "adapter_model.safetensors").values()}
        assert shapes == {(4, 32), (4,), (32, 4), (32,)}
        for load in (PeftModel.from_pretrained, load_adapter):
            again = load(family.build(), tmp_path).eval()
            assert type(again.peft_config["default"]) is ComposedConfig
            assert torch.equal(output(again, inputs), expected)


def test_merging_keeps_the_other_adapter_and_gates():
    def config(**options):
        placement = Placement("bottleneck", "after_ffn", gate="token", options={"r": 2, "num_experts": 2, **options})
        return ComposedConfig(placements=[placement], layers_to_transform=[1])

    model, inputs = get_peft_model(BACKBONES["bert"].build(), config()), BACKBONES["bert"].inputs()
    model.add_adapter("other", config(scaling=2.0, activation="gelu"))
    for name in ("default", "other"):
        randomise(model, name)
    model.eval()
    with torch.no_grad():
        first = output(model, inputs)
        model.set_adapter("other")
        second = output(model, inputs)
        assert merge_experts(model, "other") == 1
        assert torch.equal(output(model, inputs), second)
        model.set_adapter("default")
        assert torch.equal(output(model, inputs), first)
    assert [p.options.get("num_experts") for c in model.peft_config.values() for p in c.placements] == [2, None]
    assert [c.layers_to_transform for c in model.peft_config.values()] == [[1], [1]]
    assert sum(isinstance(module, Gate) for module in model.modules()) == 2
    with pytest.raises(ValueError, match=r"`adapter_name` \(='nope'\) must be one of \['default', 'other'\]"):
        merge_experts(model, "nope")


def test_consistency_loss():
    """Half of the sum of both KL divergences, as torch computes each."""
    first, second = torch.randn(2, 7, 5)
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    kl = torch.nn.functional.kl_div
    both = kl(p, q, reduction="batchmean", log_target=True) + kl(q, p, reduction="batchmean", log_target=True)
    torch.testing.assert_close(consistency_loss(first, second), both / 2)
    assert consistency_loss(first, first) == 0


def test_predictions_of_decoders():
    """A decoder's logits are compared where they predict a token that counts; those of other models where it is."""
    labels = torch.tensor([[-100, 4, 5], [7, -100, 8]])
    shifted = torch.tensor([[4, 5, -100], [-100, 8, -100]])
    for backbone, expected in {"llama": shifted, "t5": labels, "bert": labels}.items():
        assert torch.equal(labels_at_predictions(BACKBONES[backbone].build(), labels), expected)


def trainer(folder, rows, **kwargs):
    args = TrainingArguments(str(folder), max_steps=4, logging_steps=1, per_device_train_batch_size=4, use_cpu=True,
                             report_to="none", learning_rate=1e-2, **kwargs)  # fmt: skip
    torch.manual_seed(0)
    model = BertForSequenceClassification(BACKBONES["bert"].build().config).eval()
    return AdaMixTrainer(model, args, train_dataset=rows, eval_dataset=rows,
                         peft_config=AdaMixConfig(r=4, task_type="SEQ_CLS"))  # fmt: skip


def test_trainer(tmp_path):
    """The loss is the task's and the consistency, with accumulated batches too; evaluation has the task's alone."""
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(3, 50, (6,), generator=generator), "labels": i % 2} for i in range(16)]
    made = trainer(tmp_path, rows)
    made.train()
    logs = [entry for entry in made.state.log_history if "task_loss" in entry]
    assert len(logs) == 4
    for entry in logs:
        assert entry["loss"] == pytest.approx(entry["task_loss"] + entry["consistency_loss"], abs=1e-3)
    assert logs[-1]["consistency_loss"] > 0
    metrics = made.evaluate()
    assert "eval_consistency_loss" not in metrics
    batch = made._prepare_inputs(made.data_collator(rows))
    with torch.no_grad():
        assert metrics["eval_loss"] == pytest.approx(made.model.eval()(**batch).loss.item(), rel=1e-4)
    made.save_model()
    assert "AdaMix" in (tmp_path / "README.md").read_text()
    whole, halves = (trainer(tmp_path / name, rows, **kw) for name, kw in (
        ("whole", {}), ("halves", {"gradient_accumulation_steps": 2})))  # fmt: skip
    losses = [next(e["loss"] for e in t.state.log_history) for t in (whole, halves) if t.train()]
    assert losses[0] == pytest.approx(losses[1], rel=0.3)
    with pytest.raises(ValueError, match=r"`consistency_weight` \(=0\) must be a positive number"):
        AdaMixTrainer(made.model, consistency_weight=0)


ERRORS = [
    ({"num_experts": 1}, r"`num_experts` \(=1\) must be a whole number of 2 or more"),
    ({"num_experts": 2, "shared_projection": "both"}, r"`shared_projection` \(='both'\) must be none, down or up"),
    ({"num_experts": 2, "phm_dim": 2}, r"`num_experts` \(=2\) must be None with `phm_dim`"),
    ({"shared_projection": "up"}, r"`shared_projection` \(='up'\) needs `num_experts`"),
]


@pytest.mark.parametrize(("options", "message"), ERRORS)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Placement("bottleneck", "after_ffn", options={"r": 4, **options})
