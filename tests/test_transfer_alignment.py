"""W_plug by least squares, against the formula on hidden states that transformers gives and on outputs of leaves."""

import pytest
import torch

from hf_peft_ext.transfer import Projections, plug
from hf_peft_ext.transfer.map.projections import least_squares

from .backbones import BACKBONES
from .test_transfer_fold import LARGE, refuses, small_model


def states(model, inputs, leaf):
    """What its blocks read, and what a leaf gives; shapes: (tokens, d)."""
    found = []
    handle = model.get_submodule(leaf).register_forward_hook(lambda _, args, out: found.append(out.flatten(0, 1)))
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states[:-1]
    handle.remove()
    return [h.flatten(0, 1) for h in hidden], found[0]


def test_least_squares_between_both_models():
    """Llama with two layers on five; both sides of the stream, and the queries of the last layer."""
    small, large = small_model("llama", "lora"), BACKBONES["llama"].build(**LARGE["llama"])
    draw = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(3, 60, (1, 40), generator=draw)} for _ in range(3)]
    with torch.no_grad(), small.disable_adapter():
        of_small = [states(small.get_base_model(), b, "model.layers.1.self_attn.q_proj") for b in batches]
        of_large = [states(large, b, "model.layers.4.self_attn.q_proj") for b in batches]
    projections = Projections(init="least_squares")
    plug(small, large, projections, batches=batches)

    x = torch.cat([hidden[i] for i in (0, 0, 0, 1, 1) for hidden, _ in of_small])
    y = torch.cat([hidden[i] for i in range(5) for hidden, _ in of_large])
    queries = [torch.cat([leaf for _, leaf in found]) for found in (of_small, of_large)]
    for name, wanted in {
        "residual_out": least_squares(x, y),
        "residual_in": least_squares(y, x).T,
        "query_4_out": least_squares(*queries),
    }.items():
        torch.testing.assert_close(projections.of[name].weight.double(), wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_every_projection_is_filled(family, kind):
    small, large = small_model(family, kind), BACKBONES[family].build(**LARGE[family])
    before, after = Projections(), Projections(init="least_squares")
    torch.manual_seed(0)
    plug(small, BACKBONES[family].build(**LARGE[family]), before)
    torch.manual_seed(0)
    plug(small, large, after, batches=[BACKBONES[family].inputs()])
    assert before.of.keys() == after.of.keys()
    assert not any(torch.equal(before.of[name].weight, after.of[name].weight) for name in before.of)


def test_errors():
    small, large = small_model("llama", "lora"), BACKBONES["llama"].build(**LARGE["llama"])
    projections = Projections(init="least_squares")
    refuses("`batches` .=None. must be passed for projections", ValueError, lambda: plug(small, large, projections))
    refuses("`batches` .=... must be passed for", ValueError, lambda: plug(small, large, batches=[]))
    call = lambda: plug(small, large, projections, batches=[])  # noqa: E731
    refuses("`batches` .=0. must hold at least one", ValueError, call)
