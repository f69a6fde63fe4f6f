"""Rows with prompts, choices and answers: what is refused and how, and the batches that they become; and the arguments
of T-Few. Batches are compared with `encode_choices`.
"""

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import IterableDataset

from hf_peft_ext import TFewConfig
from hf_peft_ext.ranking.encode import encode_choices
from hf_peft_ext.ranking.losses import IGNORED
from hf_peft_ext.trainers import DataCollatorForChoices, TFewTrainer, TFewTrainingArguments
from hf_peft_ext.trainers.choice_data import ChoiceRows, validated

from .backbones import BACKBONES
from .test_rank_classification import DECODER, SEQ2SEQ
from .test_tfew_trainer import ROWS, arguments, frozen, made, made_and_trained, read  # noqa: F401
from .test_training import classifier

# 2026-11: the data loader asks for pinned memory wherever it runs
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")

ROW = {"prompt": "Is it?", "choices": ["yes", "no"], "answer": 1}


# rows


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ("Is it?", TypeError, r"Row 7 \(=str\) must be a mapping with prompt, choices, answer\."),
        ({}, ValueError, r"`row` \(=7\) lacks `prompt` and `choices` and `answer`\."),
        ({**ROW, "answer": None}, ValueError, r"`row` \(=7\) lacks `answer`\."),
        ({**ROW, "prompt": ["Is it?"]}, TypeError, r"`prompt` \(=\['Is it\?'\]\) of row 7 must be a text\."),
        ({**ROW, "choices": "yes"}, TypeError, r"`choices` \(='yes'\) of row 7 must be a list of texts\."),
        ({**ROW, "choices": 2}, TypeError, r"`choices` \(=2\) of row 7 must be a list of texts\."),
        ({**ROW, "choices": []}, ValueError, r"`choices` \(=\[\]\) of row 7 must be texts, at least one, and none of"),
        ({**ROW, "choices": ["yes", " "]}, ValueError, r"`choices` \(=\['yes', ' '\]\) of row 7 must be texts"),
        ({**ROW, "choices": ["yes", 0]}, ValueError, r"`choices` \(=\['yes', 0\]\) of row 7 must be texts"),
        (
            {**ROW, "answer": 2},
            ValueError,
            r"`answer` \(=2\) of row 7 must be the index of one of its 2 choices, 0 to 1",
        ),
        ({**ROW, "answer": -1}, ValueError, r"`answer` \(=-1\) of row 7 must be the index of one of its 2 choices"),
        ({**ROW, "answer": "no"}, TypeError, r"`answer` \(='no'\) of row 7 must be the index of a choice, a whole"),
        ({**ROW, "answer": 1.0}, TypeError, r"`answer` \(=1.0\) of row 7 must be the index of a choice"),
        ({**ROW, "answer": True}, TypeError, r"`answer` \(=True\) of row 7 must be the index of a choice"),
    ],
)
def test_wrong_rows(row, kind, message, tmp_path):
    """Each error says which row, which field, what stands there and what should; before a model is touched."""
    with pytest.raises(kind, match=message):
        validated(row, 7)
    rows = [ROW] * 7 + [row]
    for data in ({"train_dataset": rows}, {"eval_dataset": rows}, {"eval_dataset": {"one": [ROW], "two": rows}}):
        with pytest.raises(kind, match=message):
            TFewTrainer(None, arguments(tmp_path), processing_class=DECODER, **data)


def test_right_rows():
    """Whole numbers of any kind are answers, and rows without one can be ranked."""
    for answer in (1, np.int64(1), torch.tensor(1)):
        assert validated({**ROW, "choices": ("yes", "no"), "answer": answer, "idx": 5}, 0) == ROW
    assert validated({**ROW, "answer": None}, 0, answered=False) == {"prompt": "Is it?", "choices": ["yes", "no"]}


class Stream(IterableDataset):
    def __iter__(self):
        yield ROW


@pytest.mark.parametrize("data", [Stream(), {"train": [ROW]}, iter([ROW]), "rows.jsonl"])
def test_data_that_are_not_map_style(data, tmp_path):
    with pytest.raises(TypeError, match=rf"The data set \(={type(data).__name__}\) must be map-style"):
        TFewTrainer(None, arguments(tmp_path), processing_class=DECODER, train_dataset=data)


class Changing(torch.utils.data.Dataset):
    """Another choice is right at each access; the last row is wrong."""

    def __init__(self):
        self.accesses = 0

    def __len__(self):
        return 4

    def __getitem__(self, i):
        self.accesses += 1
        return {**ROW, "answer": 5 if i == 3 else self.accesses % 2}


def test_rows_that_are_rendered_are_checked_as_they_are_read(tmp_path):
    """No row is read before training, and each is validated each time."""
    rows = Changing()
    assert [ChoiceRows(rows)[0]["answer"] for _ in "12"] == [1, 0]
    assert len(ChoiceRows(rows)) == 4
    trainer = made(tmp_path, rows=rows)
    assert rows.accesses == 2
    with pytest.raises(ValueError, match=r"`answer` \(=5\) of row 3 must be the index"):
        trainer.train()


@pytest.mark.parametrize("remove", [True, False])
def test_columns_that_are_not_used(remove, tmp_path):
    """Lists, data sets and data sets with a transform train alike, whatever else is in the rows."""
    rows = [{**row, "idx": i, "label": "x", "input_ids": None} for i, row in enumerate(ROWS)]
    data = Dataset.from_list(rows)
    options = {"remove_unused_columns": remove, "max_steps": 2, "per_device_train_batch_size": 4}
    rendered = data.with_transform(lambda batch: {**batch, "prompt": [f"{p}" for p in batch["prompt"]]})
    losses = []
    for each in (ROWS, rows, data, rendered):
        trainer = made_and_trained(tmp_path, rows=each, **options)
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1] == losses[2] == losses[3]


# batches


@pytest.mark.parametrize("tokenizer", [DECODER, SEQ2SEQ])
def test_batches(tokenizer):
    """Tokens are those of `encode_choices`, answers and lengths beside them."""
    seq2seq = tokenizer is SEQ2SEQ
    for normalization in ("token", "byte", "character", "none"):
        batch = DataCollatorForChoices(tokenizer, seq2seq, normalization=normalization)(ROWS)
        row = 0
        for i, example in enumerate(ROWS):
            prompt, choices = encode_choices(tokenizer, example["prompt"], example["choices"], seq2seq)
            assert batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist() == prompt
            for text, ids in zip(example["choices"], choices, strict=True):
                assert batch["choice_ids"][row][batch["choice_ids"][row] != IGNORED].tolist() == ids
                assert batch["example"][row] == i
                sizes = {"token": len(ids), "byte": len(text.encode()), "character": len(text), "none": 1}
                assert batch["lengths"][row] == sizes[normalization]
                row += 1
        assert batch["answer"].tolist() == [example["answer"] for example in ROWS]
    assert "answer" not in DataCollatorForChoices(DECODER)([{"prompt": "a", "choices": ["b"]}])


@pytest.mark.parametrize("tokenizer", [DECODER, SEQ2SEQ])
def test_long_texts_are_cut(tokenizer):
    """A prompt keeps its end, and the token that begins it; a choice keeps its beginning."""
    row = {"prompt": "Is the weather good today?", "choices": ["perhaps it will be", "no"], "answer": 0}
    whole = encode_choices(tokenizer, row["prompt"], row["choices"], tokenizer is SEQ2SEQ)
    collator = DataCollatorForChoices(tokenizer, tokenizer is SEQ2SEQ, max_prompt_length=4, max_choice_length=2)
    cut = collator.encode(row["prompt"], row["choices"])
    begun = whole.prompt[:1] if tokenizer is DECODER else []
    assert cut.prompt == begun + whole.prompt[len(begun) - 4 :]
    assert cut.choices == [choice[:2] for choice in whole.choices]
    assert collator([row])["lengths"][0] == 2
    collator = DataCollatorForChoices(tokenizer, tokenizer is SEQ2SEQ, max_prompt_length=len(whole.prompt))
    assert collator.encode(row["prompt"], row["choices"]) == whole


def test_separator():
    collator = DataCollatorForChoices(DECODER, separator="")
    expected = encode_choices(DECODER, "Is it?", ["no"], separator="")
    assert collator.encode("Is it?", ["no"]) == expected != encode_choices(DECODER, "Is it?", ["no"])


def test_lengths_reach_the_trainer(tmp_path):
    """Tokens that are cut are not read."""
    whole, cut = made(tmp_path), made(tmp_path, max_prompt_length=3)
    many, few = read(whole), read(cut)
    whole.train()
    cut.train()
    assert few[0] < many[0]


# arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lm_weight": -1}, r"`lm_weight` \(=-1\) must be a number of 0 or more\."),
        ({"power": "1"}, r"`power` \(='1'\) must be a number of 0 or more\."),
        ({"epsilon": float("nan")}, r"`epsilon` \(=nan\) must be a number of 0 or more\."),
        (
            {"lm_weight": 0, "choice_weight": 0, "unlikelihood_weight": 0},
            r"`lm_weight` \(=0\) must not be 0 if `choice_weight` and `unlikelihood_weight` are\.",
        ),
        ({"average": "batch"}, r"`average` \(='batch'\) must be one of token, example\."),
        ({"normalization": "word"}, r"`normalization` \(='word'\) must be one of token, byte, character, none\."),
        ({"max_prompt_length": 0}, r"`max_prompt_length` \(=0\) must be a positive whole number\."),
        ({"max_choice_length": 0.5}, r"`max_choice_length` \(=0.5\) must be a positive whole number\."),
        ({"label_smoothing_factor": 0.1}, r"`label_smoothing_factor` \(=0.1\) must be 0: the losses of T-Few compare"),
        (
            {"num_train_epochs": 9, "max_steps": 1000},
            r"`num_train_epochs` \(=9\) does nothing beside `max_steps` \(=1000",
        ),
        (
            {"include_for_metrics": ["inputs"]},
            r"`include_for_metrics` \(=\['inputs'\]\) must not hold 'inputs': those",
        ),
        (
            {"accelerator_config": {"dispatch_batches": True}},
            r"`dispatch_batches` \(=True\) must not be True: the cho",
        ),
    ],
)
def test_wrong_arguments(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


def test_epochs(tmp_path):
    """By epochs, as the error says."""
    trainer = made_and_trained(tmp_path, num_train_epochs=2, max_steps=-1, per_device_train_batch_size=4)
    assert trainer.state.global_step == 4


def test_wrong_settings(tmp_path):
    """What does not go with these losses is refused when the trainer is made."""
    given = {"train_dataset": ROWS, "processing_class": DECODER}
    model, args = BACKBONES["llama"].build(vocab_size=320), arguments(tmp_path)
    with pytest.raises(TypeError, match=r"`args` \(=Namespace\) must be TFewTrainingArguments\."):
        TFewTrainer(model, __import__("argparse").Namespace(), **given)
    with pytest.raises(ValueError, match=r"`processing_class` \(=None\) must be the tokenizer of the model\."):
        TFewTrainer(model, args, train_dataset=ROWS)
    with pytest.raises(ValueError, match=r"`compute_loss_func` \(=.*\) must be None: the losses are those of T-Few\."):
        TFewTrainer(model, args, compute_loss_func=lambda *_: 0, **given)
    rule = r"`model` \(='BertForSequenceClassification'\) must be a causal or sequence-to-sequence language model\."
    with pytest.raises(ValueError, match=rule):
        TFewTrainer(classifier(), args, peft_config=TFewConfig(task_type="SEQ_CLS"), **given)
    args = TFewTrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"`n_gpu` \(=2\) GPUs in one process are not supported; start a process"):
        TFewTrainer(model, args, peft_config=TFewConfig(task_type="CAUSAL_LM"), **given)
