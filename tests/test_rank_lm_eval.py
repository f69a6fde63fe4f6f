"""`hf-peft-ext lm-eval` on a local task, against `score_choices`. Needs lm-evaluation-harness but for one test."""

import json
import sys

import pytest
import torch
from peft import get_peft_model
from typer.testing import CliRunner

from hf_peft_ext.cli import app
from hf_peft_ext.ranking.classifier import score_choices
from hf_peft_ext.ranking.encode import encode_choices

from .backbones import BACKBONES
from .methods import METHODS, randomise
from .test_rank_classification import CHOICES, PROMPTS, tokenizer

DOCS = [
    {"prompt": p.strip(), "choices": [c.strip() for c in cs], "answer": 0}
    for p, cs in zip(PROMPTS, CHOICES, strict=True)
    if len(cs) > 1
]
TASK = """
task: local_choices
dataset_path: json
dataset_kwargs: {data_files: {test: TEST}}
output_type: multiple_choice
test_split: test
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


def test_without_the_harness(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    result = CliRunner().invoke(app, ["lm-eval", "ls", "--help"])
    assert result.exit_code == 1
    assert "lm-evaluation-harness is needed: pip install lm-eval" in result.output


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the harness has its own
def test_command_agrees_with_score_choices(tmp_path, monkeypatch):
    """The log-likelihoods that the harness logs for a UniPELT adapter are ours, to 1e-4, and so are its accuracies."""
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(sys, "argv", sys.argv)
    tok, task = tokenizer("<s> $A"), METHODS["unipelt"](task_type="CAUSAL_LM")
    base = BACKBONES["llama"].build(vocab_size=len(tok))  # the harness cuts off what its tokenizer does not know
    base.save_pretrained(tmp_path / "base")
    tok.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, task)
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, DOCS)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(TASK.replace("TEST", str(tmp_path / "test.jsonl")))
    arguments = ["--model", "hf", "--model_args", f"pretrained={tmp_path}/base,peft={tmp_path}/adapter,dtype=float32"]
    arguments += ["--tasks", "local_choices", "--include_path", f"{tmp_path}/tasks", "--device", "cpu"]
    arguments += ["--log_samples", "--output_path", f"{tmp_path}/out", "--batch_size", "3"]
    result = CliRunner().invoke(app, ["lm-eval", "run", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    (file,) = (tmp_path / "out").rglob("samples_*.jsonl")
    samples = sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    prompts, choices = [doc["prompt"] for doc in DOCS], [doc["choices"] for doc in DOCS]
    sums = score_choices(model, tok, prompts, choices, "none")
    by_length = score_choices(model, tok, prompts, choices, "character")
    assert len(samples) == len(DOCS)
    for sample, ours, normed in zip(samples, sums, by_length, strict=True):
        theirs = torch.tensor([float(response[0][0]) for response in sample["resps"]])
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
        assert sample["acc"] == float(ours.argmax() == 0)
        assert sample["acc_norm"] == float(normed.argmax() == 0)


def test_boundaries_are_those_of_the_harness():
    """Prompt and choice have the tokens that the harness gives them, whatever white space is between them."""
    harness = pytest.importorskip("lm_eval.models.huggingface").HFLM
    base = BACKBONES["llama"].build(vocab_size=320)
    for template in (None, "<s> $A"):
        tok = tokenizer(template)
        theirs = harness(pretrained=base, tokenizer=tok, device="cpu")
        for prompt in ("Answer:", "Answer: ", "Answer:\n", "is it good?  \n", "(", "<s>Answer:", "été "):
            for choice in (" yes", "no", "\nyes", "A) (B)", "perhaps it will be"):
                (ours,) = encode_choices(tok, prompt, [choice], separator="").choices
                assert (encode_choices(tok, prompt, [choice], separator="").prompt, ours) == theirs._encode_pair(
                    prompt, choice
                )
