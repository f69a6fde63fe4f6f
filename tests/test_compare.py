"""The comparison of methods as a whole, on tiny models: runs, resuming, two workers, unseen test rows, the command."""

import json
import multiprocessing
import re
import time
from pathlib import Path

import datasets
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, Trainer
from typer.testing import CliRunner

from hf_peft_ext import load_adapter, trainers
from hf_peft_ext.cli import app
from hf_peft_ext.compare import compare
from hf_peft_ext.compare.runs import RATES, SEEDS, WINNER, MethodRuns
from hf_peft_ext.recipes import Recipe
from hf_peft_ext.search import trial_queue
from hf_peft_ext.search.trial_queue import Queue

from .backbones import BACKBONES
from .test_training import tokenizer

# 2026-11: the data loader asks for pinned memory wherever it runs; TRL's and peft's own use of renamed arguments
pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
]

RECIPE = """
model: {{model_name_or_path: {model}}}
peft: {{peft_type: LORA, task_type: {task}}}
data: {data}
training: {{output_dir: {out}/unused, max_steps: 4, per_device_train_batch_size: 4, use_cpu: true}}
"""
CLASSES = "{{data_files: {file}, split_column: split, eval_split: test, label_column: label}}"


def tiny_model(folder, name):
    BACKBONES[name].build().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders with tiny models and tokenizers: bert, llama, t5."""
    return {name: tiny_model(tmp_path_factory.mktemp(name), name) for name in ("bert", "llama", "t5")}


def row(i, split):
    word = "w1" if i % 2 else "w2"
    return {"text": f"{word} w{3 + i % 9} w{5 + i % 7}", "label": "odd" if i % 2 else "even", "split": split}


def write_recipe(folder, model, task="SEQ_CLS", **keys):
    """A recipe for a tiny model, and its rows: 24 to train on, 8 to test on."""
    file = folder / "rows.jsonl"
    rows = [row(i, "train") for i in range(24)] + [row(i, "test") for i in range(8)]
    file.write_text("\n".join(map(json.dumps, rows)))
    data = keys.get("data", CLASSES).format(file=file)
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(model=model, task=task, data=data, out=folder))
    return path


@pytest.fixture
def recipe(models, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return write_recipe(tmp_path, models["bert"])


QUICK = {"seeds": 2, "rates": (1.0,), "progress": False, "heartbeat": 1}


def stages(folder):
    records = Queue(f"sqlite:///{folder}/compare.db", "compare").records()
    return [(r.run.stage, r.run.constraint, r.run.seed, r.state) for r in records]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_methods_of_peft(recipe, tmp_path):
    """All that are wired run, none fails. peft's prefix tuning takes no encoder of transformers 5.24."""
    methods = ["lora", "rslora", "dora", "adalora", "krona", "vera", "fourierft", "oft", "boft", "ln_tuning",
               "beft", "ia3", "prompt_tuning", "p_tuning"]  # fmt: skip
    result = compare(recipe, methods, output_dir=tmp_path / "out", train_winner=False, **QUICK)
    assert [m.name for m in result.methods] == methods
    assert {m.name: m.error for m in result.methods if m.error} == {}


def test_classification(recipe, models, tmp_path):
    """Every method has its numbers, the winner is saved with its card and recipe, and loads again."""
    methods = ["lora", "unipelt", "ia3", "ladder", "full", "none"]
    assert trainers.compare is compare
    result = compare(recipe, methods, seeds=2, rates=(1, 3), output_dir=tmp_path / "out", progress=False)
    assert [m.name for m in result.methods] == methods
    assert result.score == "accuracy"
    for method in result.methods:
        assert list(method.scores) == [43, 44]  # 42, the default, chose the rates
        assert method.interval[0] <= method.mean <= method.interval[1]
        assert len(method.rates) == 2
        assert min(method.bytes, method.step_seconds, method.step_ratio, method.memory, method.seconds) > 0
        assert method.error is None
    by_name = {m.name: m for m in result.methods}
    assert by_name["none"].parameters == 0
    assert by_name["full"].parameters > 10_000 > by_name["lora"].parameters > 0
    assert by_name["full"].bytes > by_name["unipelt"].bytes > by_name["lora"].bytes > by_name["none"].bytes
    assert by_name["full"].memory > by_name["lora"].memory
    assert by_name["lora"].step_ratio == 1
    assert "Retention was not measured" in result.notes[0]
    assert result.winner == "lora"
    folder = Path(result.folder)
    model = AutoModelForSequenceClassification.from_pretrained(models["bert"], num_labels=2)
    assert PeftModel.from_pretrained(model, folder).peft_config["default"].r == 8
    assert "LoRA" in (folder / "README.md").read_text()
    record = json.loads((folder / "training_record.json").read_text())
    measured = {(r["split"], r["method"]): r["value"] for r in record["results"] if r["metric"] == "accuracy"}
    assert measured["dev", "adapter"] == pytest.approx(by_name["lora"].mean)
    assert measured["test", "adapter"] == result.test_score
    assert Recipe.read(folder / "recipe.yaml").training.learning_rate == by_name["lora"].learning_rate
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["winner"] == "lora"
    page = (tmp_path / "out" / "compare.html").read_text()
    assert result.recommendation.replace("'", "&#39;") in page
    assert "<svg" in page


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_model_that_peft_has_no_names_for(tmp_path):
    """Methods of peft run on DistilBERT, and the winner loads again."""
    path = write_recipe(tmp_path, tiny_model(tmp_path, "distilbert"))
    result = compare(path, ["lora", "ia3"], **QUICK, output_dir=tmp_path / "out")
    assert {m.name: m.error for m in result.methods} == {"lora": None, "ia3": None}
    assert all(m.parameters for m in result.methods)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    load_adapter(base, tmp_path / "out" / "winner")


def test_regression(models, tmp_path):
    """The score is Pearson's correlation; rows are held out at random."""
    path = write_recipe(tmp_path, models["bert"], data="{{data_files: {file}, problem_type: regression}}")
    rows = [{"text": f"w{3 + i % 9} w{5 + i % 7}", "label": i % 9 / 2} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = compare(path, ["lora", "unipelt"], **QUICK, output_dir=tmp_path / "out", train_winner=False)
    assert result.score == "pearson"
    assert all(-1 <= score <= 1 for method in result.methods for score in method.scores.values())


def test_sequence_to_sequence(models, tmp_path):
    """The score is the held-out loss, and the winner is saved; ladders are compared too."""
    data = "{{data_files: {file}, split_column: split, prompt_column: text, response_column: label}}"
    path = write_recipe(tmp_path, models["t5"], "SEQ_2_SEQ_LM", data=data)
    result = compare(path, ["lora", "unipelt", "ladder"], **QUICK, output_dir=tmp_path / "out")
    assert (result.score, result.higher_is_better) == ("loss", False)
    for method in result.methods:
        assert method.error is None
        assert all(score > 0 for score in method.scores.values())
        assert method.parameters > 0
    assert Recipe.read(Path(result.folder) / "recipe.yaml").peft.task_type == "SEQ_2_SEQ_LM"


def test_generation(models, tmp_path):
    """Without a metric, the score is the held-out loss; a causal model has a retention."""
    pytest.importorskip("trl")
    path = write_recipe(tmp_path, models["llama"], "CAUSAL_LM", data="{{data_files: {file}, split_column: split}}")
    path.write_text(path.read_text().replace("split_column: split", "split_column: split, text_column: text"))
    options = {**QUICK, "general_text": ["w1 w2 w3 w4", "w5 w6"], "output_dir": tmp_path / "out"}
    result = compare(path, ["lora", "bitfit"], **options)
    assert (result.score, result.higher_is_better, result.test_score) == ("loss", False, None)
    for method in result.methods:
        assert all(score > 0 for score in method.scores.values())
        assert method.base_loss == pytest.approx(result.methods[0].base_loss)
        assert method.adapter_loss != method.base_loss
    assert result.rows == {"train": 24, "dev": 5}


def test_choices(models, tmp_path):
    """T-Few's task is scored by the accuracy of the ranking."""
    choices = "prompt: '{{{{{{{{ text }}}}}}}}', choices: {{{{odd: w7, even: w8}}}}, answer_column: label"
    data = CLASSES.replace("label_column: label", choices.format())
    path = write_recipe(tmp_path, models["llama"], "CAUSAL_LM", data=data)
    result = compare(path, ["ia3", "lora"], output_dir=tmp_path / "out", **QUICK)
    assert (result.score, result.reference) == ("accuracy", "lora")
    assert 0 <= result.test_score <= 1


def test_test_rows_are_not_read_before_the_end(recipe, tmp_path, monkeypatch):
    """Loading the test split is an error until the winner is trained, and it is loaded once then."""
    load, seen = type(Recipe.read(recipe).data)._split, []

    def guarded(self, split, key):
        if split == "test":
            states = stages(tmp_path / "out")
            seen.append(split)
            assert {s for *_, s in states if _[0] in (RATES, SEEDS)} <= {"done", "stopped"}
            assert [s[0] for s in states].count(SEEDS) == 4
            assert next(s for s in states if s[0] == WINNER)[-1] == "running"
        return load(self, split, key)

    monkeypatch.setattr(type(Recipe.read(recipe).data), "_split", guarded)
    result = compare(recipe, ["lora", "bitfit"], output_dir=tmp_path / "out", **QUICK)
    assert seen == ["test"]
    assert result.test_score is not None


def test_dev_split(recipe, tmp_path):
    """A dev split is used in full and all training rows are trained on; as `eval_split` it leaves no test rows."""
    result = compare(
        recipe, ["lora", "bitfit"], dev_split="test", output_dir=tmp_path / "out", train_winner=False, **QUICK
    )
    assert result.rows == {"train": 24, "dev": 8}
    assert result.test_score is None
    assert result.folder is None


def test_resumes(recipe, tmp_path, monkeypatch):
    """A comparison that was interrupted repeats no finished run, and its result is that of one that was not."""
    whole = compare(recipe, ["lora", "bitfit"], output_dir=tmp_path / "whole", **QUICK)
    execute, begun = MethodRuns.execute, []

    def counted(self, trial, run):
        begun.append(run.key)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return execute(self, trial, run)

    monkeypatch.setattr(MethodRuns, "execute", counted)
    with pytest.raises(KeyboardInterrupt):
        compare(recipe, ["lora", "bitfit"], output_dir=tmp_path / "out", **QUICK)
    resumed = compare(recipe, ["lora", "bitfit"], output_dir=tmp_path / "out", **QUICK)
    assert len(begun) == 5  # the third run twice
    assert [m.scores for m in resumed.methods] == [m.scores for m in whole.methods]
    assert resumed.recommendation == whole.recommendation
    with pytest.raises(ValueError, match=r"`rates` \(=\[2.0\]\) is \[1.0\] in the study 'compare'; choose another"):
        compare(recipe, ["lora", "bitfit"], output_dir=tmp_path / "out", **{**QUICK, "rates": (2.0,)})


def test_more_seeds_and_methods(recipe, tmp_path, monkeypatch):
    """A later command adds seeds and methods to a comparison; what was run is not repeated."""
    first = compare(recipe, ["lora", "bitfit"], output_dir=tmp_path / "out", **QUICK)
    execute, begun = MethodRuns.execute, []

    def counted(self, trial, run):
        begun.append((run.constraint, run.model))
        return execute(self, trial, run)

    monkeypatch.setattr(MethodRuns, "execute", counted)
    more = compare(recipe, ["lora", "bitfit", "ia3"], output_dir=tmp_path / "out", **{**QUICK, "seeds": 3})
    assert sorted(begun) == [("bitfit", 2), ("ia3", 0), ("ia3", 1), ("ia3", 2), ("lora", 2)]
    for method in first.methods:
        assert method.scores.items() < more.of(method.name).scores.items()
    assert more.folder
    assert more.settings["seeds"] == 3
    with pytest.raises(ValueError, match=r"`seeds` \(=2\) must be at least 3, as in the study 'compare'"):
        compare(recipe, ["lora", "bitfit"], output_dir=tmp_path / "out", **QUICK)
    with pytest.raises(ValueError, match=r"`methods.lora` \(=\{.*\}\) is \{.*\} in the study"):
        compare(recipe, ["lora", "bitfit"], budget=4000, output_dir=tmp_path / "out", **{**QUICK, "seeds": 3})


def work(recipe, folder, cache):
    torch.set_num_threads(1)
    trial_queue.POLL = 0.1
    datasets.config.HF_DATASETS_CACHE = cache
    compare(recipe, ["lora", "bitfit"], output_dir=folder, **QUICK)


@pytest.mark.slow  # the queue's own fast test is in test_search_workers.py
def test_killed_worker_and_another(recipe, tmp_path):
    """One worker is killed in a run; of two others each does a part, and no finished run is repeated."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    folder = tmp_path / "out"

    def start(name):
        process = context.Process(target=work, args=(recipe, folder, str(tmp_path / name)))
        process.start()
        return process

    first = start("a")
    while not (folder / "compare.db").exists() or not any(s[-1] == "running" for s in stages(folder)):
        time.sleep(0.05)
        assert first.is_alive()
    first.kill()
    first.join()
    others = [start(name) for name in "bc"]
    for other in others:
        other.join(240)
        assert other.exitcode == 0
    records = Queue(f"sqlite:///{folder}/compare.db", "compare").records()
    assert [record.state for record in records] == ["done"] * 5
    assert len({record.worker for record in records}) <= 3
    assert (folder / "winner" / "adapter_config.json").exists()


def test_failed_method(recipe, tmp_path, monkeypatch):
    """The errors of a method are reported, and the others are compared."""
    execute = MethodRuns._execute

    def fails(self, trial, run, folder):
        if run.constraint == "bitfit":
            raise RuntimeError("out of memory")
        return execute(self, trial, run, folder)

    monkeypatch.setattr(MethodRuns, "_execute", fails)
    result = compare(recipe, ["lora", "bitfit", "ia3"], output_dir=tmp_path / "out", **QUICK)
    bitfit = result.of("bitfit")
    assert (bitfit.verdict, bitfit.mean, bitfit.failed) == ("failed", None, 2)
    assert bitfit.error == "RuntimeError: out of memory"
    assert result.winner == "lora"
    assert "out of memory" in (tmp_path / "out" / "compare.html").read_text()


def test_no_profiler_outlives_a_run_that_fails(recipe, tmp_path, monkeypatch):
    """Left running, it would crash the process at its end."""

    def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Trainer, "training_step", fails)
    result = compare(recipe, ["lora", "bitfit"], output_dir=tmp_path / "out", train_winner=False, **QUICK)
    assert {method.failed for method in result.methods} == {2}
    assert not torch.autograd._profiler_enabled()


def test_full_wins(recipe, models, tmp_path, monkeypatch):
    """A winner without an adapter is saved as a whole model."""
    monkeypatch.setattr(
        "hf_peft_ext.compare.summary.recommend", lambda *args: ("full", "Take full fine-tuning for this test.")
    )
    result = compare(recipe, ["lora", "full"], output_dir=tmp_path / "out", **QUICK)
    saved = AutoModelForSequenceClassification.from_pretrained(result.folder)
    base = AutoModelForSequenceClassification.from_pretrained(models["bert"])
    assert not torch.equal(next(saved.bert.encoder.parameters()), next(base.bert.encoder.parameters()))
    assert saved.config.id2label == {0: "even", 1: "odd"}


# The command


def command(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)], env={"COLUMNS": "250"})


def test_command(recipe, tmp_path):
    """A table, the recommendation and the files; the same as JSON, from the database."""
    options = ["--methods", "lora,bitfit", "--seeds", "2", "--rates", "1", "--output", tmp_path / "out"]
    shown = command(recipe, *options)
    assert shown.exit_code == 0, (shown.output, shown.exception)
    assert re.search(r"^ *LoRA +0\.\d+ \[", shown.stdout, re.MULTILINE), shown.stdout
    assert re.search(r"take LoRA|Take ", shown.stdout)
    assert re.search(r"^test +accuracy [01]\.\d+", shown.stdout, re.MULTILINE)
    assert (tmp_path / "out" / "compare.html").exists()
    result = json.loads(command(recipe, *options, "--json").stdout)
    assert [method["name"] for method in result["methods"]] == ["lora", "bitfit"]


WRONG = {
    "--methods lora,unipetl": r"`methods` (='unipetl') must be one of lora, dora, .*; did you mean `unipelt`?",
    "--methods lora,lora": "`methods` (=['lora', 'lora']) must hold a name once.",
    "--methods lora": "`methods` (=['lora']) must hold at least two methods to compare.",
    "--budget much": """`budget` (='much') must be a share of the base model, such as "0.5%", or a number""",
    "--budget 0%": """`budget` (='0%') must be a share of the base model, such as "0.5%", or a number""",
    "--budget 3": "`budget` (='3') is 3 of 36,642 parameters, which LoRA cannot meet: the nearest is 256 parameters",
    "--seeds 1": "`seeds` (=1) must be at least 2: one run has no interval and no test.",
    "--rates 1,x": "`rates` (='1,x') must be numbers, separated by commas, such as 1/3,1,3.",
    "--rates 0,1": "`rates` (=0.0) must be a positive number.",
    "--dev-share 0.01": "`dev_share` (=0.01) must leave rows to train on and dev rows to choose by; of 24 rows it",
    "--dev-split train": "`dev_split` (='train') must differ from `data.train_split` (='train')",
    "--dev-split other": "`data.train_split` (='other') must be a value of the column `split`",
    "--storage x": "`storage` (='x') must be a database's URL",
}


@pytest.mark.parametrize("options", WRONG)
def test_wrong_arguments(options, recipe, tmp_path):
    """Each is an error in one line that names field, value and rule, before anything is trained."""
    usual = {"--methods": "lora,bitfit", "--output": str(tmp_path / "out")}
    wrong = dict([options.split(maxsplit=1)])
    result = command(recipe, *[word for pair in (usual | wrong).items() for word in pair])
    pattern = re.escape(WRONG[options]).replace(r"\.\*", ".*")
    assert re.search(pattern, " ".join(result.stderr.split())), result.stderr
    assert result.exit_code == 2
    assert not (tmp_path / "out" / "compare.html").exists()
