"""The two models of a pair, the rows of a task as they read them, and the settings that all runs share."""

import copy
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hf_peft_ext.prompts import load_templates
from hf_peft_ext.pruning import importance, pruned_copy
from hf_peft_ext.transfer.bridges.bridge import kept_channels
from hf_peft_ext.transfer.map.plug import depths
from hf_peft_ext.transfer.map.projections import layer_map
from hf_peft_ext.transfer.refine.stage_training import fit
from hf_peft_ext.transfer.run.task import Task
from hf_peft_ext.tuners.ladder.network import cut_depth
from runs import (
    MINILM,
    SMOLLM2,
    Row,
    exact_head,
    find_model,
    language_model,
)

console = Console()
TO_HEAL = "wikitext2.valid.txt"
TEXTS = ("text", "question", "premise", "sentence", "sentence1", "hypothesis", "sentence2")  # in this order


@dataclass
class Protocol:
    """The settings that all runs of an output share."""

    pair: str = field(default="minilm", metadata={"choices": ["minilm", "smollm2"]})
    model: str = field(default="", metadata={"help": "The large model, if it is another one of the pair's kind."})
    k: int = field(default=200, metadata={"help": "Training rows."})
    dev_rows: int = field(default=100, metadata={"help": "Other rows of train, to choose the scale by."})
    unlabelled: int = field(default=600, metadata={"help": "At most so many more rows, whose answers are not read."})
    test_rows: int = field(default=400, metadata={"help": "Most test rows."})
    steps: int = field(default=200, metadata={"help": "Of the small model, PEFT and full fine-tuning."})
    bridge_steps: int = field(default=100, metadata={"help": "Of either bridge."})
    mezo_steps: int = field(default=200, metadata={"help": "Of MeZO."})
    heal_steps: int = field(default=300, metadata={"help": "Of SmolLM2's small one, on text."})
    heal_lr: float = field(default=5e-4, metadata={"help": "Its rate."})
    batch_size: int = field(default=8, metadata={"help": "Rows in a step."})
    scales_lr: float = field(default=1e-1, metadata={"help": "Rate of MeZO for the scales of layers."})
    full_lr: float = field(default=5e-5, metadata={"help": "Rate of full fine-tuning."})
    bf16: bool = field(default=False, metadata={"help": "Autocast to bfloat16, except for MeZO."})
    measured_on: str = field(default="test", metadata={"choices": ["test", "dev"], "help": "dev to choose rates by."})


def load(protocol: Protocol, labels: int) -> tuple[Any, Any]:
    """Load the large model and its tokenizer."""
    if protocol.pair == "smollm2":
        model, tokenizer = language_model(protocol.model or SMOLLM2)
        model = copy.deepcopy(model).eval()
        exact_head(model)
        return model, tokenizer
    source = find_model(protocol.model or MINILM)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=labels)
    return model.eval(), AutoTokenizer.from_pretrained(source)


def as_row(pair: str, task: str, row: Row, tokenizer: Any) -> Row:
    """A row of data in the form that the model's task reads."""
    if pair == "smollm2":
        return load_templates(task)[0].render(row)
    texts = [row[name] for name in TEXTS if name in row]
    return {"text": f" {tokenizer.sep_token} ".join(texts), "label": row["label"]}


def small_of(
    large: Any, tokenizer: Any, data: Path, output: Path, protocol: Protocol
) -> tuple[Any, dict[Any, torch.Tensor]]:
    """The small model, and the channels of the large one that each of its spaces has, by layers of the large one."""
    (depth,) = depths(large)
    text = None if protocol.pair == "minilm" else reading(tokenizer, data)
    if text is None:
        pruned = pruned_copy(cut_depth(copy.deepcopy(large), list(range(0, depth, 2))), 1)
    else:
        batches = ({"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in text[:64].split(8))
        cut = cut_depth(copy.deepcopy(large), [i for i in range(depth) if i % 5 != 2])
        pruned = pruned_copy(cut, 4 / 3, "width", importance(cut, batches, "activation"))
    layers = layer_map(depths(pruned.model), [depth])
    kept = kept_channels(pruned)
    index = {(name, None): units for (name, layer), units in kept.items() if layer is None}
    index |= {(name, i): kept[name, j] for i, j in enumerate(layers) for name, layer in kept if layer == j}
    return (pruned.model if text is None else healed(pruned.model, text, output / "small", protocol)), index


def lowered(task: Any, protocol: Protocol) -> Any:
    """The task, with its forward passes under autocast if the protocol says so."""
    if protocol.bf16:
        task = copy.copy(task)
        for name in {"loss", "scores"} & set(dir(task)):
            setattr(task, name, torch.autocast("cpu", torch.bfloat16)(getattr(task, name)))
    return task


def reading(tokenizer: Any, data: Path, length: int = 128) -> torch.Tensor:  # shape: (rows, length)
    """The tokens of the text that the small model is healed on."""
    ids = torch.tensor(tokenizer((data / TO_HEAL).read_text(encoding="utf-8")).input_ids)
    return ids[: len(ids) // length * length].view(-1, length)


class Reading:
    """The language modelling loss on tokens, with the interface that `fit` needs."""

    def loss(self, model: Any, rows: list[torch.Tensor]) -> torch.Tensor:
        ids = torch.stack(rows)
        return model(input_ids=ids, labels=ids).loss


def healed(small: Any, text: torch.Tensor, path: Path, protocol: Protocol) -> Any:
    """The small model after some training on text, which is done once."""
    if not path.exists():
        start = time.process_time()
        fit(small, lowered(Reading(), protocol), list(text), protocol.heal_steps, protocol.heal_lr)  # pyright: ignore
        small.save_pretrained(path.with_name("partial-small"))
        path.with_name("partial-small").rename(path)
        console.print(f"healed in {time.process_time() - start:.0f} s of process time")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    exact_head(model)
    return model


@torch.no_grad()
def fit_head(model: Any, task: Task, rows: list[Row]) -> None:
    """Set the classification head to a logistic regression on the frozen model's features."""
    read_by_head: list[torch.Tensor] = []
    handle = model.classifier.register_forward_pre_hook(lambda _, args: read_by_head.append(args[0]))
    task.scores(model, rows)
    handle.remove()
    x = torch.cat(read_by_head).float()
    centre, scale = x.mean(0), x.std(0).clamp_min(1e-6)
    found = LogisticRegression(C=0.01, max_iter=1000).fit(((x - centre) / scale).numpy(), task.answers(rows))
    weight = torch.from_numpy(found.coef_).float() / scale
    bias = torch.from_numpy(found.intercept_).float() - weight @ centre
    if len(bias) == 1:  # for two answers: the log-odds of the second
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    model.classifier.weight.zero_()
    model.classifier.bias.fill_(float(bias.min()) - 5)  # for answers that no row has
    model.classifier.weight[found.classes_] = weight
    model.classifier.bias[found.classes_] = bias
