"""Recipes through the real command, on tiny models: the saved adapter against the numbers that were reported."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from hf_peft_ext import MeanPoolingForSequenceClassification
from hf_peft_ext.recipes import Recipe, prepare
from hf_peft_ext.recipes.recipe_source import RecipeError, RecipeSource

from .recipe_runs import FAST, RECIPES, chats, classification, elsewhere, models, succeed  # noqa: F401
from .test_training import tokenizer

# 2026-11: the data loader asks for pinned memory wherever it runs; TRL's and peft's own use of renamed arguments
pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
]


# the recipes of examples/


@pytest.mark.parametrize("name", ["unipelt", pytest.param("mam", marks=pytest.mark.slow)])
def test_classification(name, models, tmp_path):
    """The saved adapter, loaded by peft alone, has the accuracy that the command reports and records."""
    out = tmp_path / "adapter"
    shown = succeed(
        f"examples/recipes/{name}.yaml", f"model.model_name_or_path={models['bert']}", "model.local_path=null",
        f"output_dir={out}", "max_train_samples=64", "max_eval_samples=48", "learning_rate=1e-2", *FAST, "max_steps=8",
    )  # fmt: skip
    record = json.loads((out / "training_record.json").read_text())
    measured = {result["metric"]: result["value"] for result in record["results"]}
    assert f"{measured['accuracy']:.4g}" in re.search(r"^accuracy +(\S+)", shown, re.MULTILINE)[1]
    assert record["datasets"][0]["name"] == "support_messages"
    assert {data["split"] for data in record["datasets"]} == {"train", "test"}
    assert [data["config"] for data in record["datasets"]] == [None, None]
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == models["bert"]

    base = MeanPoolingForSequenceClassification.from_pretrained(models["bert"], num_labels=8)
    model = PeftModel.from_pretrained(base, out).eval()
    recipe = Recipe.read(out / "recipe.yaml")
    _, test, labels = recipe.data.load(recipe.training.seed)
    batch = tokenizer()(test["text"][:], padding=True, return_tensors="pt", truncation=True, max_length=128)
    with torch.no_grad():
        predicted = model(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits.argmax(-1)
    right = [labels[i] == intent for i, intent in zip(predicted, test["intent"][:], strict=True)]
    assert np.mean(right) == pytest.approx(measured["accuracy"], abs=1e-6)
    assert sorted({*labels}) == labels
    assert len(labels) == 8


@pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor.s. have invalid shape")
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
def test_adalora(models, tmp_path):
    """A recipe's AdaLoRA is pruned during training, by a schedule in percent of the steps; peft alone loads it."""
    rows = [{"text": f"w{3 + i % 9} w{5 + i % 7}", "label": "ab"[i % 2]} for i in range(40)]
    path = classification(models, tmp_path, rows, eval_split="train")
    sizes = "init_r: 6, target_r: 2, total_step: 100, tinit: 10, tfinal: 30"
    shown = succeed(path, f"peft={{peft_type: ADALORA, task_type: SEQ_CLS, {sizes}}}", *FAST, "max_steps=10", "--json")
    result = json.loads(shown)
    assert result["adapter"] == str(tmp_path / "out")
    assert result["metrics"]["eval_loss"] > 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["total_step"], config["tinit"], config["tfinal"]) == (10, 1, 3)
    assert sum(map(sum, config["rank_pattern"].values())) == 2 * len(config["rank_pattern"])
    base = AutoModelForSequenceClassification.from_pretrained(models["bert"], num_labels=2)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert sum(len(t) for name, t in tensors.items() if "lora_A" in name) == 2 * len(config["rank_pattern"])
    PeftModel.from_pretrained(base, tmp_path / "out")


def test_regression(models, tmp_path):
    """Labels that are numbers: one output, the squared error as loss, correlations as metrics."""
    rows = [{"text": f"w{3 + i % 9} w{5 + i % 7}", "label": i % 9 / 2} for i in range(40)]
    path = classification(models, tmp_path, rows, eval_split="train", problem_type="regression")
    out = tmp_path / "out"
    succeed(path, "metrics=[pearson, spearmanr]", "learning_rate=1e-2", *FAST, "max_steps=8")
    record = json.loads((out / "training_record.json").read_text())
    measured = {result["metric"]: result["value"] for result in record["results"]}
    base = AutoModelForSequenceClassification.from_pretrained(models["bert"], num_labels=1)
    model = PeftModel.from_pretrained(base, out).eval()
    batch = tokenizer()([row["text"] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        predicted = model(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits[:, 0]
    y = torch.tensor([row["label"] for row in rows])
    assert measured["loss"] == pytest.approx((predicted - y).square().mean().item(), rel=1e-4)
    assert measured["pearson"] == pytest.approx(np.corrcoef(predicted, y)[0, 1], abs=1e-4)
    with pytest.raises(
        RecipeError, match=r"`metrics` \(='accuracy'\) must be a metric of this task: pearson, spearmanr"
    ):
        Recipe.read(path, ["metrics=[accuracy]"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "peft", [None, "peft={peft_type: UNIPELT, task_type: CAUSAL_LM, r: 4}"], ids=["lora", "unipelt"]
)
def test_qlora(peft, models, chats, tmp_path):
    """qlora.yaml on a tiny 4-bit Llama: 4-bit weights under the adapter, which trains and loads again."""
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "adapter"
    changes = [
        *(f"model={{model_name_or_path: {models['llama']}}}", chats, f"training.output_dir={out}", *FAST),
        *("bf16=false", "bnb_4bit_compute_dtype=float32", "max_length=32", *([peft] if peft else [])),
    ]
    shown = succeed("examples/recipes/qlora.yaml", *changes)
    assert re.search(r"^loss +\d", shown, re.MULTILINE)
    record = json.loads((out / "training_record.json").read_text())
    assert "4-bit" in record["quantization"]
    losses = [entry["loss"] for entry in record["history"] if "loss" in entry]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models["llama"]), out)
    assert model.peft_config["default"].peft_type == ("UNIPELT" if peft else "LORA")
    saved = load_file(out / "adapter_model.safetensors")
    parameters = {name.replace(".default", ""): p for name, p in model.named_parameters()}
    assert saved.keys() <= parameters.keys()
    assert all(torch.equal(parameters[name], value.to(parameters[name].dtype)) for name, value in saved.items())


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipes_hold(file):
    """Each recipe of examples/ passes all checks (on a CPU); what it says and what it is are the same."""
    changes = ["use_cpu=true", *(["bf16=false"] if file.stem == "qlora" else [])]
    recipe = Recipe.read(file, changes)
    written = RecipeSource.read(file).sections
    built = {"model": recipe.model, "peft": recipe.peft, "data": recipe.data, "training": recipe.training}
    for section, made in built.items():
        changed = {"training": {"bf16"}, "peft": {"peft_type"} if file.stem == "tfew" else set()}.get(section, set())
        wrong = [
            (key, value, getattr(made, key))
            for key, value in written[section].items()
            if getattr(made, key) != value and key not in changed
        ]
        assert not wrong
    assert (recipe.metrics, recipe.training.use_cpu) == (written.get("metrics", []), True)
    if file.stem == "qlora":
        quantization = recipe.quantization
        assert (quantization.load_in_4bit, quantization.bnb_4bit_quant_type) == (True, "nf4")
        assert (quantization.bnb_4bit_use_double_quant, quantization.bnb_4bit_compute_dtype) == (True, torch.bfloat16)
    assert len(RECIPES) >= 3


def test_resuming(models, tmp_path):
    """A run that was cut off goes on from its last checkpoint, or from one given, as it would have without a break."""
    recipe = ["examples/recipes/mam.yaml", f"model={{model_name_or_path: {models['bert']}}}", *FAST, "max_steps=6"]
    recipe += ["save_strategy=steps", "save_steps=3", "max_train_samples=64", "max_eval_samples=16"]
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    shown = succeed(*recipe, f"output_dir={whole}")
    shutil.copytree(whole / "checkpoint-3", cut / "checkpoint-3")
    state = json.loads((cut / "checkpoint-3" / "trainer_state.json").read_text())
    state["log_history"][0]["loss"] = 77.0  # a mark
    (cut / "checkpoint-3" / "trainer_state.json").write_text(json.dumps(state))
    (cut / "checkpoint-3" / "checkpoint_files.json").unlink()  # the sizes of the files
    for wanted in ("true", cut / "checkpoint-3"):
        again = succeed(*recipe, f"output_dir={cut}", f"resume_from_checkpoint={wanted}")
        assert re.search(r"^loss +\S+", again, re.MULTILINE)[0] == re.search(r"^loss +\S+", shown, re.MULTILINE)[0]
        ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (cut, whole))
        assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
        log = json.loads((cut / "training_record.json").read_text())["history"]
        assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6, 6]
        assert [entry["step"] for entry in log if entry.get("loss") == 77] == [1]
        expected = Recipe.read(recipe[0], [*recipe[1:], f"output_dir={cut}"]).written
        assert Recipe.read(cut / "recipe.yaml").written == expected  # repeats all of the run
        shutil.rmtree(cut / "checkpoint-6")


# other tasks and forms of data


def test_sequence_to_sequence(models, tmp_path):
    """SEQ_2_SEQ_LM with texts generated for the metric; prompt and response from a mapping of files to splits."""
    for split, rows in (("train", 8), ("dev", 4)):
        (tmp_path / f"{split}.csv").write_text("question,answer\n" + "w1 w2 w3,w4 w4 w4\n" * rows)
    with (tmp_path / "dev.csv").open("a") as file:
        file.write(
            "w1 w2 w3,w5\n"
        )  # not what is learnt; texts end at their longest, as these words have no end of text
    out = tmp_path / "adapter"
    recipe = {
        "model": {"model_name_or_path": models["t5"]},
        "peft": {
            "peft_type": "LAYER_PREFIX", "task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": 2,
            "modules_to_save": ["lm_head"],
        },
        "data": {
            "data_files": {split: str(tmp_path / f"{split}.csv") for split in ("train", "dev")},
            "eval_split": "dev", "prompt_column": "question", "response_column": "answer", "max_length": 8,
        },
        "training": {
            "output_dir": str(out), "predict_with_generate": True, "generation_max_length": 4, "learning_rate": 0.05,
        },
        "metrics": ["exact_match"],
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    shown = succeed(
        tmp_path / "recipe.yaml", *(change for change in FAST if not change.startswith("load_best")), "max_steps=30"
    )
    assert re.search(r"^exact_match +0\.8 *$", shown, re.MULTILINE)
    loaded = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(models["t5"]), out)
    assert loaded.peft_config["default"].num_virtual_tokens == 2


def test_pairs_and_numbered_classes(models, tmp_path):
    """Two texts to a row are joined as the tokenizer joins them; numbers become classes in their order."""
    rows = [{"a": "w1", "b": "w2 w3", "y": y} for y in (7, 2, 7)]
    trainer = prepare(
        Recipe.read(classification(models, tmp_path, rows, text_column=["a", "b"], label_column="y", max_length=16))
    )
    assert trainer.train_dataset[0]["input_ids"] == tokenizer()("w1", "w2 w3")["input_ids"]
    assert trainer.train_dataset["labels"][:] == [1, 0, 1]
    assert trainer.model.config.id2label == {0: "2", 1: "7"}


def test_accumulated_batches_have_the_mean_loss(models, tmp_path):
    """A classifier's loss is that of the whole step, however many batches it comes in."""
    rows = [{"text": f"w{i}", "label": i % 2} for i in range(8)]
    path = classification(models, tmp_path, rows)
    losses = []
    for batch, accumulated in ((8, 1), (2, 4)):
        size = f"per_device_train_batch_size={batch}"
        changes = [
            size,
            f"gradient_accumulation_steps={accumulated}",
            "max_steps=1",
            "save_strategy=no",
            "report_to=none",
        ]
        trainer = prepare(Recipe.read(path, [*changes, "disable_tqdm=true"]))
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        losses.append(trainer.train().training_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
