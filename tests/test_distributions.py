"""The sdist and the wheel: what is in them, and the sdist's tests run on the installed wheel."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDED = [
    *("Makefile", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md", "constraints.txt", "pyproject.toml"),
    *(".ci/run", "tools/versions.py", "tools/tested_versions.txt", "hf_peft_ext_cli/app.py"),
    *("tests/conftest.py", "tests/backbones.py", "tests/hub_server.py", "tests/adapterhub/bert.zip"),
    *("hf_peft_ext/search/report.html.jinja", "hub_cards/card.md.jinja", "hf_peft_ext/prompts/tasks/boolq.yaml"),
    *("examples/01_unipelt.py", "examples/data/support_messages.csv", "examples/recipes/unipelt.yaml"),
]
TESTS = [
    "test_packaging.py",
    "test_readme.py",
    "test_cli.py",
    "test_prompts.py",
    "test_losses.py",
    "test_sublayers.py",
]


def run(*command, cwd, **variables):
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONWARNINGS")}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env={**environment, "OMP_NUM_THREADS": "1", **variables},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=550, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The unpacked sdist, and the wheel that was built from it."""
    pytest.importorskip("setuptools", "77")
    place = tmp_path_factory.mktemp("built")
    backend = "import sys; from setuptools import build_meta; build_meta.build_{}(sys.argv[1])"
    said = run("-c", backend.format("sdist"), place, cwd=ROOT)
    with tarfile.open(next(place.glob("*.tar.gz"))) as archive:
        archive.extractall(place, filter="data")
    unpacked = next(path for path in place.iterdir() if path.is_dir())
    said += run("-c", backend.format("wheel"), place, cwd=unpacked)
    assert "absent from the `packages`" not in said
    assert "Deprecat" not in said
    return unpacked, next(place.glob("*.whl"))


@pytest.mark.slow
def test_contents(built):
    """The sdist has what `make test`, `make demo` and `make train` need; the wheel has the package and its data."""
    unpacked, wheel = built
    assert [name for name in NEEDED if not (unpacked / name).is_file()] == []
    assert {file.name for file in (ROOT / "tests").glob("*.py")} == {f.name for f in (unpacked / "tests").glob("*.py")}
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"hf_peft_ext", "hf_peft_ext_cli"}
    data = {name for name in names if not name.endswith(".py") and "dist-info" not in name}
    tasks = {f"hf_peft_ext/prompts/tasks/{file.name}" for file in (ROOT / "hf_peft_ext/prompts/tasks").glob("*.yaml")}
    pages = ("hub_cards/card.md.jinja", "search/report.html.jinja", "compare/compare.html.jinja")
    templates = {f"hf_peft_ext/{page}" for page in pages}
    tables = {"hf_peft_ext/hub_cards/hub_values.yaml", "hf_peft_ext/papers.bib"}
    tables |= {"hf_peft_ext/catalogue/methods.yaml", "hf_peft_ext/catalogue/measured.json"}
    assert data == tasks | templates | tables | {"hf_peft_ext/py.typed"}
    for folder in ("trainers", "hub_cards"):
        sources = {file.relative_to(ROOT).as_posix() for file in (ROOT / folder).rglob("*.py")}
        assert {f"hf_peft_ext/{name}" for name in sources} <= {*names}
    metadata = zipfile.ZipFile(wheel).read(next(name for name in names if name.endswith("METADATA"))).decode()
    for words in ("T-Few", "S4", "ladder", "plug-in"):
        assert words in metadata.partition("Keywords")[0], words
    assert "Project-URL: Homepage, https://" in metadata
    assert "Author: " in metadata


@pytest.mark.slow
def test_tests_of_the_sdist_pass_on_the_wheel(built, tmp_path):
    """Installed elsewhere, without the sources beside the tests."""
    unpacked, wheel = built
    run("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", tmp_path / "site", wheel, cwd=tmp_path)
    for name in ("hf_peft_ext", "trainers", "hub_cards", "hf_peft_ext_cli"):
        (unpacked / name).rename(tmp_path / name)
    path = {"PYTHONPATH": str(tmp_path / "site")}
    where = run(
        "-c", "import hf_peft_ext, hf_peft_ext_cli as c; print(c.__file__, hf_peft_ext.__file__)", cwd=unpacked, **path
    )
    assert all(Path(file).is_relative_to(tmp_path / "site") for file in where.split()), where
    said = run("-m", "pytest", "-q", "-m", "not slow", *(f"tests/{name}" for name in TESTS), cwd=unpacked, **path)
    assert " passed" in said
    assert "hf_peft_ext " in run("-m", "hf_peft_ext.cli", "--version", cwd=tmp_path / "site", **path)
