"""The package as a whole, against what pyproject.toml, the README, the table of papers and peft's enum say of it."""

import importlib
import re
import runpy
import sys
from enum import Enum
from pathlib import Path
from types import MappingProxyType

import pytest
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.peft_types import PeftType

import hf_peft_ext
from hf_peft_ext import registry
from hf_peft_ext.attach.config import RegisteredConfig
from hf_peft_ext.papers import PAPERS, STOCK_PAPERS

ROOT, PACKAGE = Path(__file__).parents[1], Path(hf_peft_ext.__file__).parent  # which may be installed elsewhere
CONFIGS = [
    value
    for name, value in vars(hf_peft_ext).items()
    if name.endswith("Config") and isinstance(value, type) and issubclass(value, RegisteredConfig)
]
every_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)


README = (ROOT / "README.md").read_text(encoding="utf-8")
with_tomllib = pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")


@pytest.fixture
def pyproject():
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@with_tomllib
def test_packages_are_listed(pyproject):
    """`packages` names every folder that has an __init__.py or data, and nothing else."""
    setuptools = pyproject["tool"]["setuptools"]
    # the symlinks by name: not every Python's glob walks into them
    files = [*PACKAGE.glob("__init__.py"), *PACKAGE.glob("*/__init__.py"), *PACKAGE.glob("*/*/__init__.py")]
    folders = {file.parent.relative_to(PACKAGE.parent).as_posix().replace("/", ".") for file in files}
    folders |= {name for name, place in setuptools["package-dir"].items() if (ROOT / place).is_dir()}  # of an sdist
    assert set(setuptools["packages"]) == folders | {"hf_peft_ext.prompts.tasks", "hf_peft_ext_cli"}


@with_tomllib
def test_table_of_extras(pyproject):
    """The README's table has every extra, and what it installs."""
    table = re.search(r"\| extra \|.*?\n\n", README, flags=re.DOTALL)
    rows = re.findall(r"^\| `\[(\w+)\]` \| .* \| (.*) \|$", table[0], flags=re.MULTILINE)
    for name, cell in rows:
        wanted = set()
        for text in pyproject["project"]["optional-dependencies"][name]:
            package, extras = re.match(r"([\w-]+)(?:\[([\w,]+)\])?", text).groups()
            wanted |= {f"[{extra}]" for extra in extras.split(",")} if package == "hf_peft_ext" else {package}
        assert set(re.findall(r"`(.*?)`", cell)) == wanted, name
    assert [name for name, _ in rows] == list(pyproject["project"]["optional-dependencies"])


@with_tomllib
def test_links(pyproject):
    """Links hold on a package index too: they are absolute, and those into the repository lead to files."""
    here = pyproject["project"]["urls"]["Homepage"]
    for target in re.findall(r"\]\(([^)]*)\)", re.sub(r"```.*?```", "", README, flags=re.DOTALL)):
        assert target.startswith(("https://", "#")), target
        if target.startswith(f"{here}/"):
            path = re.fullmatch(r"/(?:blob|tree)/main/([^#]*)(?:#.*)?", target.removeprefix(here))
            assert path, target
            assert (ROOT / path[1]).exists(), target


@with_tomllib
def test_no_version_that_was_never_run():
    """Both ends of each range in pyproject.toml were run."""
    assert versions()["check"]() == []


@with_tomllib
@pytest.mark.parametrize(
    ("requirement", "said"),
    [
        ("peft>=0.21,<0.22", []),
        ("peft>=0.21,<0.23", ["upper"]),
        ("peft>=0.20,<0.22", ["lower"]),
        ("peft>=0.21", ["upper"]),
        ("peft>=0.22,<0.24", ["lower", "upper"]),
        ("peft<1", ["lower"]),
        ("peft", ["lower", "upper"]),
        ("optuna>=4.9,<6", []),
        ("optuna>=4.9,<7", ["upper"]),
        ("unheard>=1,<2", ["lower", "upper"]),
    ],
)
def test_ranges_beyond_what_was_run(requirement, said):
    """A minor, or a major where the range counts those, that nobody ran is noticed at either end."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    wanted = Requirement(requirement)
    run = {"peft": ["0.21.0", "0.21.2"], "optuna": ["4.9.0", "5.0.1"]}.get(wanted.name, [])
    found = versions()["untested"](wanted, list(map(Version, run)))
    assert [text.partition("its ")[2].partition(" end")[0] for text in found] == said


def versions():
    return runpy.run_path(str(ROOT / "tools" / "versions.py"))


def test_constraints_hold_on_any_machine():
    """Pins alone, without local versions; with a marker where a package has left the oldest Python behind."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(
        re.fullmatch(r"[a-z0-9-]+==[0-9.]+(post\d+)?( ; python_version >= \"3\.\d+\")?", line) for line in lines
    )
    assert {"torch", "peft", "transformers", "datasets", "trl", "optuna", "huggingface-hub"} <= {
        line.partition("==")[0] for line in lines
    }


@pytest.mark.parametrize("name", ["hub_cards", "trainers"])
def test_top_level_folders_are_part_of_the_package(name):
    """`trainers/` and `hub_cards/` import as parts of hf_peft_ext, whether installed or from a bare checkout."""
    found = importlib.import_module(f"hf_peft_ext.{name}")
    assert Path(found.__file__).resolve() in (place / name / "__init__.py" for place in (ROOT, PACKAGE))


def test_is_typed():
    """py.typed lies in the package, so that type checkers read its annotations."""
    assert (PACKAGE / "py.typed").is_file()


def test_has_a_version():
    """The version is the installed distribution's."""
    assert hf_peft_ext.__version__.split(".")[0].isdigit()


def test_papers_cover_the_methods():
    """Every method has its entry among the papers, and every entry is a method."""
    assert len(CONFIGS) >= 6
    assert {config.method for config in CONFIGS} == PAPERS.keys()
    assert STOCK_PAPERS[hf_peft_ext.TFewConfig().peft_type.lower()]  # a type of peft's own
    for papers in (*PAPERS.values(), *STOCK_PAPERS.values()):
        for paper in papers:
            assert paper.url.startswith("https://arxiv.org/abs/" if paper.arxiv else "https://aclanthology.org/")
            assert paper.title in paper.bibtex
            assert paper.arxiv in paper.bibtex


@every_config
def test_one_enum_member_a_method(config):
    """Each method is one member of peft's PeftType, equal by name, by value and by every table of the enum."""
    name = config.method.upper()
    assert list(PeftType.__members__).count(name) == PeftType._member_names_.count(name) == 1
    assert [member.value for member in PeftType].count(name) == 1
    assert PeftType(name) is PeftType[name] is getattr(PeftType, name)
    assert PeftType[name] == name
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[name]].__qualname__ == config.__qualname__


def test_importing_again_is_harmless():
    """Reloading the tuners registers nothing twice and changes no member or table."""
    members, table = dict(PeftType.__members__), dict(PEFT_TYPE_TO_CONFIG_MAPPING)
    importlib.reload(sys.modules["hf_peft_ext.tuners"])
    assert dict(PeftType.__members__) == members
    assert all(PeftType[name] is member for name, member in members.items())
    assert table == PEFT_TYPE_TO_CONFIG_MAPPING


def test_a_name_taken_by_another_package_is_refused():
    """A second package's config under our name is an error that names the first."""

    class UniPELTConfig(PeftConfig):
        pass

    with pytest.raises(RuntimeError, match=r"`name` \(='unipelt'\) is already a PEFT type, registered by hf_peft_ext"):
        registry.register("unipelt", UniPELTConfig, hf_peft_ext.ComposedModel)


class Silent(dict):
    """A table that keeps what it has."""

    def __setitem__(self, key, value):
        pass


@pytest.mark.parametrize("closed", [Silent, MappingProxyType])
def test_a_peft_that_closes_the_door_is_noticed(monkeypatch, closed):
    """Where the enum takes no new values, add_member says so instead of going on with half a member."""

    class Closed(str, Enum):
        LORA = "LORA"

    monkeypatch.setattr(Closed, "_value2member_map_", closed(Closed._value2member_map_))
    monkeypatch.setattr(registry, "PeftType", Closed)
    with pytest.raises(RuntimeError, match="cannot become a PeftType in this peft"):
        registry.add_member("NOVEL")
