"""The one type checker of config files and recipes, against values by hand; suggestions for wrong names; Hub ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from peft import TaskType

from hf_peft_ext import UniPELTConfig
from hf_peft_ext.validation.checks import is_hub_id
from hf_peft_ext.validation.config_schema import fits
from hf_peft_ext.validation.suggestions import did_you_mean, nearest


@dataclass
class Point:
    x: float
    names: list[str] | None = None


FITS = [
    (3, int), (3, float), (0.5, float), (True, bool), (None, int | None), ("a", Literal["a", "b"]), ([], list[int]),
    ([1, 2.5], list[float]), ([1, "a"], tuple[int, str]), (["a"], Sequence[str]), ({"a": 1}, dict[str, float]),
    ({"x": 1}, Point), ({"x": 1, "names": ["a"]}, Point), ("SEQ_CLS", TaskType), ({"anything": [1]}, Any),
    ({"a": [1]}, dict), ([{"x": 1}], list[Point] | None), ("all", list[str] | str),
]  # fmt: skip
DOES_NOT_FIT = [
    (True, int), (True, float), (1, bool), ("1", int), (1.0, int), (None, int), ("c", Literal["a", "b"]),
    (1, Literal[True]), ("ab", Sequence[str]), ("ab", list[str]), ([True], list[float]), ([1], tuple[int, str]),
    ([1, 2], tuple[int, str]), ({"a": "1"}, dict[str, float]), ({"x": 1, "y": 2}, Point), ({"x": "1"}, Point),
    ([1], Point), ("SEQ_CLASS", TaskType), (["SEQ_CLS"], TaskType), (3, "int"), ("ab", list),
    ([{"z": 1}], list[Point]),
]  # fmt: skip


@pytest.mark.parametrize(("value", "hint"), FITS)
def test_values_that_fit(value, hint):
    assert fits(value, hint)


@pytest.mark.parametrize(("value", "hint"), DOES_NOT_FIT)
def test_values_that_do_not_fit(value, hint):
    assert not fits(value, hint)


def test_suggestions():
    """Similar names, and common words for an argument; nothing if no name is near."""
    assert nearest("epochs", ["seed", "num_train_epochs"]) == "num_train_epochs"
    assert did_you_mean("sede", ["seed", "r"], "training.") == "; did you mean `training.seed`?"
    assert did_you_mean("xyz", ["seed"]) == ""
    with pytest.raises(ValueError, match=r"^`rank` \(=4\) is not a field of UniPELTConfig; did you mean `r`\?"):
        UniPELTConfig(rank=4)


def test_hub_ids():
    assert all(map(is_hub_id, ("user/name", "name")))
    assert not any(map(is_hub_id, ("", "a/b/c", "/absolute", "../up", "a--b/c", None, 3)))
