"""Trainers of tiny models for the tests: how they are built, and what they logged."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer

from hf_peft_ext import LayerPrefixConfig, UniPELTConfig
from hf_peft_ext.trainers import AdapterTrainer, AdapterTrainerMixin

from .test_training import arguments, classifier, separable


def config(**kwargs):
    return UniPELTConfig(bottleneck_size=8, num_virtual_tokens=4, lora_dropout=0.1, task_type="SEQ_CLS", **kwargs)


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def trainer(folder, peft_config=None, cls=AdapterTrainer, model=None, callbacks=None, **kwargs):
    model = classifier() if model is None else model
    peft_config = peft_config or (None if hasattr(model, "peft_config") else config())
    given = {"train_dataset": separable(), "eval_dataset": separable(16), "compute_metrics": accuracy}
    return cls(model, arguments(folder, **kwargs), peft_config=peft_config, callbacks=callbacks, **given)


def losses(trainer):
    return {e["step"]: e["loss"] for e in trainer.state.log_history if "loss" in e}


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def two_adapters():
    """The adapter that is trained has a name of its own, and another one lies beside it."""
    torch.manual_seed(3)
    model = get_peft_model(classifier(), config(), adapter_name="first")
    model.add_adapter("second", config(modules_to_save=["pooler"]))
    model.set_adapter("second")
    return model


def projected():
    torch.manual_seed(3)
    wide = {"num_virtual_tokens": 4, "encoder_hidden_size": 8, "task_type": "SEQ_CLS"}
    return get_peft_model(classifier(), LayerPrefixConfig(prefix_projection=True, **wide))


def lora():
    torch.manual_seed(3)
    return get_peft_model(classifier(), LoraConfig(task_type="SEQ_CLS", lora_dropout=0.1))


class TheirTrainer(Trainer):
    """A trainer as somebody else would write it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class TermsTrainer(AdapterTrainerMixin, TheirTrainer):
    _name = "Terms"

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        norm = outputs.logits.square().mean()
        self.add_loss_terms(class_loss=loss, logit_loss=0.1 * norm)
        loss = loss + 0.1 * norm
        return (loss, outputs) if return_outputs else loss
