"""Targets in place of answers: the loss against its formula and against T-Few's, what a teacher decides against a
softmax, and a plugged model that moves towards its teacher; the one call with rows that nobody has answered.
"""

import json
import math

import pytest
import torch
from peft import get_peft_model

from hf_peft_ext.pruning import pruned_copy
from hf_peft_ext.ranking.encode import collate, encode_choices
from hf_peft_ext.ranking.losses import choice_loss
from hf_peft_ext.ranking.packing import choice_token_scores
from hf_peft_ext.transfer import PlugInSettings, bridge, decide, delta_bridge, plug, plug_in
from hf_peft_ext.transfer.refine.stage_training import fit, refine
from hf_peft_ext.transfer.run.task import Ranking, task_for

from .backbones import BACKBONES
from .methods import randomise
from .test_transfer_fold import LARGE, refuses
from .test_transfer_plug_in import QUICK, classifier, labelled, lora, rankings, stop, word_tokenizer

COUNTS = [2, 3, 1, 2]  # choices of each row


def uneven(words):
    """Rows with unlike numbers of choices, one of them with a single one."""
    choices = [["yes", "no"], ["very good", "bad", "a film"], ["so"], ["no", "very bad film"]]
    return [{"prompt": words[i], "choices": choices[i], "answer": [1, 2, 0, 0][i]} for i in range(len(COUNTS))]


@pytest.fixture
def tokenizer():
    return word_tokenizer()


@pytest.fixture
def ranked(tokenizer):
    rows = uneven(["the film was", "so very", "the", "a bad film was"])
    return task_for(tokenizer, rows), rows


def distributions(counts, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(n).softmax(0).tolist() for n in counts]


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_loss_of_answers_is_t_fews(ranked, family):
    """One-hot targets give it too; a row with one choice counts as none."""
    (task, rows), model = ranked, BACKBONES[family].build()
    seq2seq = family == "t5"
    batch = collate([encode_choices(task.tokenizer, row["prompt"], row["choices"], seq2seq) for row in rows])
    correct = torch.tensor([i == row["answer"] for row in rows for i in range(len(row["choices"]))])
    expected = choice_loss(choice_token_scores(model, batch), correct, batch["example"])
    torch.testing.assert_close(task.loss(model, rows), expected, atol=1e-6, rtol=1e-6)
    certain = [{**row, "target": [float(i == row["answer"]) for i in range(n)], "answer": 0}
               for row, n in zip(rows, COUNTS, strict=True)]  # fmt: skip
    torch.testing.assert_close(task.loss(model, certain), expected, atol=1e-6, rtol=1e-6)
    assert task.loss(model, rows[2:3]) == 0


def test_loss_of_targets_is_the_cross_entropy(ranked):
    """Term by term, some rows with a target, one with its answer."""
    (task, rows), model = ranked, BACKBONES["llama"].build()
    targets = distributions(COUNTS)
    log_p = [p.tolist() for p in task.scores(model, rows)]
    terms = [-sum(q * p for q, p in zip(targets[i], log_p[i], strict=True)) for i in (0, 1)] + [-log_p[3][0]]
    given = [{"prompt": row["prompt"], "choices": row["choices"], "target": q}
             for row, q in zip(rows[:3], targets, strict=False)]  # fmt: skip
    loss = task.loss(model, [*given, {**rows[3], "target": None}])
    assert loss.requires_grad
    assert loss.item() == pytest.approx(sum(terms) / 3, rel=1e-5)


def test_loss_of_a_classifier(tokenizer):
    """Against torch's cross-entropy with probabilities, and with labels."""
    model, rows = classifier().eval(), labelled(4)
    task, targets = task_for(tokenizer, rows), distributions([2] * 4)
    logits = model(**task.inputs(model, rows)).logits
    soft = [{"text": row["text"], "target": q} for row, q in zip(rows, targets, strict=True)]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(targets))
    torch.testing.assert_close(task.loss(model, soft), expected)
    hard = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 0, 1]))
    torch.testing.assert_close(task.loss(model, rows), hard)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_decisions_are_the_teachers_probabilities(ranked, temperature):
    """Sharpened by a power; in evaluation mode, which is left as it was; the rows' own answers stay beside them."""
    (task, rows), teacher = ranked, BACKBONES["llama"].build(attention_dropout=0.5)
    log_p = task.scores(teacher, rows)
    found = decide(task, teacher.train(), rows, temperature)
    assert teacher.training
    for row, given, score in zip(found, rows, log_p, strict=True):
        powers = [math.exp(x / temperature) for x in score.tolist()]
        assert row["target"] == pytest.approx([x / sum(powers) for x in powers], rel=1e-4)
        assert {name: row[name] for name in given} == given


def divergence(task, model, rows):
    """Mean KL of a model from its targets."""
    targets = [torch.tensor(row["target"]) for row in rows]
    scores = task.scores(model, rows)
    return sum(float((q * (q.log() - p)).sum()) for q, p in zip(targets, scores, strict=True)) / len(rows)


def taught(tokenizer, family="llama"):
    """A plugged model, and rows that a small one has decided; nobody has answered them."""
    small = get_peft_model(BACKBONES[family].build(), lora())
    randomise(small)
    rows = [{"prompt": row["prompt"], "choices": row["choices"]} for row in rankings(8)]
    task = task_for(tokenizer, rows)
    return task, plug(small, BACKBONES[family].build(**LARGE[family])).eval(), decide(task, small, rows)


def test_a_plugged_model_moves_towards_its_teacher(tokenizer):
    task, plugged, rows = taught(tokenizer)
    before = divergence(task, plugged, rows)
    with delta_bridge(plugged, pruned_copy(plugged.get_base_model(), 2)) as held:
        fit(held, task, rows, steps=30, lr=3e-3, batch_size=4)
    assert divergence(task, plugged, rows) < before / 2


def test_other_ways_to_train_on_targets(tokenizer):
    """The paper's bridge moves itself, and MeZO the plugged model."""
    task, plugged, rows = taught(tokenizer)
    model = bridge(plugged, pruned_copy(plugged.get_base_model(), 2))
    before = divergence(task, model, rows)
    fit(model, task, rows, steps=20, lr=3e-3, batch_size=4)
    assert divergence(task, model, rows) < before / 2
    before = divergence(task, plugged, rows)
    refine(plugged, task, rows, steps=20, lr=1e-3, batch_size=8)
    assert divergence(task, plugged, rows) < before


def run(tokenizer, folder, unlabelled, **settings):
    small, large = BACKBONES["llama"].build(), BACKBONES["llama"].build(**LARGE["llama"])
    chosen = PlugInSettings(**{**QUICK, **settings})
    return plug_in(small, large, tokenizer, rankings(10), rankings(4), folder, lora(), rankings(4), chosen, False,
                   unlabelled)  # fmt: skip


def test_one_call_with_rows_without_answers(tokenizer, tmp_path, monkeypatch):
    """Bridge and refinement see all rows, the small model only those with answers; resumed, it is not asked again."""
    from hf_peft_ext.transfer.run import pipeline as stages

    unlabelled = [{"prompt": f"the film was {word}", "choices": ("yes", "no"), "answer": 7} for word in ("so", "a")]
    seen = {"fit": [], "refine": []}
    for name in seen:
        whole = getattr(stages, name)
        monkeypatch.setattr(stages, name, lambda model, task, rows, *rest, whole=whole, name=name: (
            seen[name].append(rows), whole(model, task, rows, *rest)))  # fmt: skip
    with monkeypatch.context() as patched:
        patched.setattr(stages, "importance", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tokenizer, tmp_path, unlabelled, refine="module", temperature=0.5)
    decided = json.loads((tmp_path / "decisions.json").read_text(encoding="utf-8"))
    assert [row["prompt"] for row in decided] == ["the film was so", "the film was a"]
    assert all(row.keys() == {"prompt", "choices", "target"} and sum(row["target"]) == pytest.approx(1)
               for row in decided)  # fmt: skip
    monkeypatch.setattr(stages, "decide", stop)
    run(tokenizer, tmp_path, unlabelled, refine="module", temperature=0.5)
    assert [len(rows) for rows in seen["fit"]] == [10, 12]
    assert seen["fit"][1][10:] == seen["refine"][0][10:] == decided
    for other in (unlabelled[::-1], None):
        again = lambda other=other: run(tokenizer, tmp_path, other, refine="module", temperature=0.5)  # noqa: E731
        refuses("holds a run with another unlabelled", ValueError, again)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"target": [0.5, 0.2, 0.3]}, r"`target` \(=\[0.5, 0.2, 0.3\]\) must be a probability for each of 2 answers"),
        ({"target": [0.5, 0.2]}, r"`target` \(=\[0.5, 0.2\]\) must be a probability for each of 2 answers, 1 in sum"),
        ({"target": [1.5, -0.5]}, r"`target` \(=\[1.5, -0.5\]\) must be a probability"),
        ({"target": [math.nan, 1.0]}, r"`target` \(=\[nan, 1.0\]\) must be a probability"),
        ({"answer": 2}, r"`answer` \(=2\) must be the index of one of 2 answers\."),
        ({"answer": -1}, r"`answer` \(=-1\) must be the index of an answer"),
        ({}, r"`rows` \(=\['choices', 'prompt'\]\) must have `answer`\."),
    ],
)
def test_rows_that_cannot_be_trained_on(tokenizer, row, message):
    rows = [{"prompt": "so", "choices": ["yes", "no"], **row}]
    refuses(message, ValueError, lambda: Ranking(tokenizer).loss(BACKBONES["llama"].build(), rows))


def test_errors(tokenizer, tmp_path):
    rows = rankings(4)
    cold = lambda: decide(task_for(tokenizer, rows), BACKBONES["llama"].build(), rows, 0)  # noqa: E731
    refuses("`temperature` .=0. must be a positive number", ValueError, cold)
    refuses("`temperature` .=-1. must be a positive", ValueError, lambda: PlugInSettings(temperature=-1))
    idle = lambda: run(tokenizer, tmp_path, rows, bridge="none")  # noqa: E731
    refuses("`unlabelled` .=4. would not be trained on: the settings have neither a bridge", ValueError, idle)
    texts = [{"text": "so"}]
    refuses("must have `prompt` and `choices`, or `text`, all", ValueError, lambda: run(tokenizer, tmp_path, texts))
    assert not list(tmp_path.iterdir())
