"""BridgeTrainer: its loss against the plugged model's own, what it saves, and that it resumes exactly."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainingArguments

from hf_peft_ext.pruning import pruned_copy
from hf_peft_ext.trainers import BridgeTrainer
from hf_peft_ext.transfer import merge_projections, plug

from .backbones import BACKBONES, output
from .test_transfer_fold import LARGE, refuses, slow, small_model

IDS = torch.randint(3, 60, (8, 6), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": row, "labels": row} for row in IDS]


def models():
    large = BACKBONES["llama"].build(**LARGE["llama"])
    pruned = pruned_copy(large, 2)
    torch.manual_seed(0)
    return plug(small_model("llama", "lora"), large), pruned


def trainer(folder, kind="delta", steps=4, **kwargs):
    plugged, pruned = models()
    args = TrainingArguments(
        str(folder), max_steps=steps, save_steps=2, per_device_train_batch_size=4, learning_rate=1e-3,
        report_to="none",
        use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant", max_grad_norm=0.0, **kwargs,
    )  # fmt: skip
    return BridgeTrainer(plugged, args, pruned, kind, train_dataset=ROWS)


def folded(model):
    return {name: value for name, value in merge_projections(model).state_dict().items() if "lora_" in name}


@pytest.mark.parametrize("kind", ["delta", slow("paper")])
def test_saves_the_plain_adapter_and_resumes(kind, tmp_path):
    one = trainer(tmp_path / "one", kind)
    one.train()
    one.save_model()
    again = PeftModel.from_pretrained(BACKBONES["llama"].build(**LARGE["llama"]), tmp_path / "one").eval()
    assert again.active_peft_config.peft_type.value == "LORA"
    two = trainer(tmp_path / "two", kind)
    two.train(resume_from_checkpoint=str(tmp_path / "one/checkpoint-2"))
    found, wanted = folded(two.release()), folded(one.release())
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        inputs = BACKBONES["llama"].inputs()
        torch.testing.assert_close(output(again, inputs), output(one.plugged.eval(), inputs), atol=1e-5, rtol=1e-5)


def test_first_loss_is_the_plugged_models(tmp_path):
    run = trainer(tmp_path, steps=1, logging_steps=1)
    plugged, _ = models()
    batch = next(iter(run.get_train_dataloader()))
    with torch.no_grad():
        wanted = plugged.eval()(**batch).loss
    assert float(run.compute_loss(run.model, dict(batch)).detach()) == pytest.approx(float(wanted), rel=1e-5)


def test_a_fresh_adapter_needs_no_small_model(tmp_path):
    """With nothing cut its gradient is that of the large model itself."""
    large = BACKBONES["llama"].build(**LARGE["llama"])
    pruned = pruned_copy(large, 1)
    model = get_peft_model(large, LoraConfig(target_modules=["q_proj", "v_proj"]))
    args = TrainingArguments(
        str(tmp_path), max_steps=1, optim="sgd", report_to="none", use_cpu=True, disable_tqdm=True, max_grad_norm=0.0
    )
    run = BridgeTrainer(model, args, pruned, train_dataset=ROWS)
    batch = next(iter(run.get_train_dataloader()))
    run.compute_loss(run.model, dict(batch)).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    run.release().zero_grad()
    model(**batch).loss.backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == wanted.keys()
    assert any(gradient.any() for gradient in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)


def test_errors(tmp_path):
    refuses("`kind` .='other'. must be delta or paper", ValueError, lambda: trainer(tmp_path, kind="other"))
