"""The report page and the command line, on a search of tiny models: every stage and model is on the page, the page
needs nothing else, and what is wrong in a file is said with its line."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import yaml
from transformers import BertConfig, BertModel, BertTokenizerFast
from typer.testing import CliRunner

from hf_peft_ext.cli import app
from hf_peft_ext.search import SearchResult, write_report
from hf_peft_ext.search.figures import architecture_figure, size_of

from .search_spaces import TwoStages, search

WORDS = ["good", "bad", "film", "plot", "the", "a"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A search in which one run failed."""

    class Failing(TwoStages):
        def sample(self, constraint, n, seed=0):
            configs = super().sample(constraint, n, seed)
            if constraint == "small":
                configs[1].placements[0].layers = [7]
            return configs

    return search(tmp_path_factory.mktemp("report") / "search.db", space=Failing()).search()


class Cells(HTMLParser):
    """The rows of a page's tables, and the sources that it would load."""

    def __init__(self, page):
        super().__init__()
        self.rows, self.loaded, self.open = [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.loaded += [value for name, value in attrs if name == "src" or (tag == "link" and name == "href")]
        self.open = tag in ("td", "th")
        if tag == "tr":
            self.rows.append([])
        elif self.open:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.open = self.open and tag not in ("td", "th")

    def handle_data(self, data):
        if self.open:
            self.rows[-1][-1] += data


def test_page_has_every_stage_and_model(finished, tmp_path):
    page = write_report(finished, tmp_path / "report").read_text(encoding="utf-8")
    cells = Cells(page)
    assert not cells.loaded
    assert "<script" not in page
    for stage in finished.stages:
        assert f"<h2>{stage}</h2>" in page
    for record in finished.records:
        found = [row for row in cells.rows if row[:4] == [*map(str, (record.run.constraint, record.run.model)),
                                                          str(record.run.seed), record.state]]  # fmt: skip
        (row,) = found
        assert row[4:6] == [f"{record.scores[task]:.4f}" if task in record.scores else "" for task in finished.tasks]
    assert any("`layers`" in row[-1] for row in cells.rows)
    for decision in finished.decisions:
        for name, value in decision.means.items():
            assert [name, f"{value:.4f}"] in [row[:2] for row in cells.rows]
    dots = sum(len(scores) for stage in finished.stages for scores in finished.scores(stage).values())
    drawn = re.findall(r'<g id="PathCollection_\d+">(.*?)</g>\s*</g>', page, flags=re.DOTALL)
    assert sum(found.count("<use ") for found in drawn) == dots == len(finished.records) - 1
    assert len((tmp_path / "report" / "runs.csv").read_text(encoding="utf-8").splitlines()) == 1 + len(
        finished.records
    )


def test_architecture_is_drawn_layer_by_layer(finished):
    """A field for each layer and sub-layer, with the size of those that are there."""
    figure = architecture_figure(finished.config, 2)
    (axes,) = figure.axes
    (placement,) = finished.config.placements
    assert [text.get_text() for text in axes.texts] == [size_of(placement)] == [str(placement.options["r"])]
    assert [round(text.get_position()[0]) for text in axes.texts] == placement.layers
    assert len(axes.patches) == 2


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A search of S4's space on a tiny BERT, as a YAML file, in a folder of its own."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}).save_pretrained(tmp_path / "model")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=11, **sizes)).save_pretrained(tmp_path / "model")
    rows = [f"{word} film,{label},{split}" for split in ("train", "test") for word, label in
            (("good", "yes"), ("bad", "no"), ("a good", "yes"), ("the bad", "no"))]  # fmt: skip
    (tmp_path / "rows.csv").write_text("\n".join(["text,label,split", *rows]), encoding="utf-8")
    task = {"data_files": "rows.csv", "split_column": "split", "train_split": "train", "eval_split": "test"}
    wanted = {
        "model": {"model_name_or_path": str(tmp_path / "model")},
        "tasks": {"films": task},
        "space": {"budget": 0.03, "num_groups": 1, "strategies": ["lora"]},
        "training": {"num_train_epochs": 1},
        "search": {"n_models": 1, "heartbeat": 1, "output_dir": "out"},
    }
    monkeypatch.chdir(tmp_path)
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(wanted, sort_keys=False), encoding="utf-8")
    return tmp_path / "search.yaml"


def run(*args):
    return CliRunner().invoke(app, ["search", *args])


def test_command(file):
    """A worker does the whole search and leaves config, report and table; the report can be made again."""
    done = run("--config", "search.yaml")
    assert done.exit_code == 0, done.output
    result = SearchResult.load("sqlite:///search.db", "s4")
    assert [decision.stage for decision in result.decisions][-1] == "S4 strategies of G1"
    for name in ("report.html", "runs.csv", "adapter_config.json"):
        assert (file.parent / "out" / name).exists()
    for decision in result.decisions:
        assert f"{decision.stage}  {decision.winner}" in done.output
    shown = json.loads(run("--config", "search.yaml", "--json").stdout)
    assert [one["winner"] for one in shown["decisions"]] == [decision.winner for decision in result.decisions]
    (file.parent / "out" / "report.html").unlink()
    assert run("report", "--config", "search.yaml").exit_code == 0
    assert (file.parent / "out" / "report.html").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("search.n_model=3", "`search.n_model` is not a key of `search`; did you mean `n_models`?"),
        ("search.n_models=0", "`n_models` (=0) must be a positive whole number."),
        ("search.n_models=many", "`search.n_models` (='many') must be int, not str."),
        ("training.learning_rate=-1", "`learning_rate` (=-1) must be a positive number."),
        ("tasks.films.metric=accuracies", "`metric` (='accuracies') must be one of accuracy, f1"),
        ("tasks.films.text_columns=x", "`tasks.films.text_columns` is not a key of `tasks.films`"),
        ("space.strategies=[loar]", "`strategies` (=['loar']) must hold"),
        ("spaces.budget=0.1", "`spaces` is not a section of a search"),
        ("search.storage=sqlite://", "`storage` (='sqlite://') must name a file"),
    ],
)
def test_errors_name_the_key(file, change, message):
    done = run("--config", "search.yaml", "--set", change)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert not (file.parent / "search.db").exists()


def test_errors_name_the_line(file):
    file.write_text(file.read_text(encoding="utf-8").replace("budget:", "bugdet:"), encoding="utf-8")
    done = run("--config", "search.yaml")
    assert "search.yaml, line 10: `space.bugdet` is not a key of `space`; did you mean `budget`?" in done.output


def test_report_of_nothing(file):
    done = run("report", "--config", "search.yaml")
    assert done.exit_code == 2
    assert "`storage` (='sqlite:///search.db') must name an existing file." in done.output
    assert not (file.parent / "search.db").exists()


WRONG = {
    "search.storage=sqlite:///broken.db": r"`search.storage` \(='sqlite:///broken.db'\) cannot be used: file is not a",
    "search.storage=sqlite:////proc/x.db": r"`storage` \(='sqlite:////proc/x.db'\) must (lie where|name an existing)",
    "search.output_dir=broken.db": r"`search.output_dir` \(='broken.db'\) must lie where files can be written",
    "space.budget=1e-7": r"`space` has no model for stage 'S0': .*budget",
    "lr=1": r"`lr` is not a section of a search .*; did you mean `training.learning_rate`\?",
    "training.epochs=1": r"`training.epochs` is not a key of `training`; did you mean `num_train_epochs`\?",
    "n_models=1": r"did you mean `search.n_models`\?",
}


@pytest.mark.parametrize("change", WRONG)
@pytest.mark.parametrize("command", [[], ["report"]], ids=["search", "report"])
def test_wrong_changes(command, change, file):
    """One line and exit code 2; a folder that takes no files does not hold the command up."""
    (file.parent / "broken.db").write_text("no database " * 100)
    done = run(*command, "--config", "search.yaml", "--set", change)
    assert done.exit_code == 2, done.output
    assert len(done.stderr.splitlines()) == 1
    wanted = "must name an existing file" if command and "budget" in change else WRONG[change]
    assert re.search(wanted, done.stderr), done.stderr


@pytest.mark.slow
def test_optuna_is_optional():
    """Without Optuna the package and its trainers import."""
    code = "import sys; sys.modules['optuna'] = None; import hf_peft_ext.cli, hf_peft_ext.trainers"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True).returncode == 0
