"""A small search for tests: a space of two stages over a tiny BERT, two tasks, and workers in their own processes."""

import multiprocessing
import os
import time

import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_peft_ext import ComposedConfig
from hf_peft_ext.attach.placement import Placement
from hf_peft_ext.search import DesignSpaceSearch, RunArguments, SearchTask, share_trunk, trial_queue

from .backbones import PLAIN, VOCAB

N_MODELS = 2
ARGS = RunArguments(num_train_epochs=1, learning_rate=0.05)


class TwoStages:
    """S1: LoRA in the first or in the last layer; S2: of small or of large rank."""

    def __init__(self, *winners):
        self.winners = winners

    @property
    def stage(self):
        return f"S{len(self.winners) + 1}"

    @property
    def finished(self):
        return len(self.winners) == 2

    def constraints(self):
        return (["first", "last"], ["small", "large"])[len(self.winners)]

    def narrow(self, winner):
        return type(self)(*self.winners, winner)

    def sample(self, constraint, n, seed=0):
        return [lora(*self.winners, constraint, i) for i in range(n)]

    def config(self):
        return lora(*self.winners, 0)


def lora(layer, *size):
    """A model of the space; those of S1 have a size between those of S2."""
    *size, model = size
    r = {"small": 1, "large": 5}.get("".join(size), 3) + model % 2
    layers = [["first", "last"].index(layer)]
    return ComposedConfig(task_type="SEQ_CLS", placements=[Placement("low_rank", "query", layers, options={"r": r})])


def accuracy(evaluated):
    return {"accuracy": float((evaluated.predictions.argmax(-1) == evaluated.label_ids).mean())}


def tiny_tasks(metric=accuracy):
    """Two tasks of two and three classes, on one trunk."""
    torch.manual_seed(0)
    labels = {"two": 2, "three": 3}
    models = {
        name: BertForSequenceClassification(BertConfig(vocab_size=VOCAB, num_labels=n, **PLAIN))
        for name, n in labels.items()
    }
    share_trunk(models)
    return {
        name: SearchTask(models[name], rows[:16], rows[16:], metric)
        for name, n in labels.items()
        if (rows := [{"input_ids": torch.randint(3, VOCAB, (5,)).tolist(), "labels": i % n} for i in range(24)])
    }


def search(file, tasks=None, space=None, **kwargs):
    storage = file if "://" in str(file) else f"sqlite:///{file}"
    options = {"storage": storage, "n_models": N_MODELS, "heartbeat": 1, "progress": False, **kwargs}
    return DesignSpaceSearch(tasks or tiny_tasks(), space or TwoStages(), ARGS, **options)


def work(file, log, seconds):
    """A worker: notes each run of a task as it begins, and takes at least so long for it."""
    torch.set_num_threads(1)
    trial_queue.POLL = 0.1

    class Logged(SearchTask):
        def batches(self, part, size):
            if part == "train":
                with open(log, "a", encoding="utf-8") as lines:
                    lines.write(f"{os.getpid()} {self.name}\n")
                time.sleep(seconds)
            return super().batches(part, size)

    tasks = tiny_tasks()
    for name, task in tasks.items():
        task.__class__, task.name = Logged, name
    search(file, tasks).search()


def start_worker(file, log, seconds=0.0):
    """`work` in a process that is forked from a server, which has imported everything once and trained nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    worker = context.Process(target=work, args=(str(file), str(log), seconds))
    worker.start()
    return worker
