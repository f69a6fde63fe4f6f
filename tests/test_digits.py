"""A real task on images: handwritten digits of scikit-learn and a tiny ViT with random weights."""

import numpy as np
import pytest
import torch
from peft import PeftModel
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from hf_peft_ext import UniPELTConfig
from hf_peft_ext.trainers import AdapterTrainer

TRAIN, TEST = 400, 200
EPOCHS = 12
# 2026-11: the data loader asks for pinned memory wherever it runs
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")


def rows():
    """Images of 8 x 8 pixels and their digits: 400 rows to train on, 200 to test on."""
    digits = load_digits()
    chosen = np.random.default_rng(0).permutation(len(digits.target))[: TRAIN + TEST]
    images = torch.tensor(digits.images[chosen] / 16, dtype=torch.float32)[:, None]  # (rows, 1, 8, 8)
    made = [{"pixel_values": x, "labels": int(y)} for x, y in zip(images, digits.target[chosen], strict=True)]
    return made[:TRAIN], made[TRAIN:]


def vit():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, initializer_range=0.1, **sizes)
    return ViTForImageClassification(config)


def accuracy(out):
    return {"accuracy": float((out.predictions.argmax(-1) == out.label_ids).mean())}


def trained(trainer, model, folder, epochs, rate, **kwargs):
    train, test = rows()
    args = TrainingArguments(
        str(folder), num_train_epochs=epochs, learning_rate=rate, per_device_train_batch_size=40, seed=0,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = trainer(model, args, train_dataset=train, eval_dataset=test, compute_metrics=accuracy, **kwargs)
    trainer.train()
    return trainer, trainer.evaluate()["eval_accuracy"]


def test_digits(tmp_path):
    """UniPELT and the head learn the digits, far above the head alone; the saved adapter predicts the same."""
    head = vit()
    for name, parameter in head.named_parameters():
        parameter.requires_grad = name.startswith("classifier")
    _, alone = trained(Trainer, head, tmp_path / "head", epochs=EPOCHS, rate=3e-2)
    config = UniPELTConfig(modules_to_save=["classifier"], bottleneck_size=16)
    trainer, score = trained(AdapterTrainer, vit(), tmp_path / "unipelt", EPOCHS, 1e-2, peft_config=config)
    print(f"accuracy: head alone {alone:.3f}, UniPELT {score:.3f}")
    assert score > 0.7
    assert score > alone + 0.1
    trainer.save_model()
    again = PeftModel.from_pretrained(vit(), tmp_path / "unipelt").eval()
    images = torch.stack([row["pixel_values"] for row in rows()[1]])
    with torch.no_grad():
        expected = trainer.model.eval()(pixel_values=images).logits
        torch.testing.assert_close(again(pixel_values=images).logits, expected)
