"""Recipes through the real command, on tiny models: the saved adapter against the numbers that were reported, wrong
recipes against the error they must give."""

import inspect
import json
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
from typer.testing import CliRunner

from hf_peft_ext import Placement
from hf_peft_ext.cli import app
from hf_peft_ext.hub_cards import CardWarning
from hf_peft_ext.ranking.metrics import CLASSIFICATION, exact_match
from hf_peft_ext.recipes import Recipe, RecipeError, prepare
from hf_peft_ext.recipes.progress import TrainingLines
from hf_peft_ext.recipes.recipe_schema import NOT_IN_RECIPES, section_keys
from hf_peft_ext.recipes.recipe_source import RecipeSource, split_override

from .backbones import BACKBONES
from .test_training import tokenizer

# 2026-11: the data loader asks for pinned memory wherever it runs; TRL's and peft's own use of renamed arguments
pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
]

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
FAST = [
    *("training.use_cpu=true", "max_steps=3", "logging_steps=1", "eval_strategy=no", "save_strategy=no"),
    *("load_best_model_at_end=false", "disable_tqdm=true"),
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Recipes name files from the root of the repository; what `datasets` keeps goes away with the test."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders with tiny models and a tokenizer: bert, llama, t5."""
    found = {}
    for name in ("bert", "llama", "t5"):
        found[name] = str(tmp_path_factory.mktemp(name))
        wide = {"hidden_size": 64, "intermediate_size": 128} if name == "llama" else {}  # 4-bit blocks are 64 wide
        BACKBONES[name].build(**wide).save_pretrained(found[name])
        words = tokenizer()
        words.chat_template = CHAT
        words.save_pretrained(found[name])
    return found


@pytest.fixture
def chats(tmp_path):
    """A file of chats, in two splits."""
    file = tmp_path / "chats.jsonl"
    turn = [{"role": "user", "content": "w1 w2 w3"}, {"role": "assistant", "content": "w4 w5 w6 w7"}]
    file.write_text("".join(json.dumps({"messages": turn, "part": part}) + "\n" for part in ("a", "a", "a", "b", "b")))
    return f"data={{data_files: {file}, messages_column: messages, split_column: part, train_split: a, eval_split: b}}"


def run(*arguments):
    return CliRunner().invoke(app, ["train", *map(str, arguments)], env={"COLUMNS": "200"})


def succeed(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def text_classifier(folder, labels=8):
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels)


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

    model = PeftModel.from_pretrained(text_classifier(models["bert"]), out).eval()
    recipe = Recipe.read(out / "recipe.yaml")
    _, test, labels = recipe.data.load(recipe.training.seed)
    batch = tokenizer()(test["text"][:], padding=True, return_tensors="pt", truncation=True, max_length=128)
    with torch.no_grad():
        predicted = model(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits.argmax(-1)
    right = [labels[i] == intent for i, intent in zip(predicted, test["intent"][:], strict=True)]
    assert np.mean(right) == pytest.approx(measured["accuracy"], abs=1e-6)
    assert sorted({*labels}) == labels
    assert len(labels) == 8


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


def classification(models, tmp_path, rows, **data):
    """A recipe for rows of one's own, and its path."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": {"model_name_or_path": models["bert"]},
        "peft": {"peft_type": "BITFIT", "task_type": "SEQ_CLS"},
        "data": {"data_files": str(tmp_path / "rows.jsonl"), **data},
        "training": {"output_dir": str(tmp_path / "out"), "use_cpu": True},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path / "recipe.yaml"


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
    assert weights["base_model.model.classifier.weight"].shape == (8, 32)


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


def by_hand(models, tmp_path):
    """A recipe with a comment, in the folder that its adapter is saved in."""
    rows = [{"text": f"w{i}", "label": i % 2} for i in range(8)]
    path = classification(models, tmp_path, rows, text_column="text", label_column="label")
    path.write_text("# Why this rate: see the notes.\n" + path.read_text().replace(f"{tmp_path}/out", str(tmp_path)))
    return path


def test_a_recipe_beside_its_adapter_keeps_its_comments(models, tmp_path):
    """Trained twice, it is as it was written; with changes it is an error, before anything is trained or written."""
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


# what is wrong

COUNTS = ["per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"]
NUMBERS = {
    "learning_rate": 0, "weight_decay": -1, "max_grad_norm": -1, "adam_beta1": 2, "seed": -1, "max_steps": -3,
    "dataloader_num_workers": -2,
}  # fmt: skip
MEANT = {
    "lr": "learning_rate", "epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size",
    "steps": "max_steps", "wd": "weight_decay", "out": "output_dir",
}  # fmt: skip
WRONG = {
    "learning_rat=1": r"line: `learning_rat` is not a key of a recipe; did you mean `training.learning_rate`\?",
    "training.sede=1": "`training.sede` is not a key of `training` for UNIPELT and SEQ_CLS; did you mean .*seed`",
    "peft.learning_rate=3": r"did you mean `training.learning_rate`\?",
    "peft.lerning_rate=3": r"did you mean `training.learning_rate`\?",
    "traning.seed=1": r"did you mean `training.seed`\?",
    "revision=x": "`revision` is a key of more than one section; write `model.revision` or `data.revision`",
    "learning_rate=fast": r"`training.learning_rate` \(='fast'\) must be float, not str",
    "max_steps=1.5": r"`training.max_steps` \(=1.5\) must be int, not float",
    "peft.r=0": r"command line: `peft.r` is wrong: `r` \(=0\) must be a positive whole number",
    "lr_scheduler_type=linaer": "command line: `training.lr_scheduler_type` is wrong: linaer is not a valid",
    "peft_type=UNIPLET": r"`peft.peft_type` \(='UNIPLET'\) must be one of .*; did you mean `UNIPELT`\?",
    "task_type=SEQ_CLASS": r"`peft.task_type` \(='SEQ_CLASS'\) must be one of .*; did you mean `SEQ_CLS`\?",
    "peft_type=LORA": r"unipelt.yaml, line \d+: `peft.bottleneck_size` is not a key of `peft` for LORA and SEQ_CLS",
    "metrics=[accurcy]": r"`metrics` \(='accurcy'\) must be a metric of this task: .*; did you mean `accuracy`\?",
    "eval_split=null": "need rows to measure on: set `data.eval_split`",
    "data_files=nowhere.csv": r"`data.data_files` is wrong: `data_files` \(='nowhere.csv'\) must exist",
    "data_files=README.md": "must be files of one kind",
    "max_train_samples=0": r"`max_train_samples` \(=0\) must be a positive whole number",
    "label_column=intnt": r"has no column `intnt`; it has text, intent, split; did you mean `intent`\?",
    "train_split=trian": "`data.train_split` .*must be a value of the column `split`: test, train",
    "peft=3": "`peft` must be a mapping of keys to values",
    "model={}": "`model` lacks `model_name_or_path`",
    "output_dir=null": "`training` lacks `output_dir`",
    "foo": "'foo' changes nothing; write `key=value`",
    "data.text_column=[a": "the value of `data.text_column` is not YAML",
    "model.local_path=package:no_such_thing/model": "is in no installed package: pip install no-such-thing",
    "model.local_path=nowhere": r"`model.local_path` \(='nowhere'\) must be an existing folder",
    "attn_implementation=flash_attention_2": r"`model.model_name_or_path` \(=.*\) cannot be loaded: .*[Ff]lash",
    "metric_for_best_model=acuracy": r"\(='acuracy'\) must be one of .*: loss, accuracy, f1; did you mean `accuracy`",
    "resume_from_checkpoint=nowhere": r"resume_from_checkpoint` \(='nowhere'\) must be a complete checkpoint",
    "resume_from_checkpoint=true": "resume_from_checkpoint` needs a complete checkpoint, and .*out holds none",
    "exclude_modules=3": r"`peft.exclude_modules` \(=3\) must be list\[str\] \| str \| None, not int",
    **{f"{name}=0": rf"`training.{name}` \(=0\) must be 1 or more" for name in COUNTS},
    **{f"{name}={value}": rf"`training.{name}` .*{value}.*(must|>=|between)" for name, value in NUMBERS.items()},
    "num_train_epochs=-1": r"`training.num_train_epochs` \(=-1\) must be above 0, or `max_steps` must be",
    "output_dir=README.md/out": r"`training.output_dir` \(='README.md/out'\) must lie where files can be written",
    **{f"{word}=1": rf"did you mean `training.{key}`\?" for word, key in MEANT.items()},
    "training.lr=1": r"`training.lr` is not a key .*; did you mean `training.learning_rate`\?",
    "base_model=x": r"did you mean `model.model_name_or_path`\?",
    "quantization={load_in_4bits: true}": r"did you mean `quantization.load_in_4bit`\?",
}


@pytest.mark.parametrize("change", WRONG)
def test_wrong_changes(change, models, tmp_path):
    """The error names the key, where it stands and the nearest right one, with exit code 2 and nothing written."""
    model = [] if "model" in change else [f"model={{model_name_or_path: {models['bert']}}}"]
    steps = ["max_steps=-1"] if "num_train_epochs" in change else []
    out = f"output_dir={tmp_path / 'out'}"
    recipe = ["examples/recipes/unipelt.yaml", *model, out, *FAST, *steps, change]
    dry = ["--dry-run"] if change.endswith("=0") else []  # which refuses what the run refuses
    result = run(*recipe, *dry)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1
    assert re.search(WRONG[change], result.stderr), result.stderr
    assert not (tmp_path / "out").exists()


FILES = {
    "model: [": r"r.yaml, line \d: this is not YAML",
    "just words": "a recipe is a mapping of sections, not str",
    "training: {seed: 1}\nmodle: {}": r"r.yaml, line 2: `modle` is not a section .*; did you mean `model`\?",
    "training:\n  seed: 1\n  seed: 2": "r.yaml, line 3: `training.seed` is a duplicate key; the first is in .*line 2",
    "model: {}\npeft: {task_type: SEQ_CLS}": "`peft.peft_type` is missing; it must be one of .*UNIPELT",
    "peft: {peft_type: BITFIT, task_type: SEQ_CLS}\ntraining:\n  sede: 1": "r.yaml, line 3: `training.sede` is not",
    "metrics: accuracy": "r.yaml, line 1: `metrics` must be a list",
}


@pytest.mark.parametrize("text", FILES)
def test_wrong_files(text, tmp_path):
    """What is wrong in a file is named with its line."""
    (tmp_path / "r.yaml").write_text(text)
    result = run(tmp_path / "r.yaml")
    assert result.exit_code == 2
    assert re.search(FILES[text], result.stderr), result.stderr


def test_a_checkpoint_of_another_shape(models, tmp_path):
    """Resuming from it is one line that names the field and a weight, not a traceback."""
    rows = [{"text": f"w{i}", "label": i % 2} for i in range(8)]
    path = classification(models, tmp_path, rows)
    recipe = [path, "peft={peft_type: LORA, task_type: SEQ_CLS, r: 2}", "disable_tqdm=true", "save_strategy=steps"]
    succeed(*recipe, "max_steps=1", "save_steps=1")
    changes = ["peft.r=4", f"output_dir={tmp_path / 'other'}"]
    result = run(*recipe, *changes, f"resume_from_checkpoint={tmp_path / 'out' / 'checkpoint-1'}", "max_steps=2")
    assert result.exit_code == 2, result.output
    assert re.fullmatch(r"Error `resume_from_checkpoint` .* must hold the model's adapter .*lora_A.*\n", result.stderr)


def test_no_rows_and_no_steps(models, tmp_path):
    """What trains nothing is refused and saves nothing."""
    rows = [{"text": "w1", "label": 0, "s": "a"}, {"text": "w2", "label": 1, "s": "a"}]
    path = classification(models, tmp_path, rows)
    result = run(path, "dataloader_drop_last=true", "per_device_train_batch_size=4", "disable_tqdm=true")
    assert result.exit_code == 2, result.output
    assert "`training.dataloader_drop_last` (=True) trains nothing: 2 rows do not fill one" in result.stderr
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    (tmp_path / "rows.csv").write_text("text,label\n")
    result = run(path, f"data_files={tmp_path / 'rows.csv'}")
    assert result.exit_code == 2, result.output
    assert "must hold rows" in result.stderr or "cannot be loaded" in result.stderr


def test_progress_without_a_terminal(models, tmp_path, monkeypatch):
    """Lines in place of bars, which come to a file as one long line; with `disable_tqdm` neither."""
    rows = [{"text": f"w{i}", "label": i % 2} for i in range(8)]
    path = classification(models, tmp_path, rows)
    monkeypatch.setattr(TrainingLines.__init__, "__defaults__", (0.0, *TrainingLines.__init__.__defaults__[1:]))
    result = run(path, "max_steps=2", "report_to=none", "disable_tqdm=false")
    assert result.exit_code == 0, result.output
    assert re.findall(r"step (\d) of 2", result.stderr) == ["1", "2"]
    assert "it/s" not in result.stderr
    assert "step" not in run(path, "max_steps=2", "report_to=none", "disable_tqdm=true").stderr


def test_no_file(tmp_path):
    assert "cannot be read: No such file" in run(tmp_path / "none.yaml").stderr


TOKEN = "hf_" + "Ab1" * 11


@pytest.mark.parametrize(
    "change", [f"hub_token={TOKEN}", f"training.hub_token={TOKEN}", "training.hub_token=x", f"run_name=my {TOKEN}"]
)
def test_no_secrets(change):
    """A token is refused, and not shown, wherever it stands."""
    result = run("examples/recipes/unipelt.yaml", change)
    assert result.exit_code == 2
    assert "is a secret, and a recipe is saved and pushed with the adapter; leave it out and log in" in result.stderr
    assert TOKEN not in result.output


def test_strange_classes_and_empty_cells(models, tmp_path):
    """Rows that cannot be learnt from are named before a model is loaded."""
    rows = [{"text": "w1", "label": "a", "s": "x"}, {"text": "w2", "label": "b", "s": "y"}]
    path = classification(models, tmp_path, rows, split_column="s", train_split="x", eval_split="y")
    with pytest.raises(RecipeError, match=r"`data.eval_split` \(='y'\) has classes that no training row has: b"):
        prepare(Recipe.read(path))
    path = classification(models, tmp_path, [{"text": "w1", "label": 0.5}])
    with pytest.raises(RecipeError, match=r"`data.label_column` \(='label'\) must hold strings or whole numbers"):
        prepare(Recipe.read(path))
    path = classification(models, tmp_path, [{"text": "w1", "label": 1}, {"text": None, "label": 0}])
    with pytest.raises(RecipeError, match="row 1 of the column 'text' of rows is empty"):
        prepare(Recipe.read(path))


def test_columns_of_chats(models, chats):
    """The three kinds of text for CAUSAL_LM exclude each other."""
    changes = [chats, "bf16=false", "use_cpu=true", "prompt_column=x"]
    with pytest.raises(RecipeError, match="must be one of: `text_column`; `messages_column`; `prompt_column`"):
        Recipe.read("examples/recipes/qlora.yaml", changes)


def test_processes_without_a_group(monkeypatch, models):
    """Processes that would each train for themselves are stopped, with what to add."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = Recipe.read("examples/recipes/mam.yaml")
    recipe.training.__dict__["distributed_state"] = None
    with pytest.raises(RecipeError, match="2 processes were started, but train as 1: on CPUs, add `use_cpu=true`"):
        prepare(recipe)
