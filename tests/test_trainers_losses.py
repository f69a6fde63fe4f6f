"""Losses of accumulated batches and loss terms, with the trainers and with another Trainer class."""

import pytest
import torch

from hf_peft_ext import UniPELTConfig
from hf_peft_ext.trainers import AdapterTrainer

from .backbones import BACKBONES
from .test_training import StopAt, arguments, classifier, separable, trained
from .tiny_trainers import TermsTrainer, logged, losses, trainer

# 2026-11: the data loader asks for pinned memory wherever it runs
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")


def test_a_second_training_starts_its_sums_anew(tmp_path):
    """Terms of a first training are in no log of a second one with the same trainer."""
    made = trainer(tmp_path, cls=TermsTrainer, max_steps=6, save_strategy="no")
    made.train()
    made.train()
    for entry in made.state.log_history:
        if "loss" in entry:
            assert entry["class_loss"] + entry["logit_loss"] == pytest.approx(entry["loss"], abs=1e-6)


class MeanLossTrainer(AdapterTrainer):
    """Returns the mean over the batch at hand, whatever the model; it draws random numbers of its own."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        torch.rand(1)
        self.add_loss_terms(class_loss=outputs.loss)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


@pytest.mark.parametrize(
    ("backbone", "cls"),
    [("bert", AdapterTrainer), ("llama", AdapterTrainer), ("bert", MeanLossTrainer), ("llama", MeanLossTrainer)],
)
def test_accumulated_batches_equal_one_batch(backbone, cls, tmp_path):
    """Four small batches train as one large batch, whether the loss is a mean or takes Trainer's count."""

    def made(folder, batch, accumulated):
        model = classifier() if backbone == "bert" else BACKBONES["llama"].build()
        for module in model.modules():
            module.p = 0.0 if isinstance(module, torch.nn.Dropout) else getattr(module, "p", None)
        rows = separable()
        if backbone == "llama":
            rows = [{**row, "labels": row["input_ids"]} for row in rows]
        args = arguments(tmp_path / folder, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated)
        adapter = UniPELTConfig(bottleneck_size=8, num_virtual_tokens=4)
        return cls(model, args, train_dataset=rows, peft_config=adapter)

    one, four = made("one", 16, 1), made("four", 4, 4)
    one.train()
    four.train()
    assert list(losses(four).values()) == pytest.approx(list(losses(one).values()), abs=1e-4)
    assert logged(four, "grad_norm") == pytest.approx(logged(one, "grad_norm"), rel=1e-2)
    assert four.model_accepts_loss_kwargs == (backbone == "llama" and cls is AdapterTrainer)
    if cls is MeanLossTrainer:
        assert logged(four, "class_loss") == pytest.approx(list(losses(four).values()), abs=1e-6)


def test_asking_for_the_loss_leaves_no_trace(tmp_path):
    """With a custom loss and accumulated batches, training equals Trainer's with its scale declared, bit for bit."""
    accumulating = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_steps": 4}
    asked = trainer(tmp_path, cls=MeanLossTrainer, **accumulating)
    asked.train()
    told = trainer(tmp_path, cls=type("Told", (MeanLossTrainer,), {"loss_is_scaled_for_ga": False}), **accumulating)
    told.train()
    assert losses(asked) == losses(told)
    assert logged(asked, "class_loss") == logged(told, "class_loss")
    assert all(torch.equal(trained(asked.model)[name], value) for name, value in trained(told.model).items())


@pytest.mark.parametrize("accumulated", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_loss_terms_add_up(accumulated, tmp_path):
    """Terms that add up to the loss in a batch do so in each log, in training and evaluation, also after a break."""
    kwargs = {"per_device_train_batch_size": 16 // accumulated, "gradient_accumulation_steps": accumulated}
    kwargs |= {"eval_strategy": "steps", "eval_steps": 6, "save_steps": 6, "per_device_eval_batch_size": 6}
    whole = trainer(tmp_path / "whole", cls=TermsTrainer, **kwargs)
    whole.train()
    for entry in whole.state.log_history:
        for prefix in ("", "eval_"):
            if f"{prefix}loss" in entry:
                terms = entry[f"{prefix}class_loss"] + entry[f"{prefix}logit_loss"]
                assert terms == pytest.approx(entry[f"{prefix}loss"], abs=1e-6)
    assert len(logged(whole, "class_loss")) == 4
    trainer(tmp_path / "half", cls=TermsTrainer, callbacks=[StopAt(6)], **kwargs).train()
    resumed = trainer(tmp_path / "half", cls=TermsTrainer, **kwargs)
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed, "class_loss") == logged(whole, "class_loss")
    record = resumed.filled_record()
    assert (record.trainer, "class_loss" in record.history[0]) == ("Terms", True)
    with pytest.raises(ValueError, match=r"`terms` \(='loss'\) must have names that Trainer does not log itself"):
        whole.add_loss_terms(loss=torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"`kl` \(=float\) must be a tensor"):
        whole.add_loss_terms(kl=0.5)
    with pytest.raises(ValueError, match=r"`kl` \(=\(2,\)\) must be a single number"):
        whole.add_loss_terms(kl=torch.ones(2))
