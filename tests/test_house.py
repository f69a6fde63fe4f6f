"""What must stay so in the source code, measured by tools/house.py; and the measures themselves, on a package of four
modules.
"""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tools" / "house.py"
House = runpy.run_path(str(SCRIPT))["House"]

DOCUMENTED = 95  # percent of the public functions, classes and methods
# Names that several modules may define: loggers; `checked_loading` extends a method of PeftModel by its name.
ALIKE = {"logger", "load_adapter"}


@pytest.fixture(scope="module")
def house():
    if not (ROOT / "hf_peft_ext").is_dir():
        pytest.skip("the sources are not beside the tests")
    return House()


def test_no_import_cycles(house):
    """Not even with the imports inside functions and those for type checkers."""
    assert house.cycles(everywhere=True) == []


def test_modules_and_functions_are_short(house):
    """At most 300 lines a module, 60 a function, and every signature has types."""
    assert [m.name for m in house.modules.values() if len(m.text.splitlines()) > 300] == []
    assert [str(f) for f in house.functions if f.lines > 60] == []
    assert [str(f) for f in house.functions if not f.is_typed] == []


def test_public_names_have_docstrings(house):
    """The share of public functions, classes and methods with a docstring."""
    missing, public = house.without_docstring(), house.public()
    share = 100 * (1 - len(missing) / len(public))
    assert share >= DOCUMENTED, "without a docstring: " + ", ".join(map(str, missing))


@pytest.mark.parametrize("constants", [False, True], ids=["functions and classes", "constants"])
def test_no_two_public_names_are_alike(house, constants):
    """One name means one thing; importing it from another module is no definition."""
    alike = house.names_alike(constants)
    assert {name: modules for name, modules in alike.items() if name not in ALIKE} == {}


FILES = {
    "__init__.py": "from hf_peft_ext.low.a import f as f\n",
    "low/__init__.py": "",
    "low/a.py": '''"""A."""
LIMIT: int = 1
_HIDDEN = 2

def f(x: int, *rest: int) -> int:
    """Twice.

    Raises:
        ValueError: it is negative.
    """
    if x < 0 or x > 9:
        raise ValueError
    return sum(y for y in (x, x) if y)

class Base:
    """Base."""
    def run(self) -> None:
        """Run."""

    def _hidden(self): ...
''',
    "low/b.py": '''"""B."""
from . import a
from .a import Base

LIMIT = 2

class Child(Base):
    def run(self) -> None:
        def f(): ...

    def more(self, x): ...

def f() -> None:
    from ..high.c import go
''',
    "high/__init__.py": "",
    "high/c.py": '''"""C."""
import hf_peft_ext.low.b

def go() -> None:
    """Go."""
    a = 1
    b = 2
    c = 3
    # d
    d = 4

    e = 5
    f = 6
''',
}


@pytest.fixture
def small(tmp_path):
    """A checkout with two rooms below the package and one at the top level."""
    files = {f"hf_peft_ext/{name}": text for name, text in FILES.items()}
    files["hub_cards/d.py"] = FILES["high/c.py"].replace("hf_peft_ext.low.b", "os")
    files["trainers/__init__.py"] = ""
    files["tests/test_a.py"] = "# a comment\n\nassert True\n"
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return House(tmp_path)


def test_imports_of_a_small_package(small):
    """Arrows between rooms; a cycle through an import inside a function counts only if asked for."""
    assert small.arrows() == {("hf_peft_ext", "low"), ("high", "low"), ("low", "high")}
    assert small.imports()["hf_peft_ext.low.b"] == {"hf_peft_ext.low.a"}
    assert small.cycles() == []
    assert small.cycles(everywhere=True) == [["hf_peft_ext.high.c", "hf_peft_ext.low.b"]]


def test_names_and_docstrings_of_a_small_package(small):
    """Local functions, names with an underscore and overriding methods are left out."""
    assert small.names_alike() == {
        "f": ["hf_peft_ext.low.a", "hf_peft_ext.low.b"],
        "go": ["hf_peft_ext.high.c", "hf_peft_ext.hub_cards.d"],
    }
    assert small.names_alike(constants=True) == {"LIMIT": ["hf_peft_ext.low.a", "hf_peft_ext.low.b"]}
    without = [str(d).removeprefix("hf_peft_ext.low.b.") for d in small.without_docstring()]
    assert without == ["Child", "Child.more", "f"]
    assert len(small.public()) == 8


def test_sizes_of_a_small_package(small):
    """Lines without docstrings, complexity, types, duplicated lines."""
    functions = {str(f).removeprefix("hf_peft_ext.low."): f for f in small.functions}
    assert functions["a.f"].lines == 4
    assert functions["a.f"].complexity == 5  # one, `if`, `or`, the comprehension and its condition
    assert {name for name, f in functions.items() if not f.is_typed} == {
        "a.Base._hidden",
        "b.Child.run.f",
        "b.Child.more",
    }
    assert small.duplicated() == 2 * 7
    measures = small.measures()
    assert measures["with Raises"] == "12.5 %"
    assert measures["lines of code of the tests"] == 1
    assert (measures["folders"], measures["rooms"], measures["modules"]) == (5, 5, 8)


def test_command(small):
    """A table, or JSON with where the measures come from."""
    command = [sys.executable, str(SCRIPT), "--root", str(small.root)]
    table, data = (
        subprocess.run([*command, *options], capture_output=True, text=True, check=True).stdout
        for options in ((), ("--json",))
    )
    measures = json.loads(data)["measures"]
    assert measures == small.measures()
    rows = dict(line.strip("| ").split(" | ") for line in table.splitlines()[2:])
    assert rows == {name: str(value) for name, value in measures.items()}
