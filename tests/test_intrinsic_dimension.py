"""The measurement of intrinsic dimension: the bisection, the result, resuming, and the command on a tiny recipe."""

import json
import math
import runpy
import sys
from pathlib import Path

import datasets
import pytest
from typer.testing import CliRunner

from hf_peft_ext.cli import app
from hf_peft_ext.intrinsic_dimension import IntrinsicDimension, measure_intrinsic_dimension
from hf_peft_ext.intrinsic_dimension.bisection import Bisection
from hf_peft_ext.intrinsic_dimension.measure import Measuring

from .test_compare import tiny_model, write_recipe

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")  # 2026-11: the data loader
STUDY = Path(__file__).parents[1] / "examples" / "studies" / "intrinsic_dimension.py"
QUICK = {"progress": False, "heartbeat": 1}


def search(score, **options):
    """The dimensions that a search tries, in order, and the bracket that it ends with."""
    bisection = Bisection(**{"threshold": 0.5, "smallest": 10, "largest": 10_000, "precision": 1.5, **options})
    scores = {}
    while True:
        low, high, following = bisection.bracket(scores)
        if not following:
            return list(scores), low, high
        scores |= {d: score(d) for d in following}


def test_bisection():
    """Ends first, then middles on the logarithmic scale, until the bracket is narrow; few dimensions are tried."""
    tried, low, high = search(lambda d: d >= 700)
    assert tried[:3] == [10, 10_000, 316]
    assert low < 700 <= high <= 1.5 * low
    assert len(tried) <= 2 + math.ceil(math.log2(math.log(1000) / math.log(1.5)))
    assert search(lambda d: 1.0)[1:] == (0, 10)
    assert search(lambda d: 0.0)[1:] == (10_000, 0)
    assert search(lambda d: d >= 3, smallest=1, largest=4, precision=1.01) == ([1, 4, 2, 3], 2, 3)


def result(brackets, **fields):
    scores = {seed: {10: 0.2, 100: 0.95} for seed in brackets}
    return IntrinsicDimension("accuracy", 0.9, {0: 0.98, 1: 1.0}, scores, brackets, **fields)


def test_result():
    """d is the geometric mean over seeds; the interval, on the logarithmic scale, goes from missed to reached ones."""
    found = result({0: (50, 100), 1: (200, 400)})
    assert found.threshold == pytest.approx(0.891)
    assert found.d == pytest.approx(200)
    low, high = found.interval
    assert low * high == pytest.approx(100 * 200)  # the middles of the lower and of the upper ends
    assert low < 50 < 400 < high
    assert "d90 = 200 [" in found.sentence
    assert "accuracy 0.891, 90% of full fine-tuning's 0.990" in found.sentence
    assert found.means() == {10: 0.2, 100: 0.95}
    assert json.loads(found.to_json())["d"] == pytest.approx(200)
    assert result({0: (50, 100)}).interval is None
    assert result({0: (50, 100), 1: (50, 100)}).interval == pytest.approx((50, 100))
    outside = result({0: (50, 100), 1: (400, 0), 2: (0, 10)})
    assert outside.d is None
    assert "1 seeds need more than the largest d and 1 seeds reach it at the smallest d" in outside.sentence


class Curve:
    """A task whose score is known: it rises with log d, at another place for each seed."""

    def __init__(self, stop_at=None):
        self.calls, self.stop_at = [], stop_at

    def __call__(self, d, seed, rate):
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        self.calls.append((d, seed, rate))
        if d is None:
            return 0.8 * rate
        return rate * 0.8 * min(1.0, math.log(d) / math.log(200 * 2**seed))


def test_a_function_as_task(tmp_path):
    """Every seed ends near its own dimension; the best learning rate counts; result and figure are written."""
    task = Curve()
    found = measure_intrinsic_dimension(task, rates=(0.5, 1.0), output_dir=tmp_path, **QUICK)
    assert found.full == pytest.approx({0: 0.8, 1: 0.8, 2: 0.8})
    for seed, (low, high) in found.brackets.items():
        assert low < (200 * 2**seed) ** 0.9 <= high <= 1.5 * low
    assert len(task.calls) == len(set(task.calls)) < 2 * 3 * 10
    assert found.interval[0] < found.d < found.interval[1]
    assert json.loads((tmp_path / "intrinsic_dimension.json").read_text())["sentence"] == found.sentence
    assert (tmp_path / "intrinsic_dimension.svg").read_text().startswith("<?xml")


def test_resumes(tmp_path):
    """A measurement that was interrupted repeats no finished run; other settings are refused."""
    whole = measure_intrinsic_dimension(Curve(), output_dir=tmp_path / "whole", **QUICK)
    task = Curve(stop_at=9)
    with pytest.raises(KeyboardInterrupt):
        measure_intrinsic_dimension(task, output_dir=tmp_path / "out", **QUICK)
    task.stop_at = None
    resumed = measure_intrinsic_dimension(task, output_dir=tmp_path / "out", **QUICK)
    assert resumed == whole
    assert len(task.calls) == len(set(task.calls))
    with pytest.raises(ValueError, match=r"`share` \(=0.8\) is 0.9 in the study 'intrinsic_dimension'"):
        measure_intrinsic_dimension(task, share=0.8, output_dir=tmp_path / "out", **QUICK)


def test_failed_runs(tmp_path):
    """A dimension whose run failed counts as missed, and its error is reported; without full runs there is no end."""

    def task(d, seed, rate):
        if d == 10:
            raise ValueError("diverged")
        return 1.0 if d is None else float("nan") if d < 100 else 1.0

    found = measure_intrinsic_dimension(task, seeds=1, output_dir=tmp_path / "a", **QUICK)
    assert found.brackets[0][0] < 100 <= found.brackets[0][1]
    assert found.errors[0] == "ValueError: diverged"
    assert any("nan, is not a finite number" in error for error in found.errors)
    with pytest.raises(RuntimeError, match="No run of full fine-tuning was finished; the first error: ValueError: no"):
        measure_intrinsic_dimension(broken, seeds=1, output_dir=tmp_path / "b", **QUICK)
    with pytest.raises(RuntimeError, match="are not positive"):
        measure_intrinsic_dimension(lambda *_: -1.0, seeds=1, output_dir=tmp_path / "c", **QUICK)


def broken(*_):
    raise ValueError("no")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"seeds": 0}, r"`seeds` \(=0\) must be a positive whole number"),
        ({"share": 1.0}, r"`share` \(=1.0\) must lie between 0 and 1"),
        ({"smallest": 20, "largest": 20}, r"`largest` \(=20\) must be above `smallest` \(=20\)"),
        ({"largest": 2**21}, r"`largest` \(=2097152\) must be at most 1048576"),
        ({"precision": 1}, r"`precision` \(=1\) must be above 1"),
        ({"rates": ()}, r"`rates` \(=\(\)\) must hold at least one factor"),
        ({"rates": (1, 1)}, r"`rates` \(=\[1, 1\]\) must hold a factor once"),
    ],
)
def test_refused_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        measure_intrinsic_dimension(Curve(), **options)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {name: tiny_model(tmp_path_factory.mktemp(name), name) for name in ("bert", "t5")}


@pytest.fixture
def recipe(models, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return write_recipe(tmp_path, models["bert"])


SMALL = ["--seeds", "2", "--smallest", "4", "--largest", "64", "--precision", "8"]


def test_command(recipe, tmp_path):
    """The command measures a recipe: full fine-tuning and each seed's search, through the recipe's trainer."""
    changes = ["peft={peft_type: INTRINSIC, task_type: SEQ_CLS, variant: layer, exclude_modules: [word_embeddings]}"]
    changes += ["training.learning_rate=0.01"]
    arguments = ["intrinsic-dimension", str(recipe), *changes, *SMALL, "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "full fine-tuning's" in done.output
    assert str(tmp_path / "out" / "intrinsic_dimension.svg") in done.output
    found = json.loads((tmp_path / "out" / "intrinsic_dimension.json").read_text())
    assert len(found["full"]) == 2
    assert all({"4", "64"} <= scores.keys() or found["errors"] for scores in found["scores"].values())
    again = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(again.stdout)["scores"] == found["scores"]


def test_recipe_task(recipe, tmp_path, monkeypatch):
    """The task of a recipe trains d numbers with the run's projection, or all parameters."""
    trained = []
    monkeypatch.setattr(Measuring, "of", classmethod(lambda cls, task, args: trained.append(task) or Stop()))
    measure_intrinsic_dimension(recipe, smallest=4, largest=64, output_dir=tmp_path / "out", **QUICK)
    [task] = trained
    for d, seed in ((8, 0), (8, 1), (None, 0)):
        run = task.run_recipe(d, seed, 2.0, tmp_path)
        assert run.training.seed == seed
        if d is None:
            assert run.peft.peft_type == "LORA"
        else:
            assert (run.peft.d, run.peft.seed) == (d, seed)
    assert 0 <= task(8, 0, 1.0) <= 1
    assert task.score == "accuracy"


class Stop:
    def run(self):
        return None


def test_refused_recipes(models, recipe, tmp_path):
    """A loss has no 90 %; a quantized model cannot be changed."""
    data = "{{data_files: {file}, split_column: split, prompt_column: text, response_column: label}}"
    path = write_recipe(tmp_path, models["t5"], "SEQ_2_SEQ_LM", data=data)
    with pytest.raises(ValueError, match="has a loss as its score, which has no 90 %"):
        measure_intrinsic_dimension(path, output_dir=tmp_path / "a", **QUICK)
    recipe = write_recipe(tmp_path, models["bert"])
    done = CliRunner().invoke(app, ["intrinsic-dimension", str(recipe), "quantization={load_in_4bit: true}", *SMALL])
    assert done.exit_code == 2
    assert "`quantization` must be left out" in done.stderr


def test_study(tmp_path, monkeypatch, capsys):
    """The study's digits, with few steps, and its report."""
    sizes = {"width": 8, "steps": 20, "seeds": 2, "smallest": 5, "largest": 40, "precision": 9}
    options = [part for name, size in sizes.items() for part in (f"--{name}", str(size))]
    for stage in ("digits", "report"):
        run_study(monkeypatch, ["--stage", stage, *options, "--output", str(tmp_path)])
    assert "| digits-8 | 0." in capsys.readouterr().out
    assert (tmp_path / "table.md").exists()
    assert (tmp_path / "digits.png").stat().st_size > 0


def run_study(monkeypatch, options):
    monkeypatch.setattr(sys, "argv", [str(STUDY), *options])
    monkeypatch.syspath_prepend(STUDY.parent)  # as when it is started as a script
    runpy.run_path(str(STUDY), run_name="__main__")
