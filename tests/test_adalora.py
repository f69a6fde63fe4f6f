"""AdaLoRA's ranks fall to their target in a Trainer; the file of the adapter holds the directions that are left."""

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback

from hf_peft_ext.trainers import AdaLoraCallback, AdapterTrainer

from .test_training import arguments, classifier, separable
from .tiny_trainers import lora

# 2026-11: the data loader asks for pinned memory wherever it runs
pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning"),
    # of a matrix that is pruned to rank 0, when it is saved
    pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor.s. have invalid shape"),
    # peft takes AdaLoRA's pattern for one of LoRA, when it is loaded
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
]
SCHEDULE = {"init_r": 6, "target_r": 2, "total_step": 12, "tinit": 2, "tfinal": 3, "deltaT": 2}


def adalora(**kwargs):
    torch.manual_seed(3)
    config = AdaLoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], **(SCHEDULE | kwargs))
    model = get_peft_model(classifier(), config)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def trained(folder, model, cls=AdapterTrainer, callbacks=(), **kwargs):
    options = {"max_steps": 12, "save_strategy": "no"} | kwargs
    trainer = cls(model, arguments(folder, **options), train_dataset=separable(), callbacks=[*callbacks])
    trainer.train()
    return trainer


def ranks(model):
    return [sum(kept) for kept in model.peft_config["default"].rank_pattern.values()]


class Watched(TrainerCallback):
    """The number of directions after each step."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.kept = []

    def on_step_end(self, args, state, control, **kwargs):
        weights = (p for name, p in kwargs["model"].named_parameters() if "lora_E" in name)
        self.kept.append(sum(int(weight.count_nonzero()) for weight in weights))


RUNS = [(AdapterTrainer, []), (AdapterTrainer, [AdaLoraCallback]), (Trainer, [AdaLoraCallback])]


@pytest.mark.parametrize(("cls", "own"), RUNS, ids=["added", "given", "stock"])
def test_ranks_fall_to_the_target(cls, own, tmp_path):
    """Whole for `tinit` steps, then pruned at every second step, and at the target in the last `tfinal` ones."""
    model, watched = adalora(), Watched()
    trainer = trained(tmp_path, model, cls, [watched, *(make() for make in own)])
    assert sum(isinstance(callback, AdaLoraCallback) for callback in trainer.callback_handler.callbacks) == 1
    modules = len(ranks(model))
    assert watched.kept[:3] == [6 * modules] * 3
    falling = watched.kept[3:8:2]  # between two prunings the optimizer moves what was pruned
    assert falling == sorted(falling, reverse=True)
    assert falling[0] < 6 * modules
    assert watched.kept[8:] == [2 * modules] * 4
    assert sum(ranks(model)) == 2 * modules


def test_as_the_loop_in_pefts_documentation(tmp_path):
    """The callback's weights equal those of the loop that peft documents, step by step."""
    rows, model, plain = separable(), adalora(), adalora()
    optimizer = SGD(model.parameters(), lr=0.1)
    args = arguments(tmp_path, max_steps=12, save_strategy="no", max_grad_norm=0.0, per_device_train_batch_size=64)
    schedule = LambdaLR(optimizer, lambda step: 1.0)
    AdapterTrainer(model, args, train_dataset=rows, optimizers=(optimizer, schedule)).train()
    optimizer, plain = SGD(plain.parameters(), lr=0.1), plain.train()
    batch = {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}
    for step in range(1, 13):
        plain(**batch).loss.backward()
        optimizer.step()
        plain.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=name)
    assert ranks(model) == ranks(plain)


def test_the_file_holds_what_is_left(tmp_path):
    """The saved tensors have the final ranks, and a model that loads them has equal outputs."""
    model = adalora()
    trained(tmp_path, model).save_model(str(tmp_path / "adapter"))
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(len(t) for name, t in tensors.items() if "lora_A" in name) == sum(ranks(model))
    loaded = PeftModel.from_pretrained(classifier(), tmp_path / "adapter")
    ids = torch.stack([row["input_ids"] for row in separable(8)])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits, rtol=0, atol=1e-6)


def test_the_schedule_is_stretched(tmp_path):
    """Steps as percentages: 10 % before and 30 % after, of 20 steps."""
    model = adalora(total_step=100, tinit=10, tfinal=30, deltaT=1)
    trained(tmp_path, model, max_steps=20)
    config = model.peft_config["default"]
    assert (config.tinit, config.tfinal, config.total_step) == (2, 6, 20)
    assert sum(ranks(model)) == 2 * len(ranks(model))


def test_refused(tmp_path):
    with pytest.raises(ValueError, match="`model` \\(='PeftModelForSequenceClassification'\\) must have an AdaLoRA"):
        trained(tmp_path, lora(), Trainer, [AdaLoraCallback()])
    with pytest.raises(ValueError, match="`init_r` \\(=2\\) must be above `target_r` \\(=2\\)"):
        trained(tmp_path, adalora(init_r=2))
    with pytest.raises(ValueError, match="`tinit` \\(=50\\) must leave steps to prune in: of 2 steps, 1 come before"):
        trained(tmp_path, adalora(total_step=100, tinit=50, tfinal=49), max_steps=2)
    with pytest.raises(ValueError, match="`tinit` \\(=10\\) must leave steps to prune in: of 2 steps, 0 come before"):
        trained(tmp_path, adalora(total_step=100, tinit=10, tfinal=30), max_steps=2)
    best = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    args, rows = arguments(tmp_path, load_best_model_at_end=True, **best), separable(16)
    trainer = AdapterTrainer(adalora(), args, train_dataset=rows, eval_dataset=rows)
    with pytest.raises(ValueError, match="`load_best_model_at_end` \\(=True\\) must be False for AdaLoRA"):
        trainer.train()
    trained(tmp_path, adalora(), Trainer, [AdaLoraCallback()], save_strategy="steps", save_steps=1, max_steps=12)
    trainer = Trainer(adalora(), arguments(tmp_path), train_dataset=rows, callbacks=[AdaLoraCallback()])
    with pytest.raises(ValueError, match="`global_step` \\(=1\\) must be 0 for AdaLoRA"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("step", [1, 5, 10])
def test_resumes_exactly(step, tmp_path):
    """Before the pruning, during it, and after: the same weights and ranks as without a break."""
    whole = adalora()
    trained(tmp_path / "whole", whole, save_strategy="steps", save_steps=step)
    model, rows = adalora(), separable()
    args = arguments(tmp_path / "whole", max_steps=12, save_strategy="no")
    trainer = AdapterTrainer(model, args, train_dataset=rows)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    for (name, one), other in zip(whole.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert ranks(model) == ranks(whole)
