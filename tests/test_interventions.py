"""ReFT's interventions: which tokens they edit, their formula, generation, and where they are refused.

What they share with all sub-layers is in test_contract.py, equality with AdapterHub's library in test_adapterhub.py.
"""

import re

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from transformers import AutoConfig, AutoModel, SwinConfig, SwinModel

from hf_peft_ext import ComposedConfig, Placement, UniPELTConfig
from hf_peft_ext.attach.positions_layer import EditPositions
from hf_peft_ext.attach.tuner import tuner_layers
from hf_peft_ext.sublayers import Intervention

from .backbones import BACKBONES, HYBRIDS, LAYERS, output
from .methods import randomise


def attach(family, layers=None, **options):
    model = BACKBONES[family].build()
    placement = Placement("intervention", "block_output", layers, options={"r": 2, **options})
    model = get_peft_model(model, ComposedConfig(placements=[placement])).eval()
    randomise(model)
    return model


def last_block(model, inputs):
    """The output of the last block, without and with the adapter, shapes: (batch, length, d)."""
    outputs = []
    stack = next(m for n, m in model.named_modules() if n.endswith((".layer", ".layers", ".h", "transformer.blocks")))
    handle = stack[-1].register_forward_hook(
        lambda module, args, y: outputs.append(y[0] if isinstance(y, tuple) else y)
    )
    with torch.no_grad():
        with model.disable_adapter():
            model(**inputs)
        model(**inputs)
    handle.remove()
    return outputs


# rows of 9 tokens, of which the second has 3 of padding -> the edited tokens of each row
EDITED = {
    "right": [{0, 1, 7, 8}, {0, 1, 4, 5}, {0, 1, 7, 8}],
    "left": [{0, 1, 7, 8}, {3, 4, 7, 8}, {0, 1, 7, 8}],
    None: [{0, 1, 7, 8}] * 3,
}


@pytest.mark.parametrize("padding", EDITED)
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "mistral"])
def test_edits_first_and_last_tokens(family, padding):
    """Two first and two last tokens of each row, padding not counted, and no others."""
    inputs = BACKBONES[family].inputs(padding=padding or "none")
    if padding is None:
        del inputs["attention_mask"]
    model = attach(family, [LAYERS - 1], prefix_positions=2, suffix_positions=2)
    base, edited = last_block(model, inputs)
    changed = (base != edited).any(-1)
    assert [set(row.nonzero().flatten().tolist()) for row in changed] == EDITED[padding]


def test_short_rows():
    """A row that is shorter than both parts: each token is edited once, by the edit of the last ones."""
    layer = Intervention(6, r=2, prefix_positions=3, suffix_positions=3)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 4, 6)
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    first, last = (edit(x) for edit in layer.edit_of.values())
    expected = torch.stack([torch.cat([last[0, :2], x[0, 2:]]), torch.cat([first[1, :1], last[1, 1:]])])
    torch.testing.assert_close(layer.add(x, x, mask), expected)


def test_formula():
    """LoReFT's equation 2, R by a QR decomposition of its own; the state changes in the span of R alone."""
    layer = Intervention(8, r=3, prefix_positions=5, tied_weights=True).double()
    (edit,) = layer.edit_of.values()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    h = torch.randn(2, 5, 8, dtype=torch.float64)
    q = torch.linalg.svd(edit.R.float())[2][:3].double()  # another basis of the same span
    rows = edit.rows().double()
    torch.testing.assert_close(rows @ rows.t(), torch.eye(3, dtype=torch.float64), atol=1e-6, rtol=0)
    change = layer.add(h, h) - h
    torch.testing.assert_close(change, h @ edit.W.t() @ rows + edit.b @ rows - h @ rows.t() @ rows)
    torch.testing.assert_close(change @ q.t() @ q, change, atol=1e-5, rtol=1e-5)


def test_orthonormal_rows_are_kept():
    """So an imported matrix is the one that was saved, and it stays orthonormal in training."""
    (edit,) = Intervention(8, r=3, tied_weights=True).edit_of.values()
    torch.testing.assert_close(edit.rows(), edit.R, atol=1e-6, rtol=0)
    optimizer = torch.optim.SGD(edit.parameters(), lr=1.0)
    for _ in range(3):
        edit(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
    assert (edit.rows() - edit.R).abs().max() > 1e-2
    torch.testing.assert_close(edit.rows() @ edit.rows().t(), torch.eye(3), atol=1e-5, rtol=0)


def test_kinds_start_at_the_base():
    """LoReFT, NoReFT and DiReFT."""
    x = torch.randn(2, 5, 8)
    for options in ({}, {"orthogonality": False}, {"orthogonality": False, "subtract_projection": False}):
        torch.testing.assert_close(Intervention(8, suffix_positions=2, **options).add(x, x), x)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_edits_the_prompt_only(family, cache):
    """The steps after the prompt are the base model's, on a cache that the edited prompt filled."""
    model, inputs = attach(family, suffix_positions=2), BACKBONES[family].inputs(padding="left")
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "cache_implementation": cache}
    with torch.no_grad():
        generated = model.generate(**inputs, **options)
        mask = inputs["attention_mask"]
        filled = model(**inputs, position_ids=(mask.cumsum(1) - 1).clamp_min(0), use_cache=True)
        tokens = [filled.logits[:, -1:].argmax(-1)]
        for _ in range(3):
            mask = F.pad(mask, (0, 1), value=1)
            step = {"input_ids": tokens[-1], "attention_mask": mask, "position_ids": mask.cumsum(1)[:, -1:] - 1}
            with model.disable_adapter():
                step = model(**step, past_key_values=filled.past_key_values, use_cache=True)
            tokens.append(step.logits[:, -1:].argmax(-1))
    assert torch.equal(generated[:, inputs["input_ids"].shape[1] :], torch.cat(tokens, 1))


@pytest.mark.parametrize("backbone", ["bert", "t5"])
def test_beside_mean_gates(backbone):
    """Gates that leave out padding have masks of their own, before and after the interventions are gone."""

    def gated(**kwargs):
        return UniPELTConfig(gate_pooling="mean", bottleneck_size=4, num_virtual_tokens=4, **kwargs)

    family, inputs = BACKBONES[backbone], BACKBONES[backbone].inputs()
    alone = get_peft_model(family.build(), gated(), "gated").eval()
    randomise(alone, "gated")
    config = ComposedConfig(placements=[Placement("intervention", "block_output", options={"r": 2})])
    model = get_peft_model(family.build(), config, "edits").eval()
    model.add_adapter("gated", gated())
    randomise(model, "gated")
    randomise(model, "edits")
    keys = {
        kind: {x._mask_key for x in tuner_layers(model) if isinstance(x, EditPositions) == kind} for kind in (0, 1)
    }
    assert keys[0].isdisjoint(keys[1])
    with torch.no_grad():
        expected = output(alone, inputs)
        model.set_adapter("gated")
        torch.testing.assert_close(output(model, inputs), expected)
        model.base_model.set_adapter(["edits", "gated"])
        assert (output(model, inputs) - expected).abs().max() > 1e-3
        model.delete_adapter("edits")
        model.set_adapter("gated")
        torch.testing.assert_close(output(model, inputs), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix_positions": 0}, "`prefix_positions` (=0) must be above 0, or `suffix_positions`."),
        ({"suffix_positions": -1}, "`suffix_positions` (=-1) must be a whole number of 0 or more."),
        ({"prefix_positions": True}, "`prefix_positions` (=True) must be a whole number of 0 or more."),
        ({"r": 0}, "`r` (=0) must be a positive whole number."),
        ({"tied_weights": 1}, "`tied_weights` (=1) must be True or False."),
        ({"dropout": 2.0}, "`dropout` (=2.0) must lie in [0, 1)."),
        ({"activation": "tan"}, "`activation` (='tan') must be an activation of transformers."),
        ({"positions": 3}, "`options` of `intervention` has no `positions`"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Placement("intervention", "block_output", options=options)


def test_no_gate():
    with pytest.raises(ValueError, match="must be None: an intervention replaces what it reads"):
        Placement("intervention", "block_output", gate="token")


@pytest.mark.parametrize("family", ["mamba", "qwen3_next"])
def test_blocks_without_attention(family):
    """Their mask is not known; in a hybrid, the other layers take interventions."""
    if family not in HYBRIDS:
        pytest.skip(f"this transformers has no {family}")
    base = HYBRIDS[family].build()
    names = [name for name, _ in base.named_modules()]
    config = ComposedConfig(placements=[Placement("intervention", "block_output")])
    with pytest.raises(ValueError, match="it has no attention, whose mask is read"):
        get_peft_model(base, config)
    assert [name for name, _ in base.named_modules()] == names
    if family == "qwen3_next":
        layers = [i for i, kind in enumerate(base.config.layer_types) if kind == "full_attention"]
        config = ComposedConfig(placements=[Placement("intervention", "block_output", layers)])
        assert get_peft_model(base, config).get_nb_trainable_parameters()[0] > 0


def test_windows_of_an_image():
    """Swin's rows are windows, whose first token is not the image's."""
    config = SwinConfig(image_size=16, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2)
    with pytest.raises(ValueError, match="its rows are parts of an example, or several"):
        get_peft_model(SwinModel(config), ComposedConfig(placements=[Placement("intervention", "block_output", [0])]))


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 99,
}


@pytest.mark.parametrize(
    ("model_type", "options", "reason"),
    [
        ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 99}, "its padding cannot be read"),
        ("longformer", {**SMALL, "attention_window": [4, 4]}, "its padding cannot be read"),
        ("big_bird", {**SMALL, "block_size": 4}, "its padding cannot be read"),
        (
            "openai-gpt",
            {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99},
            "does not return one tensor of its own width",
        ),
        ("mobilebert", {**SMALL, "intra_bottleneck_size": 16}, "does not return one tensor of its own width"),
    ],
)
def test_refused_where_the_wrong_tokens_would_be_edited(model_type, options, reason):
    """Masks with a meaning of their own and blocks that return something else: nothing is changed."""
    base = AutoModel.from_config(AutoConfig.for_model(model_type, **options))
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=reason):
        get_peft_model(base, ComposedConfig(placements=[Placement("intervention", "block_output")]))
    assert [name for name, _ in base.named_modules()] == names


def test_rank_is_at_most_the_width():
    base = AutoModel.from_config(AutoConfig.for_model("llama", **SMALL))
    with pytest.raises(ValueError, match=r"`r` \(=40\) must be at most 32, the width at layers\.0"):
        get_peft_model(base, ComposedConfig(placements=[Placement("intervention", "block_output", options={"r": 40})]))


def test_masks_that_hide_by_ten_thousand():
    """MarkupLM's padding is not edited: the last token is the last real one."""
    torch.manual_seed(0)
    base = AutoModel.from_config(AutoConfig.for_model("markuplm", **SMALL)).eval()
    placement = Placement("intervention", "block_output", options={"prefix_positions": 0, "suffix_positions": 1})
    model = get_peft_model(base, ComposedConfig(placements=[placement])).eval()
    randomise(model)
    ids, mask = torch.arange(3, 12)[None], torch.tensor([[1] * 6 + [0] * 3])
    with torch.no_grad():
        padded = model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :6]
        alone = model(input_ids=ids[:, :6]).last_hidden_state
    torch.testing.assert_close(padded, alone)
