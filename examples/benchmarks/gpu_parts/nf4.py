"""Every method on a model in NF4 with double quantisation: train, evaluate, train, save, reload."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, prepare_model_for_kbit_training
from tables import Row
from torch import Tensor
from transformers import BitsAndBytesConfig

from .models import METHODS, SHAPES, adapted, batch, build, trained
from .part import Part, Setting


def saved(name: str, setting: Setting) -> Path:
    """The folder of the base model, made by the first row that asks."""
    folder = setting.folder / name.replace(" ", "_")
    if not folder.exists():
        build(SHAPES[name], setting).save_pretrained(folder)
    return folder


def four_bit(name: str, setting: Setting) -> Any:
    """A fresh 4-bit model, prepared as peft says; the same at every call."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", "classifier"],  # a head that is trained cannot be packed
    )
    kind = type(build(SHAPES[name], setting, layers=1))
    folder = saved(name, setting)
    model = kind.from_pretrained(folder, quantization_config=config, device_map={"": setting.device})
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def train(model: Any, inputs: dict[str, Any], steps: int = 3) -> tuple[float, int]:
    """The last loss, and how many trained tensors had no finite gradient."""
    optimizer = torch.optim.AdamW(trained(model), 1e-3)
    model.train()
    loss = torch.tensor(float("nan"))
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
    without = [p for p in trained(model) if p.grad is None or not p.grad.isfinite().all()]
    return loss.item(), len(without)


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    return model.eval()(**inputs).logits.float()


def measure(name: str, method: str, setting: Setting) -> Row:
    shape = SHAPES[name]
    inputs = batch(shape, setting)
    model = adapted(four_bit(name, setting), method, shape)
    start = logits(model, inputs)
    first, without = train(model, inputs)
    between = logits(model, inputs)
    second, later = train(model, inputs)
    end = logits(model, inputs)
    folder = setting.folder / f"{name}, {method}"
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(four_bit(name, setting), folder)
    reloaded = logits(again, inputs)
    return {
        "loss, first training": first,
        "second training": second,
        "without gradient": f"{without}, {later}",
        "logits moved by": (between - start).abs().max().item(),
        "then by": (end - between).abs().max().item(),
        "reloaded, they differ by": (reloaded - end).abs().max().item(),
    }


PART = Part(
    "NF4 with double quantisation: train, evaluate, train, save, reload",
    "Largest differences of a logit. The last column must be 0.",
    ("model", "method"),
    {name: list(METHODS) for name in ("Llama, 4 layers of 1024", "BERT-base")},
    measure,
)
