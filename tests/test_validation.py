"""Suggestions for wrong names, Hub ids, and the parts of the type checker that JSON's own types do not show."""

from dataclasses import dataclass

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


def test_types_inside_types():
    """Whole numbers for floats and enums' values at any depth; an annotation that is not resolved fits nothing."""
    assert fits([{"x": 1, "names": ["a"]}], list[Point] | None)
    assert not fits([{"x": 1, "names": "a"}], list[Point] | None)
    assert fits({"a": ["SEQ_CLS", 1, 2.5]}, dict[str, list[TaskType | float]])
    assert not fits({"a": ["SEQ_CLASS"]}, dict[str, list[TaskType | float]])
    assert not fits(3, "int")


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
