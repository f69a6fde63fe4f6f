"""Wrong recipes, against the error they must give."""

import re

import pytest

from hf_peft_ext.recipes import Recipe, RecipeError, prepare
from hf_peft_ext.recipes.progress import TrainingLines

from .recipe_runs import FAST, chats, classification, elsewhere, models, run, succeed  # noqa: F401

# 2026-11: the data loader asks for pinned memory wherever it runs; TRL's and peft's own use of renamed arguments
pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
]
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
    rows = [{"text": "w1", "label": 0.5}, {"text": "w2", "label": float("nan")}]
    path = classification(models, tmp_path, rows, problem_type="regression")
    with pytest.raises(RecipeError, match="must hold finite numbers for regression; row 1 has nan"):
        prepare(Recipe.read(path))
    path = classification(models, tmp_path, rows, problem_type="ranking")
    with pytest.raises(RecipeError, match=r"`problem_type` \(='ranking'\) must be single_label_classification or"):
        Recipe.read(path)
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
