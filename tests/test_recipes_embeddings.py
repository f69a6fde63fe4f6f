"""Recipes of embedding models: sentence-transformers' trainer, losses and evaluators, on tiny models."""

import json
import sys

import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model
from transformers import AutoModel, TrainerCallback

from hf_peft_ext import load_adapter
from hf_peft_ext.compare.sizes import empty_model
from hf_peft_ext.hub_cards import TrainingRecord, publishable
from hf_peft_ext.recipes import Recipe, RecipeError
from hf_peft_ext.recipes.model_rows import model_rows

from .backbones import BACKBONES
from .methods import METHODS
from .recipe_runs import FAST, elsewhere, run, succeed  # noqa: F401
from .test_training import tokenizer

pytest.importorskip("sentence_transformers")

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses

from hf_peft_ext.trainers import AdapterEmbeddingTrainer

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
TEXTS = ["w1 w2 w3", "w4 w5 w6"]
UNIPELT = {"peft_type": "UNIPELT", "bottleneck_size": 4, "num_virtual_tokens": 4, "r": 2}
ROWS = [
    {"anchor": f"w{i} w{i + 1}", "positive": f"w{i} w{i + 20}", "negative": f"w{40 - i}", "score": i % 3 - 1,
     "part": "ab"[i % 4 == 0]}
    for i in range(1, 17)
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder")
    BACKBONES["bert"].build().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture
def recipe(folder, tmp_path):
    """A recipe of pairs, and its path."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    sections = {
        "model": {"model_name_or_path": folder},
        "peft": {**UNIPELT, "task_type": "FEATURE_EXTRACTION"},
        "data": {
            "data_files": str(tmp_path / "rows.jsonl"),
            "split_column": "part",
            "train_split": "a",
            "eval_split": "b",
        },
        "training": {"output_dir": str(tmp_path / "out"), "learning_rate": 0.01},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(sections))
    return tmp_path / "recipe.yaml"


def test_pairs(recipe, folder, tmp_path):
    """Trained by InfoNCE, measured by retrieval, saved with its card; loaded in both ways the embeddings are equal."""
    shown = succeed(
        recipe, *FAST, "metrics=[cosine_ndcg@10, cosine_mrr@10]", "batch_sampler=no_duplicates", "max_length=8"
    )
    assert "cosine_ndcg@10" in shown
    assert f"UNIPELT on {folder}" in shown
    out = tmp_path / "out"
    record = TrainingRecord.load(out)
    assert {"loss", "cosine_ndcg@10", "cosine_mrr@10"} <= {result.metric for result in record.results}
    assert record.gates
    assert record.versions["sentence_transformers"]
    card = (out / "README.md").read_text()
    assert "model = SentenceTransformer(base" in card
    assert "from sentence_transformers import SentenceTransformer" in card
    assert "pip install hf_peft_ext sentence-transformers" in card
    assert "pipeline_tag: sentence-similarity" in card
    assert "modules.json" in publishable(out)
    assert not (out / "model.safetensors").exists()

    base, loaded = (SentenceTransformer(path, device="cpu") for path in (folder, str(out)))
    again = SentenceTransformer(folder, device="cpu")
    load_adapter(again, out)
    assert abs(again.encode(TEXTS) - base.encode(TEXTS)).max() > 1e-4
    assert abs(again.encode(TEXTS) - loaded.encode(TEXTS)).max() == 0
    assert loaded.max_seq_length == 8


def test_scores(recipe, tmp_path):
    """Similarities are learned by the cosine, and measured by correlation."""
    data = (
        "data.score_column=score",
        "metrics=[spearman_cosine]",
        "peft={peft_type: LORA, task_type: FEATURE_EXTRACTION}",
    )
    result = json.loads(succeed(recipe, *FAST, *data, "--json").splitlines()[-1])
    assert -1 <= result["metrics"]["eval_spearman_cosine"] <= 1
    assert "PeftModel.from_pretrained(model[0].model, adapter)" in (tmp_path / "out" / "README.md").read_text()


def test_plan(recipe, tmp_path):
    shown = succeed(recipe, "use_cpu=true", "data.negative_column=negative", "--dry-run")
    assert "12 rows to train on, 4 to evaluate on" in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["data.score_column=anchor"], r"`data.score_column` \(='anchor'\) must hold numbers in \[-1, 1\]"),
        (["data.score_column=score", "data.negative_column=negative"], "must be left out beside `score_column`"),
        (["metrics=[cosine_ndcg]"], r"must be a metric of this task: cosine_ndcg@10.*did you mean `cosine_ndcg@10`"),
        (["data.score_column=score", "metrics=[cosine_ndcg@10]"], "must be a metric of this task: pearson_cosine"),
        (["data.max_length=0"], r"`max_length` \(=0\) must be a positive whole number"),
        (["data.anchor_colum=a"], "did you mean `data.anchor_column`"),
    ],
)
def test_refused(recipe, change, message):
    result = run(recipe, "use_cpu=true", *change)
    assert result.exit_code == 2
    with pytest.raises(RecipeError, match=message):
        raise RecipeError(" ".join(result.output.split()))


def test_needs_the_extra(recipe, monkeypatch):
    """Without sentence-transformers the error names the extra."""
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(RecipeError, match=r"needs sentence_transformers: pip install 'hf_peft_ext\[embeddings\]'"):
        Recipe.read(recipe)


def test_other_commands(recipe):
    """What has no use for pairs of texts refuses them."""
    read = Recipe.read(recipe, ["use_cpu=true"])
    with pytest.raises(RecipeError, match="pairs of texts have no labels"):
        model_rows(read, read.data.load(0)[0], tokenizer(), [])
    with pytest.raises(RecipeError, match="embedding models are not compared"):
        empty_model(read, [])


class Stop(TrainerCallback):
    """Ends training after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def trainer_of(folder, output, **kwargs):
    model = SentenceTransformer(folder, device="cpu")
    rows = Dataset.from_list([{name: row[name] for name in ("anchor", "positive")} for row in ROWS])
    args = SentenceTransformerTrainingArguments(
        str(output), max_steps=4, save_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
        report_to=[], disable_tqdm=True, logging_steps=1, **kwargs,
    )  # fmt: skip
    return AdapterEmbeddingTrainer(
        model, args, train_dataset=rows, eval_dataset=rows, loss=losses.MultipleNegativesRankingLoss(model),
        peft_config=METHODS["unipelt"](),
    )  # fmt: skip


def test_trainer(folder, tmp_path):
    """A resumed run equals an undisturbed one; the best checkpoint is loaded; the base model can be measured."""
    whole = trainer_of(folder, tmp_path / "whole")
    whole.train()
    cut = trainer_of(folder, tmp_path / "cut")
    cut.add_callback(Stop(2))
    cut.train()
    resumed = trainer_of(folder, tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert isinstance(resumed.peft_model, PeftModel)
    assert torch.equal(*(torch.tensor(one.model.encode(TEXTS)) for one in (resumed, whole)))
    assert whole.evaluate()["eval_loss"] != whole.evaluate_base()["base_eval_loss"]

    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    best = trainer_of(folder, tmp_path / "best", **options)
    best.train()
    again = SentenceTransformer(folder, device="cpu")
    load_adapter(again, best.state.best_model_checkpoint)
    assert torch.equal(*(torch.tensor(model.encode(TEXTS)) for model in (again, best.model)))


def test_model_with_an_adapter(folder, tmp_path):
    """An adapter that is there already is trained; a second one is refused."""
    model = SentenceTransformer(folder, device="cpu")
    model[0].model = get_peft_model(AutoModel.from_pretrained(folder), METHODS["bitfit"]())
    args = SentenceTransformerTrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    rows = Dataset.from_list([{"anchor": "w1", "positive": "w2"}])
    loss = losses.MultipleNegativesRankingLoss(model)
    assert AdapterEmbeddingTrainer(model, args, train_dataset=rows, loss=loss).peft_model is model[0].model
    with pytest.raises(ValueError, match="`peft_config` must be None where `model` has an adapter already"):
        AdapterEmbeddingTrainer(model, args, train_dataset=rows, loss=loss, peft_config=METHODS["bitfit"]())
