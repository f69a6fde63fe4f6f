"""The package as a whole, against what pyproject.toml, the table of papers and peft's enum say of it."""

import importlib
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
from hf_peft_ext.papers import PAPERS, STOCK_PAPERS
from hf_peft_ext.tuners.config import RegisteredConfig

ROOT = Path(hf_peft_ext.__file__).parent
CONFIGS = [
    value
    for name, value in vars(hf_peft_ext).items()
    if name.endswith("Config") and isinstance(value, type) and issubclass(value, RegisteredConfig)
]
every_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_packages_are_listed():
    """`packages` names every folder that has an __init__.py, and nothing else."""
    import tomllib

    pyproject = tomllib.loads((ROOT.parent / "pyproject.toml").read_text(encoding="utf-8"))
    # the symlinks by name: not every Python's glob walks into them
    files = [*ROOT.glob("__init__.py"), *ROOT.glob("*/__init__.py"), *ROOT.glob("*/*/__init__.py")]
    folders = {file.parent.relative_to(ROOT.parent).as_posix() for file in files}
    assert set(pyproject["tool"]["setuptools"]["packages"]) == {folder.replace("/", ".") for folder in folders}


@pytest.mark.parametrize("name", ["hub_cards", "trainers"])
def test_top_level_folders_are_part_of_the_package(name):
    """`trainers/` and `hub_cards/` import as parts of hf_peft_ext, whether installed or from a bare checkout."""
    found = importlib.import_module(f"hf_peft_ext.{name}")
    assert Path(found.__file__).resolve() == ROOT.parent / name / "__init__.py"


def test_is_typed():
    """py.typed lies in the package, so that type checkers read its annotations."""
    assert (ROOT / "py.typed").is_file()


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
            assert paper.url.startswith("https://arxiv.org/abs/")
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
