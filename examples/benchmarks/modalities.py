"""On which heads of transformers for images and speech do the methods work?

The script builds a tiny random model of every head for images, speech, and images with text, and adapts it by every
method. It checks that the untrained adapter is the base model, that every part that ran is trained, that one step of
training changes the output, and that the saved adapter, loaded on the base model again, has equal outputs.

    python examples/benchmarks/modalities.py                            # all heads, about half an hour on one core
    python examples/benchmarks/modalities.py --model_types vit whisper  # some of them
"""

import copy
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures import FOUND, LORA, chosen_heads, first_line, host
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.progress import track
from tables import Row, show, write
from tiny_models import HEADS, result, tiny
from torch import Tensor, nn
from transformers import HfArgumentParser

from hf_peft_ext import (
    BitFitConfig,
    BottleneckConfig,
    LadderConfig,
    LayerPrefixConfig,
    MAMConfig,
    S4Config,
    TFewConfig,
    UniPELTConfig,
    find_target_modules,
)

METHODS: dict[str, Callable[..., PeftConfig]] = {
    "UniPELT": UniPELTConfig,
    "bottleneck": lambda: BottleneckConfig(r=8),  # of the default's two units in a tiny model all may be dead
    "parallel": lambda: BottleneckConfig(style="parallel", r=8),
    "MAM": MAMConfig,
    # its defaults need more layers, and more parameters, than tiny models have
    "S4": lambda: S4Config(grouping="uniform", strategies=[("adapter", "lora"), ("prefix", "bitfit")], budget=0.1),
    "BitFit": BitFitConfig,
    "prefix": LayerPrefixConfig,
    "ladder": LadderConfig,
    "T-Few": TFewConfig,
    FOUND: LoraConfig,
    LORA: LoraConfig,
}


@dataclass
class Arguments:
    """Options of the command."""

    model_types: list[str] | None = field(default=None, metadata={"help": "Model types; all by default."})
    tasks: list[str] | None = field(default=None, metadata={"help": "Kinds of heads; all by default."})
    methods: list[str] | None = field(default=None, metadata={"help": "Methods; all by default."})
    output: Path | None = field(default=None, metadata={"help": "Folder for the tables; none are written by default."})


def main() -> None:
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]  # pyright: ignore[reportArgumentType]
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    heads = chosen_heads(HEADS, args.tasks, args.model_types)
    methods = args.methods or list(METHODS)
    rows: list[Row] = []
    unbuilt: list[Row] = []
    for task, model_type, class_name in track(heads, "adapting", transient=True):
        try:
            head = Head(*tiny(model_type, class_name))
        except Exception as error:
            unbuilt.append({"task": task, "model": model_type, "reason": first_line(error)})
            continue
        rows.append({"task": task, "model": model_type, **{name: tried(name, head) for name in methods}})
    report(rows, unbuilt, methods, args.output)


class Head:
    """A model with inputs, and what the checks of all methods compare with.

    Args:
        base: the model.
        inputs: its inputs.
    """

    def __init__(self, base: nn.Module, inputs: dict[str, Tensor]):
        self.base, self.inputs = base, inputs
        with torch.no_grad():
            self.expected = result(base, inputs)
        self.unused = unused(base, inputs)


def tried(method: str, head: Head) -> str:
    """Nothing if a method works on a model, or what fails."""
    try:
        targets = {"target_modules": find_target_modules(head.base)} if method == FOUND else {}
        check(head, METHODS[method](**targets))
    except Exception as error:
        return first_line(error)
    return ""


def check(head: Head, config: PeftConfig) -> None:
    """Adapt a copy of the model; see that the adapter starts as the base model, learns, and is saved whole.

    Raises:
        AssertionError: it does not; or whatever the method says.
    """
    inputs, expected = head.inputs, head.expected
    model: Any = get_peft_model(copy.deepcopy(head.base), config).eval()  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        assert equal(result(model, inputs), expected), "the untrained adapter has an effect"
    train_one_step(model, inputs, head.unused)
    with torch.no_grad():
        changed = result(model, inputs)
        assert changed.isfinite().all(), "the output is not finite"
        assert not torch.equal(changed, expected), "a step of training has no effect"
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            again = PeftModel.from_pretrained(copy.deepcopy(head.base), folder).eval()
        assert equal(result(again, inputs), changed), "the adapter that was saved and loaded is another one"


def unused(base: nn.Module, inputs: dict[str, Tensor]) -> set[str]:
    """The modules of the base model from which no gradient would come: those that did not run, or for nothing.

    The pooler of CLIP's vision tower is one, where the head does not read it.
    """
    model: Any = copy.deepcopy(base).requires_grad_(True)
    result(model, inputs).float().square().mean().backward()
    unused = set[str]()
    for name, module in model.named_modules():
        own = list(module.parameters())
        own = [p for p in own if p.ndim > 1] or own  # the bias of a leaf that reads zeros has a gradient
        if own and not any(p.grad is not None and p.grad.any() for p in own):
            unused.add(name)
    return unused


def train_one_step(model: Any, inputs: dict[str, Tensor], unused: set[str]) -> None:
    """One step of gradient descent from random weights, with which every part of an adapter has a gradient.

    Raises:
        AssertionError: a part at a module that is used has no gradient.
    """
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in own.items():
            std = 1e-4 if ".gate." in name else 0.1  # a saturated gate has no gradient
            parameter.normal_(mean=float(".ia3_" in name), std=std)  # scales stay near one
    result(model, inputs).float().square().mean().backward()
    top = "base_model.model."
    hosts = {name: host(name).removeprefix(top).removesuffix(".base_layer") for name in own}
    idle = [n for n, p in own.items() if hosts[n] not in unused and (p.grad is None or not p.grad.any())]
    assert not idle, f"{len(idle)} of {len(own)} parameters have no gradient, {idle[0]} for one"
    torch.optim.SGD(own.values(), lr=0.1).step()


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two outputs are equal but for rounding."""
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def report(rows: list[Row], unbuilt: list[Row], methods: list[str], output: Path | None) -> None:
    console = Console()
    tasks = [task for task in HEADS if any(row["task"] == task for row in rows)]
    counts: list[Row] = []
    for task in [*tasks, "all"]:
        group = [row for row in rows if task in (row["task"], "all")]
        counts.append({"heads": task, **{m: sum(not row[m] for row in group) for m in methods}, "built": len(group)})
    misses: list[Row] = [
        {"task": row["task"], "model": row["model"], "methods": ", ".join(names), "reason": reason}
        for row in rows
        for reason in dict.fromkeys(filter(None, (row[m] for m in methods)))
        if (names := [m for m in methods if row[m] == reason])
    ]
    for miss in misses:
        console.print(
            f"{miss['methods']}, {miss['model']} {miss['task']}: {miss['reason']}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    console.print(
        f"No small model could be built of {len(unbuilt)} heads: {', '.join(row['model'] for row in unbuilt)}."
    )
    title = f"heads on which the defaults work (transformers {transformers.__version__})"
    show(console, title, counts)
    if output:
        output.mkdir(parents=True, exist_ok=True)
        write(output, "modalities", title, counts)
        write(output, "misses", "what does not work, and why", misses)
        if unbuilt:
            write(output, "unbuilt", "heads of which no small model could be built", unbuilt)


if __name__ == "__main__":
    main()
