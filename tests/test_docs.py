"""The README and the pages of docs/: their code runs and prints the output that they show; their links resolve.

The blocks of a page run in order, in one namespace and an empty folder that holds `examples`. Where a fence without a
language directly follows a block, its lines must be printed by the block, in this order, whatever their numbers are.
"""

import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

from .adapterhub.families import build

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [
    page for page in sorted(DOCS.rglob("*.md")) if not {"_build", "notebooks"} & {*page.relative_to(DOCS).parts[:-1]}
]
LINKED = [README, ROOT / "CONTRIBUTING.md", *PAGES, *sorted((ROOT / "examples").rglob("*.md"))]
REPOSITORY = re.compile(r"https://github\.com/hf-peft-ext/hf_peft_ext/(?:blob|tree)/main/")
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```\n(.*?)^```\n)?", flags=re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A block of code and the output that is shown below it."""

    code: str
    shown: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(m[1], m[2] or "", text.count("\n", 0, m.start()) + 1) for m in BLOCK.finditer(text)]


def cases() -> list:
    """The blocks of the README one by one, those of a page of docs/ together."""
    groups = [(f"README.md:{block.line}", README, [block]) for block in blocks(README)]
    groups += [(str(page.relative_to(ROOT)), page, found) for page in PAGES if (found := blocks(page))]
    return [
        pytest.param(page, found, id=name, marks=[pytest.mark.slow] if is_slow(found) else [])
        for name, page, found in groups
    ]


def is_slow(found: list[Block]) -> bool:
    """Whether the code trains on real data."""
    code = "".join(block.code for block in found)
    return "load_dataset(" in code and ".train()" in code


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder with the repository's examples."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


# 2026-11: Trainer's data loader asks for pinned memory wherever it runs
@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
@pytest.mark.filterwarnings("ignore:ReLoRA has changed the base weights:UserWarning")
@pytest.mark.parametrize(("page", "found"), cases())
def test_code_runs(page, found, place, capsys):
    if any("from_adapterhub(" in block.code for block in found):
        build("bert").save_pretrained("my_model")
        with zipfile.ZipFile(ROOT / "tests" / "adapterhub" / "bert.zip") as archive:
            archive.extractall()
        Path("unipelt").rename("my_adapter")
        with zipfile.ZipFile(ROOT / "tests" / "adapterhub" / "heads.zip") as archive:
            archive.extractall()
        Path("bert-classification").rename("my_classifier")
    namespace = {"__name__": "page"}
    for block in found:
        source = "\n" * block.line + block.code  # so that a traceback has the page's line
        exec(compile(source, str(page), "exec"), namespace)
        printed = iter(plain(capsys.readouterr().out))
        for line in plain(block.shown):
            assert line in printed, f"{page.name}, below line {block.line}: not printed: {line}"


def plain(text: str) -> list[str]:
    """The lines of an output, without what differs between machines and versions: numbers, and spaces."""
    return [re.sub(r"-?\d+(\.\d+)?(e[-+]?\d+)?", "0", " ".join(line.split())) for line in text.splitlines() if line]


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page):
    """Links into the repository lead to files and headings, tables of contents to pages, inclusions to files."""
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]*)\)", prose):
        path, _, heading = REPOSITORY.sub("", target).partition("#")
        if path.startswith(("https://", "http://")):
            continue
        folder = ROOT if REPOSITORY.match(target) else page.parent
        other = (folder / path).resolve() if path else page
        assert other.exists(), target
        assert not heading or heading in headings(other), target
    for body in re.findall(r"^```\{toctree\}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        for entry in filter(None, body.splitlines()):
            if not entry.startswith(":") and "*" not in entry:
                assert any((page.parent / f"{entry}{ending}").is_file() for ending in (".md", ".rst")), entry
    for target in re.findall(r"^```\{(?:literal)?include\} (.*)$", text, flags=re.MULTILINE):
        assert (page.parent / target).is_file(), target


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub and MyST make them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 250


def test_every_page_is_in_the_contents():
    """Each page is reached from docs/index.md, through tables of contents."""
    listed, waiting = set(), [DOCS / "index.md"]
    while waiting:
        page = waiting.pop()
        listed.add(page)
        bodies = re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
        entries = (entry for body in bodies for entry in body.splitlines() if entry and not entry.startswith(":"))
        waiting += [path for entry in entries for path in page.parent.glob(f"{entry}.md") if path not in listed]
    assert {*PAGES} - listed == set()


@pytest.mark.slow
def test_build(tmp_path):
    """Sphinx builds the pages without a warning: no dead reference, no public name without a docstring."""
    for package in ("sphinx", "furo", "myst_nb"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stderr
