"""The benchmarks run, on little."""

import csv
import importlib.util
import re
import sys
from pathlib import Path

import pytest

from .backbones import BACKBONES
from .test_training import tokenizer

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"


def run(name, *args):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up there
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *args])
        patch.setenv("COLUMNS", "120")
        spec.loader.exec_module(module)
        module.main()
    return module


def rows(text):
    """The cells of a table's rows, by their first cell."""
    lines = (line.split("│") for line in text.splitlines() if line.startswith("│"))
    return {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in lines}


def test_architectures(capsys):
    run("architectures", "--model_types", "gpt2", "t5", "mamba", "mixtral")
    printed = capsys.readouterr().out
    assert "UniPELT, mamba CAUSAL_LM: ValueError: Architecture 'mamba' has no attention" in printed
    found = rows(printed)
    assert found["CAUSAL_LM"] == ["2", "1", "3", "1", "3"]  # UniPELT, T-Few, LoRA with targets found, LoRA, built
    assert found["SEQ_CLS"] == ["3", "2", "3", "2", "3"]
    assert found["all"][4] == "7"


def test_intrinsic_step(capsys):
    small = ("--layers", "1", "--vocab", "99", "--batch", "1", "--length", "4", "--rounds", "1", "--d", "10")
    run("intrinsic_step", *small)
    found = rows(capsys.readouterr().out)
    assert list(found) == ["full fine-tuning", "LoRA", "intrinsic, d = 10", "intrinsic, d = 10, no embeddings"]
    assert found["intrinsic, d = 10"][0] == "10"
    assert found["LoRA"][3] == "1.00"


def test_speed(capsys):
    args = ("--rounds", "1", "--batch", "2", "--length", "16", "--threads", "1", "--methods", "UniPELT", "adapter")
    module = run("speed", *args)
    found = rows(capsys.readouterr().out)
    assert list(found) == [module.FULL, "UniPELT", "adapter"]
    assert found[module.FULL][1:3] == ["1.000", "1.000"]
    step_flops, forward_flops = (float(found["UniPELT"][i]) for i in (2, 5))
    assert 2 / 3 < step_flops < 0.8  # frozen weights need no gradient
    assert 1 < forward_flops < 1.1


def test_packing(capsys, tmp_path):
    """Packing costs what the token counts say, and its results are those of the plain way."""
    BACKBONES["llama"].build(vocab_size=1000).save_pretrained(tmp_path)
    sizes = ("--model", str(tmp_path), "--rounds", "1", "--threads", "1", "--prompt", "32", "--choices", "3")
    run("packing", *sizes, "--choice", "4")
    printed = capsys.readouterr().out
    found = rows(printed)
    assert list(found) == ["plain", "short head", "packed"]
    assert found["plain"][1:3] == ["1.000", "1.000"]
    packed, head_only = (float(found[name][2]) for name in ("packed", "short head"))
    assert packed < 44 / (3 * 36)  # fewer tokens, and fewer of them projected
    assert packed < head_only < 1
    assert float(found["packed"][-1]) < 0.6  # all ways keep the logits that predict choices
    assert "packed reads 0.407 of the tokens" in printed
    apart = re.search(r"differ by (\S+) in a log-probability and by\s+(\S+) of", printed)
    assert max(map(float, apart.groups())) < 1e-5


@pytest.mark.slow
def test_plug_in_memory(capsys, monkeypatch):
    """Each row in a process of its own; the factors are those of the peaks beside them."""
    monkeypatch.syspath_prepend(BENCHMARKS)  # where those processes look for it
    later = "bridge with ladder, later, large not held"
    names = ["full fine-tuning", "ladder, r = 8", "cutting", "bridge, large held", later, "MeZO"]
    module = run("plug_in_memory", "--model", "tiny", "--length", "16", "--methods", *names)
    found = rows(capsys.readouterr().out)
    assert list(found) == names
    trained = {name: float(cells[0]) for name, cells in found.items()}
    assert 0 < trained["ladder, r = 8"] < 0.2 * trained[module.FULL]
    assert trained["cutting"] == 0 < trained["MeZO"] < trained["bridge, large held"]
    assert trained[later] >= trained["bridge, large held"]  # the side_blocks, too few to show
    assert found[module.FULL][2] == "1.00"
    full, ladder = (int(found[name][1]) for name in names[:2])
    assert float(found["ladder, r = 8"][2]) == pytest.approx(full / ladder, rel=0.05)


def table(file):
    with file.open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.slow
def test_scale(capsys, monkeypatch, tmp_path):
    """All four costs, each beside LoRA's; memory in processes of their own."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = run("scale", "--quick", "--output", str(tmp_path))
    assert "A long forward pass, 64 tokens" in capsys.readouterr().out
    found = {part: table(tmp_path / f"scale_{part}.csv") for part in module.PARTS}
    assert [row["method"] for row in found["idle"]] == list(module.METHODS)
    assert [row["method"] for row in found["load"]] == list(module.METHODS)
    for row in found["load"]:
        ratio = float(row["load_adapter, s"]) / float(row["from_pretrained, s"])
        assert float(row["ratio"]) == pytest.approx(ratio)
    lora = next(row for row in found["length"] if row["method"] == module.LORA)
    assert (lora["time / LoRA"], lora["peak / LoRA"]) == ("1.0", "1.0")
    assert all(float(row["peak, MiB"]) > 0 for row in found["length"])
    assert float(found["help"][-1]["seconds"]) > 0
    assert "| prefix |" in (tmp_path / "scale_length.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_precisions(monkeypatch, tmp_path):
    """A method in each precision: the same first loss but for rounding, fewer bytes, and the saving in the note."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    BACKBONES["llama"].build(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    module = run("precisions", "--model", str(tmp_path / "model"), "--methods", "UniPELT", "--output", str(tmp_path))
    found = {row["precision"]: row for row in table(tmp_path / "precisions.csv")}
    assert list(found) == list(module.PRECISIONS)
    exact = float(found["float32"]["first loss"])
    for row in found.values():
        assert float(row["first loss"]) == pytest.approx(exact, rel=0.05)
        assert float(row["loss 5"]) < float(row["first loss"])
        assert float(row["step, s"]) > 0
    sizes = [float(found[name]["weights, MiB"]) for name in ("float32", "8-bit", "NF4", "NF4, double quantization")]
    assert sizes == sorted(sizes, reverse=True)
    assert "Double quantization saves 0." in (tmp_path / "precisions.md").read_text(encoding="utf-8")


def test_gpu_says_what_it_skips(capsys, monkeypatch, tmp_path):
    """Without a GPU every row says so, and no process is started."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    module = run("gpu", "--output", str(tmp_path))
    for name, part in module.PARTS.items():
        rows = table(tmp_path / f"{name}.csv")
        assert len(rows) == sum(map(len, part.jobs.values())) > 0
        assert {row["error"] for row in rows} == {module.NO_CUDA}
    assert [row["part"] for row in table(tmp_path / "seconds.csv")] == [*module.PARTS, "all"]


@pytest.mark.slow
def test_gpu_prefix_part(monkeypatch, tmp_path):
    """One part end to end in its own process: prefix attention is the one written out, and bf16 costs it no more."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    run("gpu", "--smoke", "--parts", "prefix", "--output", str(tmp_path))
    rows = [row for row in table(tmp_path / "prefix.csv") if "this version of" not in row.get("error", "")]
    assert len(rows) >= 7  # transformers 5.15 has T5's attention in T5
    for row in rows:
        assert float(row["prefix moves by"]) > 0.01
        assert max(float(row["float32"]), float(row["float32, gradient"])) < 1e-5
        assert float(row["bf16"]) < 2 * float(row["bf16 without prefix"])


def test_gpu_failures_cost_one_row(monkeypatch, tmp_path):
    """A process that dies is followed by another for the rows behind; what is over when the time is says so."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("gpu")
    args = module.Arguments(parts=["speed"], smoke=True, output=tmp_path)
    started = module.Run(args, tmp_path)
    calls = []

    def process(name, job, names):
        calls.append(names)
        return ({}, "ended by SIGSEGV") if names[0] == "b" else ({names[0]: {"ms": 1.0}}, "")

    monkeypatch.setattr(started, "process", process)
    rows = started.job("speed", module.PARTS["speed"], "x", ["a", "b", "c"])
    assert calls == [["a", "b", "c"], ["b", "c"], ["c"]]
    assert [row.get("error") for row in rows] == [None, "ended by SIGSEGV", None]
    started.end = 0.0
    assert started.job("speed", module.PARTS["speed"], "x", ["a"])[0]["error"] == module.OUT_OF_TIME


@pytest.mark.slow
def test_gpu_smoke(monkeypatch, tmp_path):
    """All parts run on the CPU with tiny models, but for what needs CUDA."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = run("gpu", "--smoke", "--minutes", "9", "--output", str(tmp_path))
    for name in module.PARTS:
        errors = {row.get("error") or "" for row in table(tmp_path / f"{name}.csv")}
        assert {e for e in errors if "this version of transformers" not in e} <= {"", module.NO_CUDA}, name
    reloaded = "reloaded, they differ by"
    assert all(float(row[reloaded]) == 0 for row in table(tmp_path / "nf4.csv"))
    assert {row["peak, GiB"] for row in table(tmp_path / "memory.csv")} == {module.NO_CUDA}
