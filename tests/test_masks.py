"""Masks against loops over queries and keys: which tokens they show, and what a prefix adds in front of them."""

import itertools

import pytest
import torch
from torch import nn

from hf_peft_ext.attach import masks
from hf_peft_ext.attach.forward_state import FORWARD
from hf_peft_ext.attach.masks import causal_mask, mask_position, mask_with_prefix, pad_front, selected, some_query_sees
from hf_peft_ext.sublayers import Gate

LOWEST = torch.finfo(torch.float32).min
BATCH, LENGTH, KEYS, N = 2, 3, 4, 2
ALLOWED = torch.tensor(
    [
        [[1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0]],
        [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]],
    ]
).bool()


def as_kind(allowed, kind):
    """The mask as booleans, as numbers, or as numbers with a bias on what is allowed."""
    allowed = allowed.unsqueeze(1)
    if kind == "bool":
        return allowed
    bias = torch.linspace(-9, 9, allowed.numel()).view_as(allowed) if kind == "biased" else 0.0
    return torch.where(allowed, bias, LOWEST)


@pytest.mark.parametrize("kind", ["bool", "float", "biased", "half"])
def test_some_query_sees(kind):
    """A key is visible if one query of one head sees it."""
    mask = as_kind(ALLOWED, "float" if kind == "half" else kind)
    mask = mask.half().clamp_min(torch.finfo(torch.float16).min) if kind == "half" else mask
    expected = [[any(ALLOWED[b, q, k] for q in range(LENGTH)) for k in range(KEYS)] for b in range(BATCH)]
    assert some_query_sees(mask).tolist() == expected
    heads = torch.cat([torch.zeros_like(mask) if kind == "bool" else torch.full_like(mask, mask.min()), mask], dim=1)
    assert some_query_sees(heads).tolist() == expected


class Attention(nn.Module):
    def forward(self, hidden_states, attention_mask=None):
        return hidden_states


@pytest.mark.parametrize(("mask", "used"), [(None, None), ([[0, 1, 1], [2, 1, 0]], [[False, True], [True, True]])])
def test_recorded_masks(mask, used):
    """Of keys alone too, and without the empty keys behind the tokens; none where there is no mask."""
    recorder, mask = masks.PaddingRecorder(Attention()), mask and torch.tensor(mask)
    recorder(Attention(), (torch.randn(2, 2, 4), mask), {})
    in_use, whole = FORWARD.values.pop(recorder.key)
    assert (in_use, whole) == (None, None) if mask is None else torch.equal(whole, mask.bool())
    assert in_use is None or in_use.tolist() == used


def test_a_mask_that_is_no_tensor():
    """It is recorded, and refused by a gate that needs it."""
    recorder = masks.PaddingRecorder(Attention())
    recorder(Attention(), (torch.randn(2, 2, 4),), {"attention_mask": 3})
    with pytest.raises(ValueError, match=r"`gate_pooling` \(='mean'\) cannot read a mask of type int"):
        Gate(4)(torch.randn(2, 2, 1), FORWARD.values.pop(recorder.key)[0])


@pytest.mark.parametrize(("length", "keys", "past"), [(3, 3, 0), (2, 5, 3), (1, 4, 3), (3, 6, 1)])
def test_causal_mask(length, keys, past):
    mask = causal_mask(length, keys, torch.device("cpu"), past)
    assert mask.shape == (1, 1, length, keys)
    assert mask[0, 0].tolist() == [[k <= past + q for k in range(keys)] for q in range(length)]


@pytest.mark.parametrize("kind", ["bool", "float", "biased"])
def test_selected(kind):
    """Keys outside the selection are hidden, the others stay as they are; one mask may serve all rows."""
    indices = torch.tensor([[[0, 1], [0, 2], [2, 3]], [[1, 1], [1, 3], [0, 1]]])
    for mask in (as_kind(ALLOWED, kind), as_kind(ALLOWED[:1], kind)):
        found = selected(mask, indices.int())
        assert found.shape == (BATCH, 1, LENGTH, KEYS)
        for b, q, k in itertools.product(range(BATCH), range(LENGTH), range(KEYS)):
            hidden = False if kind == "bool" else LOWEST
            expected = mask[b % len(mask), 0, q, k].item() if k in indices[b, q] else hidden
            assert found[b, 0, q, k].item() == expected


@pytest.mark.parametrize("kind", ["bool", "float", "biased"])
def test_widened_without_scores(kind):
    """Every query sees the prefix, without a bias; the rest is the mask. It is computed once for a mask."""
    mask = as_kind(ALLOWED, kind)
    wide = mask_with_prefix(mask, None, KEYS, N, torch.float32)
    assert wide.dtype == mask.dtype
    assert torch.equal(wide[..., N:], mask)
    assert (wide[..., :N] == (True if kind == "bool" else 0.0)).all()
    assert mask_with_prefix(mask, None, KEYS, N, torch.float32) is wide
    assert mask_with_prefix(mask, None, KEYS, N + 1, torch.float32).shape[-1] == N + 1 + KEYS
    FORWARD.derived.pop(mask)


@pytest.mark.parametrize("length", [1, LENGTH])
@pytest.mark.parametrize("kind", ["none", "bool", "float", "biased"])
def test_widened_with_scores(kind, length):
    """[scores, mask] in the type of the queries, for scores of each query or of all."""
    scores = torch.randn(BATCH, 1, length, N, dtype=torch.float64)
    mask = None if kind == "none" else as_kind(ALLOWED[:1], kind)
    wide = mask_with_prefix(mask, scores, KEYS, N, torch.float32)
    assert wide.dtype == torch.float32
    assert wide.shape == (BATCH, 1, length if mask is None else LENGTH, N + KEYS)
    torch.testing.assert_close(wide[..., :N], scores.float().expand(-1, -1, wide.shape[2], -1))
    numbers = torch.zeros(1) if mask is None else as_kind(ALLOWED[:1], "float") if kind == "bool" else mask
    assert torch.equal(wide[..., N:], numbers.expand(BATCH, 1, wide.shape[2], KEYS))


def test_widened_nothing():
    assert mask_with_prefix(None, None, KEYS, N, torch.float32) is None
    with pytest.raises(ValueError, match="A mask of type str cannot take a prefix"):
        mask_with_prefix("causal", None, KEYS, N, torch.float32)


def test_pad_front():
    assert pad_front(torch.tensor([[False, True]]), 2).tolist() == [[True, True, False, True]]
    assert pad_front(torch.tensor([[-1.0, 2.0]]), 1).tolist() == [[0.0, -1.0, 2.0]]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("hidden_states, attention_mask=None", ("attention_mask", 1)),
        ("x, position_bias, mask", ("mask", 2)),
        ("attn_mask, x", ("attn_mask", 0)),
        ("x, mask, attention_mask", ("attention_mask", 2)),
        ("x, y, **kwargs", ("attention_mask", 3)),
    ],
)
def test_mask_position(arguments, expected):
    """By name; where none of the names is an argument, it can only be a keyword."""
    names = {}
    exec(f"def forward(self, {arguments}): ...", names)
    assert mask_position(type("Attention", (nn.Module,), {"forward": names["forward"]})()) == expected
