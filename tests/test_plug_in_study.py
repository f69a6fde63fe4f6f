"""The plug-in study, end to end on tiny pairs and made-up data: every condition has its row, it resumes and repeats,
and its table and its classification heads are as by hand.
"""

import csv
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

STUDIES = Path(__file__).parents[1] / "examples" / "studies"
WORDS = ["good", "bad", "film", "plot", "the", "a"]
QUICK = "--tasks sst2 --seeds 0 --k 12 --dev_rows 6 --test_rows 8 --steps 2 --bridge_steps 2 --mezo_steps 2".split()


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(STUDIES)
    for name in ("runs", "plug_in", "plug_in_conditions", "plug_in_figures", "plug_in_models", "plug_in_table"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import plug_in

    return plug_in


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    chance = random.Random(0)
    for split in ("train", "dev"):
        texts = [" ".join(chance.choices(WORDS, k=5)) for _ in range(24)]
        rows = [json.dumps({"text": text, "label": int("good" in text)}) for text in texts]
        (folder / f"sst2.{split}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    for name in ("wikitext2.valid.txt", "tinyshakespeare.txt"):
        (folder / name).write_text(" ".join(chance.choices(WORDS, k=600)), encoding="utf-8")
    return folder


@pytest.fixture
def encoder(tmp_path):
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]), encoding="utf-8")
    torch.manual_seed(0)
    BertTokenizerFast(str(vocabulary)).save_pretrained(tmp_path / "bert")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=11, **sizes)).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def decoder(tmp_path):
    words = ["<pad>", "<s>", "</s>", *WORDS, ".", "All", "in", "all", ",", "was", "great", "terrible"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **tokens).save_pretrained(tmp_path / "llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=len(words), intermediate_size=32, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def start(study, tmp_path, data, model, *options):
    arguments = [*QUICK, "--model", str(model), "--data", str(data), "--output", str(tmp_path / "output"), *options]
    parser = study.HfArgumentParser((study.Study, study.Protocol))
    study.main(*parser.parse_args_into_dataclasses(arguments))
    with (tmp_path / "output" / "runs.csv").open(encoding="utf-8") as file:
        return [{name: x for name, x in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def test_every_condition_resumes_and_repeats(study, tmp_path, data, encoder):
    found = start(study, tmp_path, data, encoder, "--r", "4", "--ladder", "off", "on")
    assert [row["condition"] for row in found if "ladder" not in row["bridge"]] == list(study.CONDITIONS)
    assert [row["condition"] for row in found if "ladder" in row["bridge"]] == ["paper", "bridge"]
    runs, table = (tmp_path / "output" / name for name in ("runs.csv", "table.md"))
    lines = runs.read_text(encoding="utf-8").splitlines(keepends=True)
    runs.write_text("".join(lines[:-4]), encoding="utf-8")  # as if it had been interrupted
    table.unlink()
    assert start(study, tmp_path, data, encoder, "--r", "4", "--ladder", "off", "on") == found
    assert "| full |" in table.read_text(encoding="utf-8")
    assert (tmp_path / "output" / "figure.png").stat().st_size > 0


@pytest.mark.slow
def test_language_models(study, tmp_path, data, decoder, monkeypatch):
    """With healing, which is done once; every module, W_plug by least squares."""
    options = ["--pair", "smollm2", "--heal_steps", "2", "--init", "least_squares", "--r", "4", "--ladder", "on"]
    conditions = ["--conditions", "untouched", "small", "paper", "bridge", "delta", "--modules", *study.MODULES]
    found = start(study, tmp_path, data, decoder, *options, *conditions)
    assert len(found) == 1 + 4 * 3
    for name in ("plug_in_conditions", "plug_in_models"):
        monkeypatch.setattr(sys.modules[name], "fit", None)
    (tmp_path / "output" / "runs.csv").unlink()
    assert start(study, tmp_path, data, decoder, *options, *conditions) == found


@pytest.mark.parametrize("answers", [[0, 1] * 6, [0, 2, 3] * 4])
def test_heads_are_logistic_regressions(study, answers):
    """The same probabilities; an answer that no row has is the last choice."""
    torch.manual_seed(0)
    x = torch.randn(12, 5)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.classifier = torch.nn.Linear(5, max(answers) + 1)

    class Task:
        def scores(self, model, rows):
            return model.classifier(x)

        def answers(self, rows):
            return answers

    model = Model()
    sys.modules["plug_in_models"].fit_head(model, Task(), list(range(12)))
    wanted = LogisticRegression(C=0.01, max_iter=1000).fit(((x - x.mean(0)) / x.std(0)).numpy(), answers)
    logits = model.classifier(x).detach()
    seen = sorted(set(answers))
    wanted_p = torch.from_numpy(wanted.predict_proba(((x - x.mean(0)) / x.std(0)).numpy())).float()
    torch.testing.assert_close(logits[:, seen].softmax(-1), wanted_p, atol=1e-4, rtol=1e-3)
    assert set(logits.argmax(-1).tolist()) <= set(seen)


def test_figures(study, tmp_path):
    """At most a dozen rows each; gains are over the untouched model of the same seed; a choice that a condition does
    not have is no variant of it, and without variants there is no second figure.
    """
    figures = sys.modules["plug_in_figures"]
    assert max(len(figures.WAYS), len(figures.CHANGES)) <= 12
    assert {key[0] for key in figures.WAYS.values()} < set(study.CONDITIONS)
    usual = {"module": "lora", "init": "slice", "bridge": figures.R_16}
    runs = [
        ("untouched", 0.5, "", {}),
        ("delta", 0.6, "0.55", usual),
        ("delta", 0.8, "", usual | {"bridge": figures.R_4}),
    ]
    runs += [("delta", 0.4, "", usual | {"init": "orthogonal"}), ("fresh", 0.7, "", usual | {"init": ""})]
    blank = {"task": "sst2", "seed": "0", "module": "", "init": "", "bridge": ""}
    rows = [blank | {"condition": name, "accuracy": str(x), "safe": safe} | more for name, x, safe, more in runs]
    found = figures.gains(rows)
    assert found[("delta", "lora", "slice", figures.R_16), "sst2"] == [pytest.approx(10)]
    assert figures.gains(rows, "safe") == {(("delta", "lora", "slice", figures.R_16), "sst2"): [pytest.approx(5)]}
    assert figures.changed(found, "delta", "W_plug orthogonal", "sst2") == [pytest.approx(-10)]
    assert figures.changed(found, "fresh", "W_plug orthogonal", "sst2") == []
    figures.draw(rows, tmp_path / "figure.png")
    assert not figures.draw_variants(rows[:2], tmp_path / "variants.png")
    assert figures.draw_variants(rows, tmp_path / "variants.png")
    assert (tmp_path / "figure.png").exists()
    assert (tmp_path / "variants.png").exists()


def test_table(study):
    """Gains are over the untouched model of the same task and seed."""
    blank = {"auc": "0.5", "margin": "0", "seconds": "2", "module": "", "init": "", "bridge": "", "scale": ""}
    rows = [
        blank | {"task": "sst2", "seed": str(seed), "condition": condition, "accuracy": str(accuracy), "safe": safe}
        for condition, accuracies, safe in (("delta", (0.7, 0.8), "0.6"), ("untouched", (0.6, 0.5), ""))
        for seed, accuracy in enumerate(accuracies)
    ]
    first, second = study.table(rows).splitlines()[2:]
    assert first == "| untouched | 55.0 ± 7.1 / 0.500 / +0.00 |  | 2 |"
    assert second == "| delta | 75.0 ± 7.1 / 0.500 / +0.00 | +20.0 ± 10.0 / +5.0 ± 5.0 | 2 |"
