"""Trainers select the entries of sparse adapters before they train them: data, phases, losses, resuming, cards."""

import json

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer

from hf_peft_ext import SparseConfig
from hf_peft_ext.compare.methods import COMPARED_METHODS
from hf_peft_ext.compare.sizes import size_methods
from hf_peft_ext.tuners.sparse.select import sparse_adapter

from .cards import classifier as labelled
from .test_cards import card_of
from .test_training import arguments, classifier, separable
from .tiny_trainers import logged, trainer

# 2026-11: the data loader asks for pinned memory wherever it runs
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")


def sparse(selection, **fields):
    return SparseConfig(selection=selection, num_values=300, task_type="SEQ_CLS", **fields)


def delta_of(model):
    return sparse_adapter(model, None)[0].deltas_of["default"]


@pytest.mark.parametrize("selection", ["fisher", "lottery_ticket", "diff", "random"])
def test_selects_trains_and_learns(selection, tmp_path):
    """Each selection ends with k trained values; the optimizer has those and the head alone."""
    fields = {"num_samples": 16} if selection == "fisher" else {}
    made = trainer(tmp_path, sparse(selection, **fields), max_steps=20, learning_rate=3e-2, save_strategy="no")
    made.train()
    delta = delta_of(made.model)
    assert delta.search is None
    assert delta.values.any()
    assert delta.is_selected
    trained = {id(p) for group in made.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in made.model.parameters() if p.requires_grad}
    assert sum(p.numel() for n, p in made.model.named_parameters() if p.requires_grad and "deltas_of" in n) == 300
    assert made.state.global_step == 20
    assert logged(made, "loss")[-1] < logged(made, "loss")[0]


def test_selection_does_not_change_the_order_of_training(tmp_path):
    """With all entries selected in either way, the losses of training are the same."""
    runs = {}
    for selection in ("random", "fisher"):
        config = SparseConfig(
            selection=selection, num_values=32 * 32 + 32, target_modules=["pooler.dense"], task_type="SEQ_CLS"
        )
        made = trainer(tmp_path / selection, config, max_steps=4, logging_steps=1, save_strategy="no")
        made.train()
        runs[selection] = logged(made, "loss")
    assert runs["random"] == runs["fisher"]


def train_and_log(made):
    """All logs of both phases; a trainer's history has those of the second alone."""
    seen, log = [], made.log

    def recorded(logs, *args):
        log(logs, *args)
        seen.append(dict(logs))

    made.log = recorded
    made.train()
    return seen


def test_the_first_phase_has_its_own_epochs_and_a_logged_penalty(tmp_path):
    config = sparse("diff", search_epochs=1, l0=1e-4)
    made = trainer(tmp_path, config, num_train_epochs=2, max_steps=-1, logging_steps=2)
    penalties = [logs["penalty"] for logs in train_and_log(made) if "penalty" in logs]
    assert len(penalties) == 2  # 4 steps
    assert penalties[0] == pytest.approx(1e-4 * delta_of(made.model).size, rel=0.05)
    assert made.state.global_step == 8
    assert all("penalty" not in logs for logs in made.state.log_history)
    assert made.args.num_train_epochs == 2
    assert made.args.save_strategy != "no"
    assert "compute_loss" not in vars(made)
    assert made.recorder.clock.train_time > 0


def test_penalty_under_accumulation(tmp_path):
    """The penalty counts once a step, however many batches are accumulated."""
    values = []
    for accumulated in (1, 2):
        made = trainer(
            tmp_path / str(accumulated), sparse("diff", l0=1e-4), max_steps=1, logging_steps=1, save_strategy="no",
            gradient_accumulation_steps=accumulated, per_device_train_batch_size=8 // accumulated,
        )  # fmt: skip
        values.append(next(logs["penalty"] for logs in train_and_log(made) if "penalty" in logs))
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_resumes_with_the_selected_entries(tmp_path):
    """A checkpoint holds indices and values; a resumed run goes on with them, to the same weights."""
    whole = trainer(tmp_path, sparse("fisher", num_samples=8), max_steps=6, save_strategy="steps", save_steps=3)
    whole.train()
    resumed = trainer(tmp_path, sparse("fisher", num_samples=8), max_steps=6, save_strategy="no")
    resumed.train(str(tmp_path / "checkpoint-3"))
    assert torch.equal(delta_of(resumed.model).indices, delta_of(whole.model).indices)
    assert torch.equal(delta_of(resumed.model).values, delta_of(whole.model).values)


def test_transformers_trainer_stops_before_it_trains_nothing(tmp_path):
    """Another trainer does not select: a clear error, not a run without effect."""
    model = get_peft_model(classifier(), sparse("fisher"))
    theirs = Trainer(model, arguments(tmp_path, max_steps=1), train_dataset=separable())
    with pytest.raises(RuntimeError, match=r"no selected entries yet. Call `select_sparse_parameters`"):
        theirs.train()


@pytest.mark.parametrize("name", ["fish_mask", "lt_sft", "diff_pruning"])
def test_budgets_of_a_comparison(name):
    """`compare` meets a budget exactly."""
    methods = {name: COMPARED_METHODS[name]}

    def empty():
        with torch.device("meta"):
            return classifier()

    assert size_methods(methods, 1234, "SEQ_CLS", empty)[name].parameters == 1234


def test_card(tmp_path):
    """Indices are no parameters; the selection and its paper are named."""
    from . import cards

    cards.ADAPTERS["sparse"] = lambda: get_peft_model(labelled(), sparse("random"))
    try:
        card_of(tmp_path, "sparse")
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"selection": "lottery_ticket"}))
        from hf_peft_ext.hub_cards import write_card

        card = write_card(tmp_path).read_text()
    finally:
        del cards.ADAPTERS["sparse"]
    head = 3 * 32 + 3
    assert f"{300 + head} parameters" in card
    assert "| sparse differences | entries of weights, biases, norms and embeddings | all |" in card
    assert "those that moved most in a first training of all of them (LT-SFT)" in card
    assert "Composable Sparse Fine-Tuning" in card
