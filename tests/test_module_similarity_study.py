"""The study of how alike modules are, on what the plug-in study leaves of a tiny pair: comparisons whose modules are
missing wait for them, a module is itself where both models have its layer, and the table is as by hand.
"""

import csv
import sys

import pytest

from . import test_plug_in_study as plugging

study, encoder = plugging.study, plugging.encoder


@pytest.fixture
def alike(study, monkeypatch):
    monkeypatch.delitem(sys.modules, "module_similarity", raising=False)
    import module_similarity

    return module_similarity


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = ['{"text": "good film the plot", "label": 1}', '{"text": "a bad plot", "label": 0}'] * 10
    rows += ['{"text": "the a film bad good", "label": 1}', '{"text": "plot film the a a the", "label": 0}'] * 5
    for task in ("sst2", "trec"):
        for split in ("train", "dev"):
            (folder / f"{task}.{split}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


def test_comparisons(study, alike, tmp_path, data, encoder):
    trained, output = tmp_path / "output", tmp_path / "alike"
    which = ["--tasks", "sst2", "trec", "--seeds", "0", "1"]
    plugging.start(study, tmp_path, data, encoder, *which, "--conditions", "small", "peft")

    def compared():
        options = [*which, "--trained", str(trained), "--data", str(data), "--output", str(output), "--draws", "1"]
        alike.main(*alike.HfArgumentParser(alike.Study).parse_args_into_dataclasses(options))
        with (output / "runs.csv").open(encoding="utf-8") as file:
            return list(csv.DictReader(file))

    later = trained / "modules" / "trec-1" / "peft-lora"
    later.rename(tmp_path / "later")
    first = compared()
    assert ("trec", "1", "pair") not in {(row["task"], row["seed"], row["comparison"]) for row in first}
    (tmp_path / "later").rename(later)
    found = compared()
    assert found[: len(first)] == first
    by = {(row["task"], row["seed"], row["comparison"], row["layer"]): row for row in found}
    assert len(found) == len(by) == 2 * 2 * 6 * 2  # tasks, seeds, comparisons, layers
    for task in ("sst2", "trec"):
        assert float(by[task, "0", "plugged", "0"]["cosine"]) == pytest.approx(1, abs=1e-3)
        assert abs(float(by[task, "0", "plugged", "1"]["cosine"])) < 0.9  # a layer that the small model has not
        for layer in "01":
            one, other = (by[task, seed, "seeds", layer]["cosine"] for seed in "01")
            assert float(one) == pytest.approx(float(other), abs=1e-3)  # whichever of two seeds is the first
    assert (output / "figure.png").stat().st_size > 0
    assert "| minilm | pair, other task |" in (output / "table.md").read_text(encoding="utf-8")


def test_table(alike):
    """Means over layers, then over runs; a comparison that has none yet says so."""
    rows = [
        {"models": "minilm", "task": "sst2", "seed": str(seed), "comparison": "pair", "layer": str(layer),
         "cosine": str(value), "cka": "0.5", "untrained cosine": "0", "untrained cka": "0.25"}
        for seed, values in enumerate([(0.1, 0.3), (0.3, 0.5)]) for layer, value in enumerate(values)
    ]  # fmt: skip
    lines = alike.table(rows).splitlines()
    assert lines[0] == "| models | comparison | sst2 | all | untrained |"
    cell = "0.30 ± 0.14 / 0.50 ± 0.00"
    assert lines[2 + list(alike.COMPARISONS).index("pair")] == (
        f"| minilm | pair | {cell} | {cell} | 0.00 ± 0.00 / 0.25 ± 0.00 |"
    )
    assert "| minilm | seeds | - / - | - / - | - / - |" in lines


def test_needs_something_to_compare_with(alike, tmp_path):
    with pytest.raises(
        SystemExit, match=r"`tasks` \(=\['sst2'\]\) must be at least two, to compare one with another\."
    ):
        alike.main(alike.Study(trained=tmp_path, tasks=["sst2"]))
