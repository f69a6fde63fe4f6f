"""The method that docs/add_a_method.md builds, by the tests that the page gives it."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "add_a_method.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
TESTS = re.findall(r"^def (test_\w+)\((.*)\):$", "".join(BLOCKS), flags=re.MULTILINE)


@pytest.fixture(scope="module")
def page():
    """The names that the blocks of the page define, one after the other."""
    names = {"__name__": "add_a_method"}
    for block in BLOCKS:
        exec(compile(block, PAGE.name, "exec"), names)
    return names


@pytest.mark.parametrize(("name", "fixture"), TESTS, ids=[name for name, _ in TESTS])
def test_of_the_page(page, name, fixture, request):
    """Runs a test of the page, whose asserts are on the page."""
    page[name](*([request.getfixturevalue(fixture)] if fixture else []))


def test_the_page_has_tests():
    assert len(TESTS) == 3
