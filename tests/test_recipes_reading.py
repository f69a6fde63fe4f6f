"""How a recipe is read and changed, what a dry run shows, and the recipe that lies beside its adapter."""

import inspect
import json
import re

import numpy as np
import pytest
import yaml
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file
from scipy.stats import pearsonr, spearmanr

from hf_peft_ext import Placement
from hf_peft_ext.hub_cards import CardWarning
from hf_peft_ext.ranking.metrics import CLASSIFICATION, REGRESSION, exact_match
from hf_peft_ext.recipes import Recipe, RecipeError, prepare
from hf_peft_ext.recipes.recipe_schema import NOT_IN_RECIPES, section_keys
from hf_peft_ext.recipes.recipe_source import RecipeSource, split_override

from .recipe_runs import FAST, classification, elsewhere, models, run, succeed, text_classifier  # noqa: F401

# 2026-11: the data loader asks for pinned memory wherever it runs; TRL's and peft's own use of renamed arguments
pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
]


# what is read


def test_yaml_reads_as_written(tmp_path):
    """1e-4 is a number, `no` a word, and what is saved reads as the same."""
    (tmp_path / "r.yaml").write_text("training: {learning_rate: 1e-4, save_strategy: no, x: [1., -2E+3, on, true, 3]}")
    read = RecipeSource.read(tmp_path / "r.yaml").sections["training"]
    assert read == {"learning_rate": 1e-4, "save_strategy": "no", "x": [1.0, -2000.0, "on", True, 3]}
    assert split_override("a.b={c: [1e-5, off]}") == ("a.b", {"c": [1e-5, "off"]})


def test_changes(tmp_path):
    """Changes are taken in any order: whole sections, what decides which keys there are, dotted, plain, nested."""
    recipe = Recipe.read(
        "examples/recipes/unipelt.yaml",
        ["r=4", "training.seed=7", "lr_scheduler_kwargs.num_cycles=2", "peft={peft_type: LORA, task_type: SEQ_CLS}",
         "lr_scheduler_type=cosine_with_restarts", "use_cpu=true"],
    )  # fmt: skip
    assert recipe.peft.peft_type == "LORA"
    assert recipe.peft.r == 4
    assert recipe.training.seed == 7
    assert recipe.training.lr_scheduler_kwargs == {"num_cycles": 2}
    (tmp_path / "again.yaml").write_text(recipe.text())
    assert Recipe.read(tmp_path / "again.yaml").written == recipe.written


def test_bfloat16_of_language_models_on_a_cpu(tmp_path):
    """TRL's default is bfloat16, which most CPUs compute very slowly; what the recipe says counts."""
    (tmp_path / "rows.jsonl").write_text('{"text": "w1"}\n')
    recipe = {
        "model": {"model_name_or_path": "someone/model"},
        "peft": {"peft_type": "LORA", "task_type": "CAUSAL_LM"},
        "data": {"data_files": str(tmp_path / "rows.jsonl"), "text_column": "text"},
        "training": {"output_dir": str(tmp_path / "out"), "use_cpu": True},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    read = Recipe.read(tmp_path / "r.yaml")
    assert read.training.bf16 is False
    assert "bf16" not in read.written["training"]
    assert Recipe.read(tmp_path / "r.yaml", ["bf16=true"]).training.bf16 is True


def test_placements_in_a_recipe(tmp_path):
    """A COMPOSED adapter's placements are mappings in YAML; a wrong one is an error with its line."""
    recipe = {
        "model": {"model_name_or_path": "someone/model"},
        "peft": {
            "peft_type": "COMPOSED",
            "task_type": "SEQ_CLS",
            "placements": [{"sublayer": "bias", "site": "bias"}],
        },
        "data": {"path": "someone/data"},
        "training": {"output_dir": str(tmp_path / "out"), "use_cpu": True},
    }
    recipe["peft"]["placements"] = [{"sublayer": "bias", "site": "bias"}]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    assert Recipe.read(tmp_path / "r.yaml").peft.placements == [Placement("bias", "bias")]
    recipe["peft"]["placements"] = [{"sublayer": "bias", "sites": "bias"}]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError, match=r"r.yaml, line \d+: `peft.placements` .* must be list\[.*Placement\]"):
        Recipe.read(tmp_path / "r.yaml")


def test_keys_of_every_method():
    """A recipe knows the arguments of every PEFT type's config there is, but for those that peft fills in."""
    source = RecipeSource({"peft": {"task_type": "CAUSAL_LM"}}, {})
    for peft_type, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        source.sections["peft"]["peft_type"] = peft_type.value
        known = section_keys(source)["peft"].keys()
        assert known == inspect.signature(config).parameters.keys() - {*NOT_IN_RECIPES["peft"]}, config


def test_dry_run(models, tmp_path):
    """--dry-run shows what would be trained, and the recipe with its changes; it writes nothing."""
    out = tmp_path / "adapter"
    changes = [f"model={{model_name_or_path: {models['bert']}}}", f"output_dir={out}", *FAST, "peft.r=2"]
    shown = succeed("examples/recipes/unipelt.yaml", "--dry-run", *changes)
    assert not out.exists()
    recipe = Recipe.read("examples/recipes/unipelt.yaml", changes)
    model = prepare(recipe).model
    assert f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} of " in shown
    assert recipe.text() in shown
    assert "320 rows to train on, 320 to evaluate on" in shown


def test_help():
    """--help names each section and shows how a key is changed."""
    shown = run("--help").output
    for word in ("model", "quantization", "peft", "data", "training", "metrics", "key=value", "--dry-run", "torchrun"):
        assert word in shown


def test_local_copy(models, tmp_path):
    """The model is loaded from `local_path`; the adapter names `model_name_or_path`."""
    changes = [
        "model.model_name_or_path=someone/model",
        f"local_path={models['bert']}",
        *FAST,
        f"output_dir={tmp_path}/a",
    ]
    succeed("examples/recipes/mam.yaml", *changes, "max_train_samples=8", "max_eval_samples=8")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/model"
    weights = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert weights["base_model.model.mean_pooling.classifier.weight"].shape == (8, 32)


def test_metrics():
    """Each metric against values computed by hand; a single class has no correlation, and causes no warning."""
    p, y = np.array([0, 1, 1, 1]), np.array([0, 0, 1, 2])
    assert CLASSIFICATION["accuracy"](p, y) == 0.5
    assert CLASSIFICATION["f1"](p, y) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    matthews = CLASSIFICATION["matthews_correlation"]
    assert matthews(np.array([1, 0, 0, 0]), np.array([1, 1, 0, 0])) == pytest.approx(2 / 12**0.5)  # TP 1, TN 2, FN 1
    p, y = np.random.default_rng(0).integers(5, size=(2, 40))
    one_hot = [np.eye(5)[x] - np.eye(5)[x].mean(0) for x in (p, y)]
    norm = np.sqrt((one_hot[0] ** 2).sum() * (one_hot[1] ** 2).sum())
    assert matthews(p, y) == pytest.approx((one_hot[0] * one_hot[1]).sum() / norm)
    assert matthews(np.zeros(4), np.arange(4)) == matthews(np.zeros(4), np.zeros(4)) == 0
    assert exact_match(["a ", "b"], ["a", "c"]) == 0.5


def test_metrics_of_regression():
    """Against scipy; a constant has no correlation, and causes no warning."""
    p, y = np.random.default_rng(0).normal(size=(2, 30))
    assert REGRESSION["pearson"](p, y) == pytest.approx(pearsonr(p, y)[0])
    y[:9] = 0.5  # ties
    assert REGRESSION["spearmanr"](p, y) == pytest.approx(spearmanr(p, y)[0])
    assert REGRESSION["pearson"](np.ones(4), np.arange(4)) == REGRESSION["spearmanr"](np.arange(4), np.ones(4)) == 0


def by_hand(models, tmp_path):
    """A recipe with a comment, in the folder that its adapter is saved in."""
    rows = [{"text": f"w{i}", "label": i % 2} for i in range(8)]
    path = classification(models, tmp_path, rows, text_column="text", label_column="label")
    path.write_text("# Why this rate: see the notes.\n" + path.read_text().replace(f"{tmp_path}/out", str(tmp_path)))
    return path


def test_a_recipe_beside_its_adapter_keeps_its_comments(models, tmp_path):
    """Trained again, the saved recipe is unchanged; another one in the same folder is refused before training."""
    path = by_hand(models, tmp_path)
    text = path.read_text()
    result = run(path, "max_steps=1")
    assert result.exit_code == 2, result.output
    assert re.search(r"recipe.yaml, line \d+: `training.output_dir` .* holds another recipe.yaml", result.stderr)
    assert not (tmp_path / "README.md").exists()
    path.write_text(text := text.replace("use_cpu: true", "use_cpu: true\n  max_steps: 1\n  disable_tqdm: true"))
    for _ in range(2):
        succeed(path)
        assert path.read_text() == text
        assert (tmp_path / "README.md").exists()


def test_a_recipe_of_an_earlier_run_is_replaced(models, tmp_path):
    """What training wrote into its folder it may write again; what somebody has put there since, it may not."""
    path, out = by_hand(models, tmp_path), tmp_path / "out"
    changes = ["max_steps=1", "disable_tqdm=true", f"output_dir={out}"]
    for seed in (1, 2):
        succeed(path, *changes, f"training.seed={seed}")
        assert Recipe.read(out / "recipe.yaml").training.seed == seed
    succeed(out / "recipe.yaml", "training.seed=3")
    assert Recipe.read(out / "recipe.yaml").training.seed == 3
    (out / "recipe.yaml").write_text("# mine\n" + (out / "recipe.yaml").read_text())
    result = run(path, *changes)
    assert result.exit_code == 2
    assert "command line: `training.output_dir`" in result.stderr


@pytest.mark.parametrize("peft_type", ["BITFIT", "IA3"])
def test_a_card_that_cannot_be_written_is_told(models, tmp_path, peft_type):
    """The run is not lost for a README.md with a wrong licence: the command says so, and saves the rest."""
    path, out = by_hand(models, tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("---\nlicense: mine\n---\n")
    with pytest.warns(CardWarning, match=r"The adapter 'default' is saved in .*`license` \(='mine'\)"):
        succeed(path, "max_steps=1", "disable_tqdm=true", f"output_dir={out}", f"peft_type={peft_type}")
    assert PeftModel.from_pretrained(text_classifier(models["bert"], 2), out)
    assert Recipe.read(out / "recipe.yaml").written["peft"]["peft_type"] == peft_type
    (out / "README.md").write_text("---\nlicense: [\n---\n")
    assert "holds another recipe.yaml" in run(path, f"output_dir={out}").stderr
