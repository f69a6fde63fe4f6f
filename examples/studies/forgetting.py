"""What is lost of an earlier task, and of general text, when a model is tuned on a second task?

    encoder   MiniLM-L6: all parameters are trained on SST-2, then each method on TREC with a head of its own. SST-2 is
              scored again with its own head on the tuned encoder
    decoder   SmolLM2-135M: each method is trained on descriptions of restaurants (E2E). The loss of a token is
              measured on WikiText

Every method has its default size, and the rate of `recommended_learning_rate` times `--factor`; a decoder of this
size wants about a tenth. The data are those of HF_PEFT_EXT_DATA. An interrupted study continues.

    python examples/studies/forgetting.py --stage encoder --seeds 0 1 2
    python examples/studies/forgetting.py --stage decoder --factor 0.1 --steps 30
"""

import copy
import os
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_peft_ext.compare.methods import COMPARED_METHODS
from hf_peft_ext.compare.retention import text_loss
from hf_peft_ext.recipes.tasks import CONFIGS
from runs import (
    MINILM,
    RESULTS,
    SMOLLM2,
    Row,
    append,
    check_protocol,
    find_model,
    language_model,
    quiet,
    read,
    read_rows,
)

METHODS = ["full", "lora", "unipelt", "pfeiffer", "prefix", "ia3", "bitfit"]
EARLIER, SECOND = "sst2", "trec"
LENGTH = 64


@dataclass
class Arguments:
    """Options of the command."""

    stage: str = field(metadata={"help": "encoder or decoder."})
    methods: list[str] = field(default_factory=lambda: METHODS, metadata={"help": "Names as in `compare`."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Draws of rows, and starts."})
    factor: float = field(default=1.0, metadata={"help": "Factor on the learning rates."})
    earlier_rows: int = field(default=1000, metadata={"help": "Training rows of the earlier task."})
    rows: int = field(default=200, metadata={"help": "Training rows of the second task."})
    steps: int = field(default=200, metadata={"help": "Training steps on the second task."})
    test_rows: int = field(default=400, metadata={"help": "Test rows of each task, at most."})
    texts: int = field(default=60, metadata={"help": "General texts."})
    data: Path = field(
        default=Path(os.environ.get("HF_PEFT_EXT_DATA", "../shared/data")), metadata={"help": "Folder of the data."}
    )
    output: Path = field(default=RESULTS / "forgetting", metadata={"help": "Folder of the results."})


def adapted(model: nn.Module, method: str, task_type: str) -> Any:
    """The model with an untrained adapter; itself for full fine-tuning."""
    fields = dict(COMPARED_METHODS[method].config)
    config_cls = CONFIGS[fields.pop("peft_type")]
    if COMPARED_METHODS[method].trains_base:
        return model
    return get_peft_model(model, config_cls(task_type=task_type, **fields))  # pyright: ignore[reportArgumentType]


def train(model: Any, rows: Sequence[Row], rate: float, steps: int, batch: int, seed: int, tokenizer: Any) -> None:
    """Train with AdamW, a warm-up of a tenth of the steps, and linear decay."""
    with tempfile.TemporaryDirectory() as unused:
        options = TrainingArguments(
            **{"output_dir": unused, "max_steps": steps, "per_device_train_batch_size": batch, "seed": seed},
            **{"learning_rate": rate, "warmup_steps": 0.1, "save_strategy": "no", "logging_strategy": "no"},
            **{"report_to": "none", "disable_tqdm": True, "use_cpu": not torch.cuda.is_available()},
        )
        collator = DataCollatorForSeq2Seq(tokenizer) if isinstance(rows[0]["labels"], list) else None
        Trainer(model, options, train_dataset=rows, processing_class=tokenizer, data_collator=collator).train()  # pyright: ignore
    model.eval()


# encoder


def classification(args: Arguments, task: str, split: str, count: int, seed: int, tokenizer: Any) -> list[Row]:
    """Rows of a task, as tokens with labels."""
    rows = list(read(args.data, task, split))
    rows = random.Random(seed).sample(rows, min(count, len(rows)))
    return [{**tokenizer(row["text"], truncation=True, max_length=LENGTH), "labels": row["label"]} for row in rows]


@torch.no_grad()
def accuracy(encoder: nn.Module, head: nn.Module, rows: Sequence[Row], tokenizer: Any) -> float:
    """The accuracy in % of a head on an encoder's pooled output."""
    right = 0
    for i in range(0, len(rows), 50):
        batch = tokenizer.pad([{k: v for k, v in row.items() if k != "labels"} for row in rows[i : i + 50]],
                              return_tensors="pt")  # fmt: skip
        labels = torch.tensor([row["labels"] for row in rows[i : i + 50]])
        right += int((head(encoder(**batch).pooler_output).argmax(-1) == labels).sum())
    return 100 * right / len(rows)


def encoder_model(labels: int) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(find_model(MINILM), num_labels=labels)


def encoder_runs(args: Arguments, seed: int, methods: Sequence[str]) -> None:
    """Train on the earlier task once, and on the second one with each method."""
    tokenizer = AutoTokenizer.from_pretrained(find_model(MINILM))
    tests = {name: classification(args, name, "dev", args.test_rows, 0, tokenizer) for name in (EARLIER, SECOND)}
    set_seed(seed)
    first = encoder_model(2)
    rows = classification(args, EARLIER, "train", args.earlier_rows, seed, tokenizer)
    train(first, rows, 1e-4, args.earlier_rows // 4, 8, seed, tokenizer)
    before = accuracy(first.bert, first.classifier, tests[EARLIER], tokenizer)
    rows = classification(args, SECOND, "train", args.rows, seed, tokenizer)
    for method in methods:
        set_seed(seed)
        model = encoder_model(6)
        model.bert.load_state_dict(first.bert.state_dict())
        rate = args.factor * COMPARED_METHODS[method].learning_rate
        tuned = adapted(model, method, "SEQ_CLS")
        train(tuned, rows, rate, args.steps, 8, seed, tokenizer)
        result = {
            "before": before,
            "after": accuracy(model.bert, first.classifier, tests[EARLIER], tokenizer),
            "second": accuracy(model.bert, model.classifier, tests[SECOND], tokenizer),
        }
        record(args, method, seed, rate, result)


# decoder


def descriptions(args: Arguments, split: str, count: int, seed: int, tokenizer: Any) -> list[Row]:
    """Meaning representations and their texts; the loss is on the texts."""
    rows = list(read(args.data, "e2e_nlg", split))
    encoded = []
    for row in random.Random(seed).sample(rows, count):
        prompt = tokenizer(f"{row['mr']}\n")["input_ids"]
        answer = [*tokenizer(row["ref"])["input_ids"], tokenizer.eos_token_id]
        encoded.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return encoded


@torch.no_grad()
def answer_loss(model: Any, rows: Sequence[Row]) -> float:
    """The mean loss of a token of the answers, in nats."""
    losses, tokens = 0.0, 0
    for row in rows:
        labels = torch.tensor([row["labels"]])
        count = int((labels != -100).sum())
        losses += count * model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss.item()
        tokens += count
    return losses / tokens


def decoder_runs(args: Arguments, seed: int, methods: Sequence[str]) -> None:
    """Tune the language model with each method; its losses before and after."""
    base, tokenizer = language_model(SMOLLM2)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lines = (args.data / "wikitext2.valid.txt").read_text("utf-8").splitlines()
    lines = [line.strip() for line in lines if len(line) > 300]
    texts = [line[:400] for line in random.Random(0).sample(lines, args.texts)]
    held_out = descriptions(args, "dev", args.test_rows // 8, 0, tokenizer)
    before, untuned = text_loss(base, tokenizer, texts), answer_loss(base, held_out)
    rows = descriptions(args, "train", args.rows, seed, tokenizer)
    for method in methods:
        set_seed(seed)
        rate = args.factor * COMPARED_METHODS[method].learning_rate
        model = adapted(copy.deepcopy(base), method, "CAUSAL_LM")
        train(model, rows, rate, args.steps, 4, seed, tokenizer)
        after, second = text_loss(model, tokenizer, texts), answer_loss(model, held_out)
        record(args, method, seed, rate, {"before": before, "after": after, "untuned": untuned, "second": second})


# both


def record(args: Arguments, method: str, seed: int, rate: float, result: Row) -> None:
    """Add a run to the stage's file, and print it."""
    row = {"method": method, "seed": seed, "learning_rate": rate, **{k: round(v, 4) for k, v in result.items()}}
    append(args.output / f"{args.stage}.csv", row)
    print(row, flush=True)


def table(args: Arguments) -> str:
    """Means over seeds, the least forgetting first."""
    runs = read_rows(args.output / f"{args.stage}.csv")
    digits = 1 if args.stage == "encoder" else 3

    def text(values: Sequence[float], signed: bool = False) -> str:
        spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{fmean(values):{'+' if signed else ''}.{digits}f}{spread}"

    what = ("SST-2, %", "TREC, %") if args.stage == "encoder" else ("WikiText, nats", "E2E, nats")
    lines = [f"| method | rate | {what[0]}: before | after | change | {what[1]} |", "|---|--:|--:|--:|--:|--:|"]
    by_method = {
        name: [run for run in runs if run["method"] == name] for name in dict.fromkeys(r["method"] for r in runs)
    }
    for name, own in by_method.items():
        values = {key: [float(run[key]) for run in own] for key in ("before", "after", "second")}
        change = [b - a for a, b in zip(values["before"], values["after"], strict=True)]
        cells = [COMPARED_METHODS[name].title, f"{float(own[0]['learning_rate']):g}", text(values["before"])]
        lines.append(f"| {' | '.join([*cells, text(values['after']), text(change, True), text(values['second'])])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    args: Arguments = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]  # pyright: ignore[reportArgumentType]
    stages = {"encoder": encoder_runs, "decoder": decoder_runs}
    if args.stage not in stages:
        raise SystemExit(f"`stage` (={args.stage!r}) must be one of: {', '.join(stages)}.")
    quiet()
    args.output.mkdir(parents=True, exist_ok=True)
    kept = ("factor", "earlier_rows", "rows", "steps", "test_rows", "texts")
    check_protocol(args.output / f"{args.stage}.json", {name: getattr(args, name) for name in kept})
    for seed in args.seeds:
        done = {(row["method"], row["seed"]) for row in read_rows(args.output / f"{args.stage}.csv")}
        methods = [method for method in args.methods if (method, str(seed)) not in done]
        if methods:
            stages[args.stage](args, seed, methods)
    print(table(args))


if __name__ == "__main__":
    main()
