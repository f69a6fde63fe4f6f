"""Does it matter where LoRA's ranks are? Equal numbers of parameters on two tasks, through `compare`.

    ranks      rank 4 in all six matrices of a layer; ten random draws of ranks; AdaLoRA, 6 to 4; full
    modules    LoRA in one kind of matrix at a time, in queries and values, and in all, 92,160 parameters each

The rows and settings are those of `which_method.py`: MiniLM-L6, K rows of a pool drawn once, 200 to score on, the
usual learning rates. A cell that was interrupted continues, and several processes share one. AdaLoRA trains 1.5 times
the parameters until its ranks have fallen.

    python examples/studies/rank_budget.py --stage ranks --tasks trec qnli --k 100 --seeds 2
    python examples/studies/rank_budget.py --stage modules --tasks trec --k 100 --seeds 2
    python examples/studies/rank_budget.py --tasks trec --methods "lora all" "adalora r4" --rates 3 --output other
    python examples/studies/rank_budget.py --stage table
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForSequenceClassification

import which_method
from hf_peft_ext import random_rank_pattern
from hf_peft_ext.compare.methods import COMPARED_METHODS, Method
from hf_peft_ext.trainers import compare
from hf_peft_ext.tuners.learning_rates import LEARNING_RATES
from runs import MINILM, RESULTS, append, find_model, parse
from which_method import DEV, cells_of, recipe

R, DRAWS, BUDGET = 4, 10, 92_160
SCALING = 2  # lora_alpha / r
# A matrix of MiniLM's layers -> the paths of its linear leaves
LEAVES = {
    "q": r".*attention\.self\.query",
    "k": r".*attention\.self\.key",
    "v": r".*attention\.self\.value",
    "o": r".*attention\.output\.dense",
    "FFN in": r".*intermediate\.dense",
    "FFN out": r".*layer\.\d+\.output\.dense",
}
ALL = "|".join(LEAVES.values())
# Kinds of matrices -> their rank at the budget; those of 384 x 1536 cost 2.5 times as much
RANKS = {("q",): 20, ("k",): 20, ("v",): 20, ("o",): 20, ("q", "v"): 10, ("FFN in",): 8, ("FFN out",): 8,
         ("FFN in", "FFN out"): 4}  # fmt: skip
NOTE = (
    "MiniLM-L6; accuracy in % on 200 rows that the run did not train on, mean over seeds, and for random ranks over "
    "the draws. The difference from LoRA is over all tasks and seeds, with its 95 % interval and p of a paired "
    "t-test, uncorrected."
)


@dataclass
class Arguments(which_method.Arguments):
    """Options of the command."""

    stage: str = field(default="ranks", metadata={"help": "ranks, modules, or table."})
    seeds: int = field(default=2, metadata={"help": "Runs of each method, and of each draw of ranks."})
    tasks: list[str] = field(default_factory=lambda: ["trec", "qnli"], metadata={"help": "Tasks."})
    output: Path = field(default=RESULTS / "rank_budget", metadata={"help": "Folder of the results."})


def lora(title: str, targets: str, **ranks: object) -> Method:
    """LoRA in some matrices; by default at rank R."""
    config = {"peft_type": "LORA", "target_modules": targets, "r": R, "lora_alpha": SCALING * R} | ranks
    return Method(title, config, LEARNING_RATES["LORA"])


def rank_methods() -> dict[str, Method]:
    """LoRA with equal and with random ranks, AdaLoRA, and full fine-tuning."""
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(find_model(MINILM)))
    draws = {
        f"draw {seed}": lora(f"random ranks {seed}", ALL, **random_rank_pattern(model, R, seed, ALL))
        for seed in range(DRAWS)
    }
    schedule = {"init_r": 6, "target_r": R, "total_step": 100, "tinit": 10, "tfinal": 50, "deltaT": 2}
    config = {"peft_type": "ADALORA", "target_modules": ALL, "lora_alpha": SCALING * 6, **schedule}
    adalora = Method("AdaLoRA", config, LEARNING_RATES["LORA"])
    return {"lora all": lora("LoRA", ALL), "adalora r4": adalora, "full": COMPARED_METHODS["full"], **draws}


def module_methods() -> dict[str, Method]:
    """LoRA by module at the same number of parameters."""
    methods = {
        f"lora {'+'.join(kinds)}": lora(
            " and ".join(kinds), "|".join(LEAVES[kind] for kind in kinds), r=r, lora_alpha=SCALING * r
        )
        for kinds, r in RANKS.items()
    }
    third = {"rank_pattern": {"query": 3, "value": 3}, "alpha_pattern": {"query": 3 * SCALING, "value": 3 * SCALING}}
    return methods | {"lora everywhere": lora("all six", ALL, r=2, lora_alpha=2 * SCALING, **third)}


STAGES = {"ranks": rank_methods, "modules": module_methods}


def run(args: Arguments) -> None:
    methods = STAGES[args.stage]()
    COMPARED_METHODS.update(methods)
    for task in args.tasks:
        folder = args.output / f"{args.stage}-{task}-{args.k}"
        result = compare(
            recipe(args, task, folder),
            methods=args.methods or list(methods),
            seeds=args.seeds,
            rates=args.rates or [1.0],
            dev_share=DEV / (args.k + DEV),
            output_dir=folder,
            train_winner=False,
            progress=False,
        )
        Console().print(f"{task}: {result.recommendation}")


def with_draws_as_one(cells: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """The cells with the draws of ranks as one method: its score for a seed is the mean over the draws."""
    joined = {}
    for task, methods in cells.items():
        draws = [scores for title, scores in methods.items() if title.startswith("random ranks")]
        seeds = {seed for scores in draws for seed in scores}
        mean = {seed: fmean(scores[seed] for scores in draws if seed in scores) for seed in sorted(seeds)}
        joined[task] = {t: s for t, s in methods.items() if not t.startswith("random ranks")} | (
            {f"random ranks, mean of {len(draws)} draws": mean} if mean else {}
        )
    return joined


def draws(args: Arguments) -> str:
    """The lowest and the highest draw of each task, by their means over seeds."""
    lines = []
    for task, methods in cells_of(args.output, "ranks").items():
        means = {t: fmean(s.values()) for t, s in methods.items() if t.startswith("random ranks") and s}
        if means:
            lines.append(f"- {task}: draws from {min(means.values()):.1f} to {max(means.values()):.1f}")
    return "\n".join(lines) + "\n"


def report(args: Arguments) -> None:
    """Write runs.csv and table.md, and print the table."""
    (args.output / "runs.csv").unlink(missing_ok=True)
    for path in sorted(args.output.glob("*/compare.json")):
        for method in json.loads(path.read_text("utf-8"))["methods"]:
            for seed, score in method["scores"].items():
                kept = {"cell": path.parent.name, "method": method["title"], "learning_rate": method["learning_rate"]}
                append(args.output / "runs.csv", {**kept, "seed": seed, "score": f"{100 * score:.1f}"})
    tables = [
        which_method.table_of("ranks", with_draws_as_one(cells_of(args.output, "ranks")), "LoRA") + "\n" + draws(args),
        which_method.table_of("modules", cells_of(args.output, "modules"), "q and v"),
    ]
    text = f"# Ranks and modules at one budget\n\n{NOTE}\n\n" + "\n".join(tables)
    (args.output / "table.md").write_text(text, encoding="utf-8")
    print(text)


def main() -> None:
    args = parse(Arguments, [*STAGES, "table"])
    report(args) if args.stage == "table" else run(args)


if __name__ == "__main__":
    main()
