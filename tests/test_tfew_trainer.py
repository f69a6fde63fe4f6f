"""TFewTrainer: accumulated batches against one big batch, its scores against `score_choices`, resuming to the bit.

Tiny models on the CPU. Two processes are in test_tfew_processes.py.
"""

import dataclasses
import gc

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import HfArgumentParser, Trainer
from transformers.optimization import Adafactor

from hf_peft_ext import TFewConfig, UniPELTConfig, score_choices
from hf_peft_ext.hub_cards import TrainingRecord
from hf_peft_ext.ranking.losses import choice_loss, lm_loss, unlikelihood_loss
from hf_peft_ext.ranking.packing import choice_token_scores
from hf_peft_ext.trainers import TFewTrainer, TFewTrainingArguments
from hf_peft_ext.trainers.choice_batches import right

from .backbones import BACKBONES
from .methods import randomise
from .test_rank_classification import DECODER, SEQ2SEQ
from .test_training import StopAt, trained
from .tiny_trainers import logged

# 2026-11: the data loader asks for pinned memory wherever it runs
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")

ROWS = [
    {"prompt": "Is it good?\nAnswer:", "choices": ["yes", "no"], "answer": 0},
    {"prompt": "Is the weather not good today?", "choices": ["yes, it is", "no", "perhaps it will be"], "answer": 1},
    {"prompt": "The answer is", "choices": ["(A)"], "answer": 0},
    {"prompt": "Question: été? ", "choices": ["no", "(B)", "good weather", "yes"], "answer": 2},
    {"prompt": "Is it good today?\nAnswer:", "choices": ["yes", "no, it is not"], "answer": 1},
    {"prompt": "Question: is it", "choices": ["no", "yes; perhaps"], "answer": 0},
    {"prompt": "weather", "choices": ["(B)", "(A)", "good"], "answer": 2},
    {"prompt": "Is it?", "choices": ["perhaps", "no"], "answer": 0},
]
TERMS = ("lm_loss", "choice_loss", "unlikelihood_loss")
LORA = {"target_modules": ["k_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """Trainer collects garbage at each start: a second, with all that the tests have imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def arguments(folder, **kwargs):
    plain = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no"}
    return TFewTrainingArguments(str(folder), **{**plain, "max_steps": 1, **kwargs})


def made(folder, backbone="llama", peft_config=None, rows=ROWS, cls=TFewTrainer, **kwargs):
    """A trainer of (IA)^3 with vectors at random, or of another adapter."""
    family = BACKBONES[backbone]
    seq2seq, known = family.kind == "seq2seq", ("eval_dataset", "compute_metrics", "callbacks", "data_collator")
    given = {name: kwargs.pop(name) for name in known if name in kwargs}
    model = family.build(vocab_size=320, **({"dropout_rate": 0.0} if backbone == "t5" else {}))
    if peft_config is None:
        model = get_peft_model(model, TFewConfig(task_type="SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM"))
        randomise(model)
    return cls(
        model,
        arguments(folder, **kwargs),
        train_dataset=rows,
        processing_class=SEQ2SEQ if seq2seq else DECODER,
        peft_config=peft_config,
        **given,
    )


def unipelt():
    return UniPELTConfig(bottleneck_size=8, num_virtual_tokens=4, task_type="CAUSAL_LM")


# the loss


@pytest.mark.parametrize("average", ["token", "example"])
@pytest.mark.parametrize("backbone", ["llama", "t5"])
def test_accumulated_batches_equal_one_batch(backbone, average, tmp_path):
    """Batches of uneven numbers of tokens, choices and examples give the step of one batch, which is as by hand."""
    sgd = {"optim": "sgd", "learning_rate": 1.0, "warmup_steps": 0, "average": average}
    sgd |= {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "epsilon": 0.01, "power": 0.5}
    sgd |= {"choice_weight": 0.5, "unlikelihood_weight": 2.0}
    whole = made(tmp_path, backbone, per_device_train_batch_size=8, **sgd)
    before, batch = trained(whole.model), whole.data_collator(ROWS)
    tokens, correct = choice_token_scores(whole.model, batch, packed=False), right(batch)
    terms = {
        "lm_loss": lm_loss(tokens, correct, average),
        "choice_loss": 0.5 * choice_loss(tokens, correct, batch["example"], power=0.5),
        "unlikelihood_loss": 2 * unlikelihood_loss(tokens, correct, batch["example"], 0.01, average),
    }
    loss = sum(terms.values())
    gradients = torch.autograd.grad(loss, [p for p in whole.model.parameters() if p.requires_grad])
    whole.train()
    assert logged(whole, "loss") == [pytest.approx(loss.item(), rel=1e-5)]
    for name, term in terms.items():
        assert logged(whole, name) == [pytest.approx(term.item(), rel=1e-5)]
    for (name, value), gradient in zip(trained(whole.model).items(), gradients, strict=True):
        torch.testing.assert_close(before[name] - value, gradient, rtol=1e-4, atol=1e-6, msg=name)
    for size in (1, 3):  # eight batches, and three of which the last is smaller
        several = {"per_device_train_batch_size": size, "gradient_accumulation_steps": -(-8 // size)}
        parts = made(tmp_path, backbone, **several, **sgd)
        parts.train()
        for name in ("loss", *TERMS, "grad_norm"):
            assert logged(parts, name) == pytest.approx(logged(whole, name), rel=1e-5), name
        for name, value in trained(whole.model).items():
            torch.testing.assert_close(trained(parts.model)[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_one_choice_has_no_choice_losses(tmp_path):
    """An example with one choice adds to the language-modelling loss alone; with nothing else the others are 0."""
    single, ranked = ROWS[2:3], ROWS[:2]
    terms = {}
    for name, rows in {"single": single, "ranked": ranked, "both": [*single, *ranked]}.items():
        trainer = made(tmp_path, rows=rows)
        trainer.train()
        terms[name] = {term: logged(trainer, term)[0] for term in TERMS}
    assert terms["single"]["choice_loss"] == terms["single"]["unlikelihood_loss"] == 0
    assert terms["single"]["lm_loss"] > 0
    for name in TERMS[1:]:
        assert terms["both"][name] == pytest.approx(terms["ranked"][name], rel=1e-5, abs=1e-6)
    assert terms["both"]["lm_loss"] != pytest.approx(terms["ranked"]["lm_loss"], rel=1e-3)


def read(trainer):
    """How many tokens, padding included, each forward of the model reads."""
    sizes = []
    base = trainer.model.get_base_model()
    base.register_forward_pre_hook(lambda _, args, kw: sizes.append(kw["input_ids"].numel()), with_kwargs=True)
    return sizes


def test_losses_without_weight(tmp_path):
    """A loss with weight 0 is not there; without losses of choices the wrong ones are read in evaluation alone."""
    plain = {"choice_weight": 0.0, "unlikelihood_weight": 0.0, "eval_dataset": ROWS, "eval_strategy": "steps"}
    alone, whole = made(tmp_path, **plain), made(tmp_path, eval_dataset=ROWS, eval_strategy="steps")
    few, many = read(alone), read(whole)
    alone.train()
    whole.train()
    assert few[0] < many[0]
    assert few[1] == many[1]
    assert "choice_loss" not in alone.state.log_history[0]
    assert logged(alone, "loss") == logged(alone, "lm_loss") == pytest.approx(logged(whole, "lm_loss"), rel=1e-5)
    assert "eval_choice_loss" not in alone.state.log_history[1]
    assert logged(made_and_trained(tmp_path, lm_weight=0.0), "loss")[0] == pytest.approx(
        logged(whole, "choice_loss")[0] + logged(whole, "unlikelihood_loss")[0], rel=1e-5
    )


def made_and_trained(*args, **kwargs):
    trainer = made(*args, **kwargs)
    trainer.train()
    return trainer


@pytest.mark.parametrize("backbone", ["llama", "t5"])
def test_packed_and_checkpointed(backbone, tmp_path):
    """Prompts read once or once for each choice, with gradient checkpointing or without: the same step."""
    first = made_and_trained(tmp_path, backbone, packed=True)
    for options in ({"packed": False}, {"packed": True, "activation_checkpointing": True}):
        other = made_and_trained(tmp_path, backbone, **options)
        assert logged(other, "loss") == pytest.approx(logged(first, "loss"), rel=1e-5)
        assert logged(other, "grad_norm") == pytest.approx(logged(first, "grad_norm"), rel=1e-4)


def test_packing_that_is_not_possible(tmp_path):
    with pytest.raises(ValueError, match=r"`packed` \(=True\) is not possible: Bloom"):
        made(tmp_path, "bloom", packed=True)
    assert np.isfinite(logged(made_and_trained(tmp_path, "bloom"), "loss")).all()


# evaluation

KNOWN = [
    {"prompt": "Is it good?\nAnswer:", "choices": ["yes", "no, it is not"], "answer": 0},
    {"prompt": "weather", "choices": ["good weather " * 9, "(A)", "(B)", "perhaps it will be " * 9], "answer": 3},
    {"prompt": "Question:", "choices": ["no"], "answer": 0},
]


@pytest.mark.parametrize("normalization", ["token", "byte", "character", "none"])
@pytest.mark.parametrize("backbone", ["llama", "t5"])
def test_evaluation_ranks_choices(backbone, normalization, tmp_path):
    """Scores are those of `score_choices`, also below -100, with -inf where there is no choice; in any batches."""
    seen = []

    def note(evaluated):
        seen.append(evaluated)
        return {"right": float((evaluated.predictions.argmax(-1) == evaluated.label_ids).mean())}

    kwargs = {"normalization": normalization, "per_device_eval_batch_size": 2, "compute_metrics": note}
    trainer = made(tmp_path, backbone, eval_dataset=KNOWN, **kwargs)
    tokenizer = SEQ2SEQ if backbone == "t5" else DECODER
    prompts, choices = ([row[name] for row in KNOWN] for name in ("prompt", "choices"))
    expected = score_choices(trainer.model, tokenizer, prompts, choices, normalization)
    metrics = trainer.evaluate()
    assert seen[0].predictions.shape == (3, 4)
    for found, score in zip(seen[0].predictions, expected, strict=True):
        np.testing.assert_allclose(found[: len(score)], score, rtol=1e-4, atol=1e-4)
        assert (found[len(score) :] == -np.inf).all()
    assert seen[0].label_ids.tolist() == [0, 3, 0]
    if normalization == "none":
        assert seen[0].predictions[1].min() < -100
    best = np.mean([score.argmax() == row["answer"] for score, row in zip(expected, KNOWN, strict=True)])
    assert metrics["eval_right"] == pytest.approx(best)
    assert sum(metrics[f"eval_{name}"] for name in TERMS) == pytest.approx(metrics["eval_loss"], rel=1e-5)
    unanswered = [{name: row[name] for name in ("prompt", "choices")} for row in KNOWN]
    found = trainer.predict(unanswered)
    np.testing.assert_array_equal(found.predictions, seen[0].predictions)
    assert found.label_ids is None
    assert "test_right" not in found.metrics
    answered = trainer.predict(KNOWN)
    assert answered.metrics["test_right"] == metrics["eval_right"]
    np.testing.assert_array_equal(answered.predictions, found.predictions)


def test_batches_apart(tmp_path):
    """Scores that are not joined, and metrics that are computed batch by batch, have the same numbers."""
    parts = {"per_device_eval_batch_size": 2, "eval_dataset": KNOWN}
    joined = made(tmp_path, **parts).predict(KNOWN)
    apart = made(tmp_path, eval_do_concat_batches=False, **parts).predict(KNOWN)
    assert [len(one) for one in apart.predictions] == [2, 1]
    assert apart.metrics["test_accuracy"] == joined.metrics["test_accuracy"]
    np.testing.assert_array_equal(apart.predictions[1][:, 0], joined.predictions[2:, 0])
    counts = []

    def batchwise(evaluated, compute_result):
        counts.append((evaluated.predictions.argmax(-1) == evaluated.label_ids).sum().item())
        return {"right": sum(counts) / len(KNOWN)} if compute_result else {}

    metrics = made(tmp_path, batch_eval_metrics=True, compute_metrics=batchwise, **parts).evaluate()
    assert metrics["eval_right"] == pytest.approx(joined.metrics["test_accuracy"])


def test_rows_of_which_some_have_answers(tmp_path):
    """Metrics are of all rows, or of none."""
    unanswered = {name: KNOWN[1][name] for name in ("prompt", "choices")}
    trainer = made(tmp_path, per_device_eval_batch_size=1)
    expected = trainer.predict(KNOWN).predictions
    with pytest.raises(ValueError, match=r"`row` \(=1\) lacks `answer`\."):
        trainer.predict([KNOWN[0], unanswered])
    found = trainer.predict([unanswered, KNOWN[0]])
    np.testing.assert_array_equal(found.predictions[0], expected[1])
    assert found.label_ids is None
    assert "test_accuracy" not in found.metrics


def test_several_sets(tmp_path):
    trainer = made(tmp_path, eval_dataset={"one": ROWS, "two": KNOWN[:1]})
    metrics = trainer.evaluate()
    assert {"eval_one_accuracy", "eval_two_accuracy", "eval_two_choice_loss"} <= metrics.keys()
    assert trainer.evaluate_base(ROWS)["base_eval_accuracy"] >= 0


# training


class Lazy(torch.utils.data.Dataset):
    """Rows that are other in each epoch."""

    def __init__(self):
        self.epoch, self.told = 0, []

    def set_epoch(self, epoch):
        self.epoch = epoch
        self.told.append(epoch)

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, i):
        return {**ROWS[i], "prompt": f"{ROWS[i]['prompt']} {self.epoch}"}


def test_resumed_training_equals_uninterrupted(tmp_path):
    """Stopped and resumed in the middle of an epoch, with Adafactor and data that are drawn by the epoch."""
    kwargs = {"max_steps": 12, "save_strategy": "steps", "save_steps": 5, "per_device_train_batch_size": 2}
    kwargs |= {"logging_steps": 2, "rows": Lazy()}
    whole = made_and_trained(tmp_path / "whole", **kwargs)
    assert sorted(set(kwargs["rows"].told)) == [0, 1, 2]
    made_and_trained(tmp_path / "half", callbacks=[StopAt(5)], **kwargs)
    resumed = made(tmp_path / "half", **{**kwargs, "rows": Lazy()})
    resumed.train(resume_from_checkpoint=True)
    for name in ("loss", *TERMS, "learning_rate"):
        assert logged(resumed, name) == logged(whole, name), name
    assert len(logged(resumed, "loss")) == 6
    for name, value in trained(whole.model).items():
        assert torch.equal(trained(resumed.model)[name], value), name


@pytest.mark.parametrize(
    "peft_config",
    [
        None,
        pytest.param(LoraConfig(r=4, init_lora_weights="gaussian", **LORA), marks=pytest.mark.slow),
        pytest.param(unipelt(), marks=pytest.mark.slow),
    ],
)
def test_learns_with_any_method(peft_config, tmp_path):
    """Choices that had no chance are the answers after some steps."""
    rows = [{"prompt": f"{p}?", "choices": ["yes", "no"], "answer": i} for i, p in enumerate(("good", "weather"))]
    kwargs = {"eval_dataset": rows, "max_steps": 60, "learning_rate": 0.02, "scale_parameter": peft_config is None}
    trainer = made(tmp_path, peft_config=peft_config, rows=rows, **kwargs)
    first = trainer.evaluate()
    trainer.train()
    last = trainer.evaluate()
    assert last["eval_accuracy"] == 1
    for name in ("eval_lm_loss", "eval_choice_loss"):
        assert last[name] < first[name] - 0.1
    assert bool(logged(trainer, "gates/0.query_low_rank")) == isinstance(peft_config, UniPELTConfig)


class Other(nn.Module):
    """A stand-in for what a trainer's optimizer steps on: the same parameters, in one list."""

    def __init__(self, model):
        super().__init__()
        self.own = nn.ParameterList([nn.Parameter(p.detach().clone()) for p in trained(model).values()])


@pytest.mark.parametrize(
    ("given", "length"),  # (max_steps, num_train_epochs)
    [
        ({}, (1000, 3.0)),
        ({"num_train_epochs": 3}, (-1, 3)),
        ({"num_train_epochs": 5}, (-1, 5)),
        ({"max_steps": 40}, (40, 3.0)),
        ({"max_steps": -1}, (-1, 3.0)),
        ({"max_steps": -1, "num_train_epochs": 2}, (-1, 2)),
    ],
)
def test_steps_or_epochs(given, length, tmp_path):
    """Epochs, if given, take the place of the paper's steps; a copy of the arguments has the same length."""
    args = TFewTrainingArguments(str(tmp_path), use_cpu=True, **given)
    for made_args in (args, dataclasses.replace(args, learning_rate=1e-4)):
        assert (made_args.max_steps, made_args.num_train_epochs) == length
    (parsed,) = HfArgumentParser(TFewTrainingArguments).parse_dict({"output_dir": str(tmp_path), **given})
    assert (parsed.max_steps, parsed.num_train_epochs) == length


def test_adafactor_is_that_of_the_paper(tmp_path):
    """Rates are relative to parameters, which transformers' `optim="adafactor"` does not do, and follow the recipe."""
    args = TFewTrainingArguments(str(tmp_path), use_cpu=True)
    assert (args.max_steps, args.per_device_train_batch_size, args.max_grad_norm) == (1000, 8, 1.0)
    assert (args.weight_decay, args.lr_scheduler_type, args.label_smoothing_factor) == (0.0, "linear", 0.0)
    trainer = made(tmp_path, max_steps=1000)
    trainer.create_optimizer_and_scheduler(1000)
    group = trainer.optimizer.param_groups[0]
    stated = {name: group[name] for name in ("scale_parameter", "relative_step", "warmup_init", "weight_decay")}
    assert stated == {"scale_parameter": True, "relative_step": False, "warmup_init": False, "weight_decay": 0.0}
    rates = [trainer.lr_scheduler.lr_lambdas[0](step) * 3e-3 for step in (0, 30, 60, 530, 1000)]
    assert rates == pytest.approx([0, 1.5e-3, 3e-3, 1.5e-3, 0])
    stock = Trainer.get_optimizer_cls_and_kwargs(args)[1]
    assert (stock["scale_parameter"], trainer.get_optimizer_cls_and_kwargs(args)[1]["scale_parameter"]) == (
        False,
        True,
    )

    trainer = made(tmp_path, max_steps=3, warmup_steps=0, lr_scheduler_type="constant", rows=ROWS)
    other, batch = Other(trainer.model), trainer.data_collator(ROWS)
    optimizer = Adafactor(other.parameters(), lr=3e-3, scale_parameter=True, relative_step=False, warmup_init=False)
    names = list(trained(trainer.model))
    for _ in range(3):
        trainer.model.load_state_dict(dict(zip(names, other.own, strict=True)), strict=False)
        loss = trainer.compute_loss(trainer.model, batch)
        own = [p for p in trainer.model.parameters() if p.requires_grad]
        for parameter, gradient in zip(other.own, torch.autograd.grad(loss, own), strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step()
    for parameter, (name, start) in zip(other.own, trained(made(tmp_path).model).items(), strict=True):
        assert not torch.equal(parameter, start), name
    trainer = made_and_trained(tmp_path, max_steps=3, warmup_steps=0, lr_scheduler_type="constant", rows=ROWS)
    for parameter, (name, value) in zip(other.own, trained(trainer.model).items(), strict=True):
        torch.testing.assert_close(value, parameter.data, rtol=1e-5, atol=1e-6, msg=name)


def test_record_and_card(tmp_path):
    """The record names T-Few, its paper, the recipe's settings and the losses; the card files it as classification."""
    trainer = made(tmp_path, rows=Dataset.from_list(ROWS), eval_dataset=ROWS, eval_strategy="steps", max_steps=2)
    trainer.train()
    trainer.evaluate_base()
    trainer.save_model()
    record = TrainingRecord.load(tmp_path)
    assert (record.trainer, record.pipeline_tag, record.paper["arxiv"]) == (
        "T-Few",
        "text-classification",
        "2205.05638",
    )
    assert {(r.metric, r.method) for r in record.results} >= {("accuracy", "adapter"), ("accuracy", "base")}
    assert set(TERMS) <= record.history[0].keys()
    assert record.hyperparameters["optim"] == "adafactor"
    card = (tmp_path / "README.md").read_text("utf-8")
    assert "pipeline_tag: text-classification" in card
    assert "- accuracy" in card
    assert "RankClassifier" in card
