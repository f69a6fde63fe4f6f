"""Every limit of safe loading from both sides: what is exactly at the limit passes, one more is refused."""

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import pytest
import torch
from peft import LoraConfig, OFTConfig, TrainableTokensConfig
from safetensors.torch import save_file

from hf_peft_ext.loading import expected_tensors, weights
from hf_peft_ext.loading.config import read_config
from hf_peft_ext.validation import config_schema as schema

from .backbones import BACKBONES, VOCAB

QV = {"target_modules": ["q_proj", "v_proj"]}


def nested(depth: int) -> list:
    """A list in lists: `depth` levels."""
    value: list = []
    for _ in range(depth - 1):
        value = [value]
    return value


SIZES = [
    (2**20, 2**20 + 1),
    (-(2**20), -(2**20) - 1),
    (1048576.0, 1048576.5),
    (0.0, math.nan),
    (0.0, math.inf),
    ("a" * 2**15, "a" * (2**15 + 1)),
    ([0] * 2**12, [0] * (2**12 + 1)),
    ({str(i): 0 for i in range(2**12)}, {str(i): 0 for i in range(2**12 + 1)}),
    ({"a" * 2**15: 0}, {"a" * (2**15 + 1): 0}),
    ({"a": [2**20]}, {"a": [2**20 + 1]}),
    (nested(5), nested(6)),
]


@pytest.mark.parametrize(("largest", "larger"), SIZES, ids=[str(i) for i in range(len(SIZES))])
def test_sizes_of_values(largest, larger):
    schema.check_size("field", largest)
    with pytest.raises(ValueError, match=r"`field` \(=.*\) must (be a finite number of|have) at most"):
        schema.check_size("field", larger)


def test_size_of_a_file(tmp_path):
    path = tmp_path / "config.json"
    for extra in (0, 1):
        path.write_text(json.dumps({"a": ""}).replace('""', '"' + "b" * (2**18 - 9 + extra) + '"'))
        assert path.stat().st_size == 2**18 + extra
        if extra:
            with pytest.raises(ValueError, match="is longer than 262144 bytes"):
                schema.read_json(path)
        else:
            assert list(schema.read_json(path)) == ["a"]


PASSED = [
    {"modules_to_save": [f"x{i}" for i in range(64)]},
    {"modules_to_save": ["a" * 256]},
    {"modules_to_save": ["", "a.b-c_0"]},
    {"layers_pattern": "a" * 256},
    {"lora_dropout": 0},
    {"lora_dropout": 0.999},
    {"lora_alpha": 0.5},
    {"runtime_config": {"unknown": 1}},
    {"r": 2**20},
    {"of_later": []},
]
REFUSED = [
    ({"modules_to_save": [f"x{i}" for i in range(65)]}, "must have at most 64 entries"),
    ({"modules_to_save": ["a" * 257]}, "must name modules by"),
    ({"layers_pattern": "a" * 257}, "must name modules by"),
    ({"layers_pattern": "a*"}, "must name modules by"),
    ({"modules_to_save": ["ä"]}, "must name modules by"),
    ({"lora_dropout": -0.001}, "must lie in"),
    ({"lora_alpha": "1"}, "must be of type"),
    ({"lora_alpha": True}, "must be of type"),
    ({"r": 2.0}, "must be of type"),
    ({"of_later": [0]}, "is not a field"),
    ({"of_later": 0}, "is not a field"),
    ({"of_later": True}, "is not a field"),
]


@pytest.mark.parametrize("fields", PASSED, ids=[str(i) for i in range(len(PASSED))])
def test_fields_that_pass(fields):
    left_out = {"runtime_config", "of_later"}
    assert schema.known_fields(LoraConfig, fields) == {k: v for k, v in fields.items() if k not in left_out}


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_fields_that_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        schema.known_fields(LoraConfig, fields)


class Colour(Enum):
    RED = "red"


@dataclass
class Point:
    x: int
    y: float = 0.0


TYPES: list[tuple[Any, tuple[Any, ...], tuple[Any, ...]]] = [
    (int, (1,), (True, 1.0, "1", None)),
    (float, (1, 1.5), (True, "1", None)),
    (bool, (True,), (1, None)),
    (str, ("",), (1, None)),
    (None, (None,), (0, "", [])),
    (int | None, (1, None), ("1", 1.5)),
    (Any, (1, None, [], "a"), ()),
    (Literal["a", 1], ("a", 1), (True, "b", 1.0)),
    (list[int], ([], [1, 2]), ([1, "2"], {"1": 1}, 1, "1")),
    (Sequence[str], (["a"],), ("a", ["a", 1])),
    (tuple[int, str], ([1, "a"],), ([1], [1, "a", 2], ["a", 1], (1, "a"))),
    (dict[str, int], ({}, {"a": 1}), ({"a": "1"}, [1], {"a": 1, "b": None})),
    (Point, ({}, {"x": 1}, {"x": 1, "y": 2}), ({"z": 1}, {"x": "1"}, [1])),
    (Colour, ("red",), ("RED", "blue", 1)),
]


@pytest.mark.parametrize(("hint", "right", "wrong"), TYPES, ids=[str(hint) for hint, *_ in TYPES])
def test_types(hint, right, wrong):
    """Which JSON values a type takes."""
    assert all(schema.fits(value, hint) for value in right)
    assert not any(schema.fits(value, hint) for value in wrong)


@pytest.mark.parametrize("sign", [1, -1])
def test_largest_weight(sign):
    """What half precision holds, 65504, of either sign; whole numbers and empty tensors have no limit."""
    weights.check_values("w", torch.tensor([0.0, sign * 65504.0]))
    weights.check_values("w", torch.tensor(sign * 10**9))
    weights.check_values("w", torch.empty(0, 3))
    for value in (65505.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="w holds a weight that is not finite, or is larger than 65504"):
            weights.check_values("w", torch.tensor([0.0, sign * value]))


def test_lengths_of_headers(tmp_path):
    """2 bytes at least, 4 MiB at most, and no more than the file has behind the length."""
    path = tmp_path / "adapter_model.safetensors"

    def write(length, size):
        text = b"{}" + b" " * (size - 2) if size >= 2 else b"{" * size
        path.write_bytes(struct.pack("<Q", length) + text)

    for length, size in ((2, 2), (2**22, 2**22), (10, 10)):
        write(length, size)
        weights.check_header(path)
    for length, size in ((1, 2), (2**22 + 1, 2**22 + 1), (11, 10), (0, 0)):
        write(length, size)
        with pytest.raises(ValueError, match=f"has a header of {length} bytes, but the file has {size + 8}"):
            weights.check_header(path)


@pytest.mark.parametrize("change", ["bool", "shape", "dtype"])
def test_types_and_shapes_of_tensors(change, tmp_path):
    """Any floating type stands for another, no whole number for one; shapes agree in every axis."""
    path, implied = tmp_path / "w.safetensors", {"a": torch.empty(2, 3, device="meta"), "i": torch.empty(2).long()}
    tensors = {"a": torch.zeros(2, 3), "i": torch.zeros(2).long()}
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        save_file({**tensors, "a": tensors["a"].to(dtype)}, path)
        weights.check_weights(path, implied)
    wrong = {
        "bool": {"a": torch.zeros(2, 3).bool()},
        "shape": {"a": torch.zeros(3, 2)},
        "dtype": {"i": torch.zeros(2)},
    }
    save_file({**tensors, **wrong[change]}, path)
    with pytest.raises(ValueError, match=r"(a|i) (has shape|is of type) .*, but its config implies"):
        weights.check_weights(path, implied)


def test_rows_of_the_vocabulary():
    """The first and the last token can be trained."""
    model = BACKBONES["llama"].build()
    rows = expected_tensors.expected_tensors(model, TrainableTokensConfig(token_indices=[0, VOCAB - 1]), "default")
    assert [tensor.shape[0] for tensor in rows.values()] == [2]
    for row in (-1, VOCAB):
        with pytest.raises(ValueError, match=r"`token_indices` .* must be rows of 0 to"):
            expected_tensors.expected_tensors(model, TrainableTokensConfig(token_indices=[0, row]), "default")


def test_what_may_be_allocated(monkeypatch):
    """Twice what the file holds, and `SPARE` more."""
    model, config = BACKBONES["llama"].build(), LoraConfig(r=2, **QV)
    held = sum(tensor.numel() for tensor in expected_tensors.expected_tensors(model, config, "default").values())
    monkeypatch.setattr(expected_tensors, "SPARE", -held)  # LoRA allocates what its file holds
    assert expected_tensors.expected_tensors(model, config, "default")
    monkeypatch.setattr(expected_tensors, "SPARE", -held - 1)
    with pytest.raises(ValueError, match=f"would allocate {held} numbers, but its file must hold only {held}"):
        expected_tensors.expected_tensors(model, config, "default")


def test_most_of_a_field(tmp_path):
    """64 terms of OFT's series."""
    path = tmp_path / "adapter_config.json"
    for terms in (64, 65):
        OFTConfig(oft_block_size=8, r=0, num_cayley_neumann_terms=terms, **QV).save_pretrained(tmp_path)
        if terms == 65:
            with pytest.raises(ValueError, match=r"`num_cayley_neumann_terms` \(=65\) must be at most 64"):
                read_config(path, BACKBONES["llama"].build())
        else:
            assert read_config(path, BACKBONES["llama"].build()).num_cayley_neumann_terms == 64
