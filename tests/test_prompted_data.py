"""Data that draws templates, evaluation by template and few-shot prompts, against plain loops and written texts."""

import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch.utils.data import DataLoader

from hf_peft_ext import PromptedDataset, PromptTemplate, RankClassifier, evaluate_templates, score_choices
from hf_peft_ext.prompts import chat, context_length, label_list_template, with_demonstrations
from hf_peft_ext.ranking.encode import encode_choices
from hf_peft_ext.ranking.metrics import f1

from .backbones import BACKBONES
from .test_rank_classification import SPECIAL, build, tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ROWS = [{"text": f"It is good {i}", "label": i % 2} for i in range(20)]
TEMPLATES = [
    PromptTemplate("plain", "{{ text }}:", ["no", "yes"]),
    PromptTemplate("question", "Is it? {{ text }}\nAnswer:", ["it is not", "it is"]),
    PromptTemplate("letter", "{{ text }} (A) or (B)?\n", ["(A)", "(B)"]),
]
SHOWN = [template.render(row) for template, row in zip(TEMPLATES * 2, ROWS, strict=False)]


def chat_tokenizer():
    """One whose text begins and ends its turns with special tokens, as SmolLM2's and Qwen's."""
    found = tokenizer("<s> $A")
    found.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    found.chat_template = CHATML
    return found


def prompts(dataset, **kwargs):
    return [row["prompt"] for row in DataLoader(dataset, batch_size=None, **kwargs)]


def drawn(dataset):
    return [dataset.template(i).name for i in range(len(dataset))]


def test_rows_are_rendered_at_access():
    """Each as its template renders it."""
    dataset = PromptedDataset(ROWS, TEMPLATES)
    assert len(dataset) == len(ROWS)
    assert [dataset[i] for i in range(20)] == [dataset.template(i).render(row) for i, row in enumerate(ROWS)]
    assert dataset[-1] == dataset[19]
    columns = PromptedDataset(Dataset.from_list(ROWS), TEMPLATES)
    assert [columns[i] for i in range(20)] == [dataset[i] for i in range(20)]
    assert pickle.loads(pickle.dumps(dataset))[3] == dataset[3]
    with pytest.raises(IndexError, match=r"`index` \(=20\) must lie within the 20 rows."):
        dataset[20]


def test_draws_depend_on_seed_epoch_and_row_alone():
    """Fresh in each epoch, the same again in a second data set, in any order, and after any number of reads."""
    dataset, again = PromptedDataset(ROWS, TEMPLATES), PromptedDataset(ROWS, TEMPLATES)
    first = drawn(dataset)
    dataset.set_epoch(1)
    second = drawn(dataset)
    again.set_epoch(1)
    assert second != first
    assert [again.template(i).name for i in reversed(range(20))] == second[::-1]
    again.set_epoch(0)
    assert drawn(again) == first
    assert drawn(PromptedDataset(ROWS, TEMPLATES, seed=1)) != first


def test_draws_are_even():
    """Over 600 epochs each row meets each of 3 templates about 200 times; five standard deviations are 58."""
    dataset, counts = PromptedDataset(ROWS[:4], TEMPLATES), [Counter() for _ in range(4)]
    for epoch in range(600):
        dataset.set_epoch(epoch)
        for count, name in zip(counts, drawn(dataset), strict=True):
            count[name] += 1
    for count in counts:
        assert all(142 < count[template.name] < 258 for template in TEMPLATES)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "persistent"), [(1, False), (2, False), (2, True)])
def test_workers_draw_the_same(workers, persistent):
    """In processes that are started for each epoch, and in those that outlive it."""
    dataset = PromptedDataset(ROWS, TEMPLATES)
    alone = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        alone.append(prompts(dataset))
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=persistent)
    for epoch in range(3):
        dataset.set_epoch(epoch)
        assert [row["prompt"] for row in loader] == alone[epoch]


def test_accelerate_tells_the_epoch():
    """Trainer's data loader calls `set_epoch` of the data set."""
    dataset = PromptedDataset(ROWS, TEMPLATES)
    loader = Accelerator(cpu=True).prepare(DataLoader(dataset, batch_size=4, collate_fn=list))
    loader.set_epoch(2)
    assert dataset.epoch == 2


def test_answers_alone():
    """For losses that do not compare choices."""
    dataset = PromptedDataset(ROWS, TEMPLATES[:1], answer_only=True)
    assert dataset[3] == {"prompt": "It is good 3:", "choices": ["yes"], "answer": 0}


@pytest.mark.parametrize(
    ("templates", "rule"), [([], "must hold at least one template"), (TEMPLATES[:1] * 2, "must have different names")]
)
def test_errors_of_templates(templates, rule):
    with pytest.raises(ValueError, match=f"`templates` .* {rule}"):
        PromptedDataset(ROWS, templates)
    with pytest.raises(ValueError, match=f"`templates` .* {rule}"):
        evaluate_templates(None, ROWS, templates)


@pytest.mark.parametrize("backbone", ["llama", "t5"])
@pytest.mark.parametrize(("k", "chatted"), [(0, False), (0, True), (2, False), (2, True)])
def test_evaluation_is_a_loop_over_templates(backbone, k, chatted):
    """Accuracy, median and quartiles of the same prompts, rendered and scored one at a time."""
    model, _ = build(backbone)
    tok = chat_tokenizer()
    found = evaluate_templates(RankClassifier(model, tok), ROWS[:6], TEMPLATES, ROWS[6:], k, seed=3, chat=chatted)
    expected = {}
    for template in TEMPLATES:
        right = 0
        for i, row in enumerate(ROWS[:6]):
            example = template.render(row)
            shown = [template.render(other) for other in ROWS[6:]]
            single = [example] * (i + 1)  # the draw of the last one is that of row i
            if k:
                example = with_demonstrations(single, shown, k, seed=3, tokenizer=tok, chat=chatted)[i]
            elif chatted:
                example["prompt"] = chat(tok, example["prompt"])
            scores = score_choices(model, tok, [example["prompt"]], example["choices"])[0]
            assert found.predictions[template.name][i] == scores.argmax()
            right += int(scores.argmax() == row["label"])
        expected[template.name] = right / 6
    assert found.scores == pytest.approx(expected)
    assert found.metric == "accuracy"
    assert found.answers["plain"] == [row["label"] for row in ROWS[:6]]
    assert found.median == sorted(expected.values())[1]
    low, middle, high = sorted(expected.values())
    assert found.quartiles == pytest.approx(((low + middle) / 2, (middle + high) / 2))
    assert found.interquartile_range == pytest.approx((high - low) / 2)
    assert str(found).startswith(f"accuracy {found.median:.3f} (")


def test_other_metrics():
    """The metric is the templates'."""
    model, tok = build("llama")
    ours = [PromptTemplate("a", "{{ text }}", ["no", "yes"], metric="f1")]
    found = evaluate_templates(RankClassifier(model, tok), ROWS[:6], ours)
    assert found.scores["a"] == f1(np.array(found.predictions["a"]), np.array(found.answers["a"]))
    with pytest.raises(
        ValueError, match=r"`templates` \(=\['accuracy', 'f1'\]\) must be evaluated by the same metric."
    ):
        evaluate_templates(RankClassifier(model, tok), ROWS, [*ours, *TEMPLATES])
    with pytest.raises(ValueError, match=r"`rows` \(=0\) must hold at least one row."):
        evaluate_templates(RankClassifier(model, tok), [], TEMPLATES)


def test_few_shot_prompts():
    """The text to the letter: prompt and right choice meet as where choices are scored."""
    shown = [
        {"prompt": "1 + 1 =", "choices": ["2", "3"], "answer": 0},
        {"prompt": "1 + 1 =", "choices": ["2", "3"], "answer": 0},
        {"prompt": "2 + 2 =\n", "choices": ["3", "4"], "answer": 1},
        {"prompt": "", "choices": ["5"], "answer": 0},
    ]
    example = {"prompt": "1 + 1 =", "choices": ["1", "2"], "answer": 1, "extra": "kept"}
    (found,) = with_demonstrations([example], shown, k=2, separator=" ; ")
    assert found in [
        {**example, "prompt": "2 + 2 =\n4 ; 5 ; 1 + 1 ="},
        {**example, "prompt": "5 ; 2 + 2 =\n4 ; 1 + 1 ="},
    ]
    assert with_demonstrations([example], shown, k=0) == [example]
    assert example["prompt"] == "1 + 1 ="
    other = {**example, "prompt": "3 + 3 ="}
    assert with_demonstrations([other], shown[:1], k=1)[0]["prompt"] == "1 + 1 = 2\n\n3 + 3 ="


def test_examples_with_one_prompt():
    """Where choices alone tell the examples apart, as in ComVE, all but the example itself are shown."""
    examples = [{"prompt": "True:", "choices": [f"{i}", f"not {i}"], "answer": 0} for i in range(3)]
    found = with_demonstrations(examples, examples, k=3)
    shown = [sorted(one["prompt"].split("\n\n")) for one in found]
    assert shown == [sorted(["True:", *(f"True: {j}" for j in range(3) if j != i)]) for i in range(3)]


def test_few_shot_scores_are_those_of_the_joined_text():
    """score_choices of the long prompt, equal to the log-probability of the choice behind the text."""
    model, tok = build("llama")
    (example,) = with_demonstrations(SHOWN[:1], SHOWN[1:], k=3)
    joined = tok(example["prompt"])["input_ids"]
    found = score_choices(model, tok, [example["prompt"]], [example["choices"]], "none")[0]
    for score, choice in zip(found, example["choices"], strict=True):
        ids = tok(f"{example['prompt']} {choice}")["input_ids"]
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = sum(log_p[t - 1, ids[t]].item() for t in range(len(joined), len(ids)))
        assert score.item() == pytest.approx(expected, rel=1e-5)


def test_draws_of_demonstrations():
    """By seed and place; each at most once; shared if so wished."""
    examples = [template.render(ROWS[10 + i]) for i in range(6) for template in TEMPLATES[:1]]
    shown = [TEMPLATES[0].render(row) for row in ROWS[:10]]
    found = with_demonstrations(examples, shown, k=4)
    parts = [example["prompt"].split("\n\n") for example in found]
    assert all(len(set(part)) == len(part) == 5 for part in parts)
    assert len({tuple(part[:4]) for part in parts}) == 6
    assert with_demonstrations(examples[:3], shown, k=4) == found[:3]
    assert with_demonstrations(examples, shown, k=4, seed=1) != found
    together = with_demonstrations(examples, shown, k=4, shared=True)
    assert len({tuple(example["prompt"].split("\n\n")[:4]) for example in together}) == 1


@pytest.mark.parametrize("chatted", [False, True])
def test_demonstrations_are_cut_as_wholes(chatted):
    """The first ones go, until the rest fits; never a part of one, nor the prompt; and a warning says so."""
    tok = chat_tokenizer()
    whole = with_demonstrations(SHOWN[:2], SHOWN[2:], k=4, tokenizer=tok, chat=chatted)

    def tokens(example):
        encoded = encode_choices(tok, example["prompt"], example["choices"])
        return len(encoded.prompt) + max(map(len, encoded.choices))

    lengths = [tokens(example) for example in whole]
    assert whole == with_demonstrations(SHOWN[:2], SHOWN[2:], 4, tokenizer=tok, max_tokens=500, chat=chatted)
    limit = max(lengths) - 1
    with pytest.warns(UserWarning, match=f"k=4 demonstrations in . of 2 prompts.*max_tokens={limit}"):
        cut = with_demonstrations(SHOWN[:2], SHOWN[2:], 4, tokenizer=tok, max_tokens=limit, chat=chatted)
    assert all(tokens(example) <= limit for example in cut)
    for before, after in zip(whole, cut, strict=True):
        head, tail = ("<|im_start|>user\n", "<|im_start|>") if chatted else ("", "\n\n")
        rest = after["prompt"].removeprefix(head)
        assert before["prompt"].endswith(rest)
        assert before["prompt"] == after["prompt"] or before["prompt"].removesuffix(rest).endswith(head or tail)
    with pytest.warns(UserWarning, match="Fewer than k=4 demonstrations in 2 of 2 prompts, down to 0"):
        bare = with_demonstrations(SHOWN[:2], SHOWN[2:], 4, tokenizer=tok, max_tokens=1, chat=chatted)
    assert bare == with_demonstrations(SHOWN[:2], SHOWN[2:], 0, tokenizer=tok, chat=chatted)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"k": 5}, r"`k` \(=5\) must be a whole number from 0 to 4, the number of demonstrations."),
        ({"k": -1}, r"`k` \(=-1\) must be a whole number"),
        ({"k": 1, "chat": True}, r"`tokenizer` \(=None\) is needed for `chat` and `max_tokens`."),
        ({"k": 1, "max_tokens": 9}, r"`tokenizer` \(=None\) is needed for `chat` and `max_tokens`."),
    ],
)
def test_errors_of_demonstrations(kwargs, message):
    with pytest.raises(ValueError, match=message):
        with_demonstrations(SHOWN[:1], SHOWN[1:5], **kwargs)


@pytest.mark.parametrize(("backbone", "length"), [("llama", 2048), ("gpt2", 64), ("bloom", None), ("t5", None)])
def test_context_length(backbone, length):
    """What the config says of positions."""
    assert context_length(BACKBONES[backbone].build()) == length


def test_chats():
    """Turns by the tokenizer's template; nothing doubled; choices that begin right behind the head of the turn."""
    tok = chat_tokenizer()
    head = "<|im_start|>user\nIs it good?<|im_end|>\n<|im_start|>assistant\n"
    assert chat(tok, " Is it good?\n") == head
    assert chat(tok, "Is it good?", system="Be brief.") == f"<|im_start|>system\nBe brief.<|im_end|>\n{head}"
    shown = chat(tok, "Is it good?", SHOWN[:1])
    assert shown == f"<|im_start|>user\nIt is good 0:<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n{head}"
    dataset = PromptedDataset(ROWS, TEMPLATES, chat=tok)
    for i in range(6):
        assert dataset[i]["prompt"] == chat(tok, dataset.template(i).render(ROWS[i])["prompt"])
    with pytest.raises(ValueError, match="has no chat template; use the prompts without `chat`"):
        chat(tokenizer("<s> $A"), "a")


@pytest.mark.parametrize("template", [CHATML, "{{ bos_token }}" + CHATML], ids=["plain", "with bos"])
def test_choices_behind_a_chat(template):
    """One token to begin the text; the prompt up to its last line break; the choice as if it stood alone."""
    tok = chat_tokenizer()
    tok.chat_template = template
    text = chat(tok, "Is it good?")
    example = encode_choices(tok, text, ["yes", "it is not", "\nyes"])
    assert example.prompt.count(SPECIAL.index("<s>")) == 1
    assert tok.decode(example.prompt).removeprefix("<s>") == text.removeprefix("<s>")
    assert [tok.decode(choice) for choice in example.choices] == ["yes", "it is not", "\nyes"]
    assert example.choices[0] == tok("yes", add_special_tokens=False)["input_ids"]
    plain = encode_choices(tok, "Is it good?\nAnswer:\n", ["yes"])  # as lm-evaluation-harness
    assert tok.decode(plain.choices[0]) == "\nyes"


def test_labels_in_the_instruction():
    """As in RAFT; braces stay what they are."""
    labels = ["lost_card", "{{ change }}", "a {% b"]
    template = label_list_template("raft", "What {is} it about?", labels, {"text": "Message", "from_whom": "From"})
    assert template.render({"text": "I lost it. ", "from_whom": "Ann", "label": "{{ change }}"}) == {
        "prompt": "What {is} it about?\nPossible labels:\n- lost_card\n- {{ change }}\n- a {% b\n\n"
        "Message: I lost it.\nFrom: Ann\nLabel:",
        "choices": labels,
        "answer": 1,
    }
    named = label_list_template("raft", "Which?", labels, ["text", "from_whom"]).render(
        {"text": "a", "from_whom": "b", "label": 2}
    )
    assert named["prompt"].endswith("\n\nText: a\nFrom whom: b\nLabel:")
    many = label_list_template("many", "Which?", [f"label_{i:02}" for i in range(77)])
    assert len(many.render({"text": "a", "label": 76})["choices"]) == 77


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"labels": "ab"}, "`labels` .* must be a list of at least two texts."),
        ({"labels": ["a"]}, "`labels` .* must be a list of at least two texts."),
        ({"labels": ["a", "a"]}, "`labels` .* must not repeat a label."),
        (
            {"labels": ["a", "b"], "fields": ["Paper title"]},
            r"`fields` \(='Paper title'\) must be a name that Jinja can",
        ),
        ({"labels": ["a", "b"], "fields": []}, "`fields` .* must be a list of at least one field."),
    ],
)
def test_errors_of_label_lists(kwargs, message):
    with pytest.raises(ValueError, match=message):
        label_list_template("raft", "Which?", **kwargs)
