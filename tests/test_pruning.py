"""Pruned copies: r = 1 against the large model; kept and dropped units against loops over axes written out by hand.

Saved copies are compared with what transformers loads. The errors are at the end.
"""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2ForSequenceClassification,
    LlamaForSequenceClassification,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    T5EncoderModel,
)

from hf_peft_ext.pruning import find_channels, importance, pruned_copy
from hf_peft_ext.pruning.sizes import sizes_of

from .backbones import BACKBONES, HYBRIDS, LAYERS, Backbone, D, output

QWEN3 = Backbone("decoder", "qwen3", {**BACKBONES["qwen2"].config, "head_dim": 16})
FAMILIES = {
    **{name: BACKBONES[name] for name in ("bert", "roberta", "gpt2", "t5", "llama", "qwen2", "mistral")},
    **{name: BACKBONES[name] for name in ("bart", "opt", "distilbert", "electra", "gemma2")},
    **{name: BACKBONES[name] for name in ("falcon", "gpt_neox", "bloom", "modernbert", "albert")},
    "qwen3": QWEN3,
    "t5, gated": Backbone("seq2seq", "t5", {**BACKBONES["t5"].config, "feed_forward_proj": "gated-gelu"}),
    "llama, tied": Backbone("decoder", "llama", {**BACKBONES["llama"].config, "tie_word_embeddings": True}),
    "llama, biases": Backbone(
        "decoder", "llama", {**BACKBONES["llama"].config, "attention_bias": True, "mlp_bias": True}
    ),
}
HEADS = {
    "bert": [BertForMaskedLM, BertForSequenceClassification],
    "roberta": [RobertaForMaskedLM, RobertaForSequenceClassification],
    "gpt2": [GPT2ForSequenceClassification],
    "llama": [LlamaForSequenceClassification],
    "t5": [T5EncoderModel],
}
every_family = pytest.mark.parametrize("name", FAMILIES)


def lively(model):
    """Norms and biases that differ from channel to channel, so that a wrong one is noticed."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def build(name):
    return lively(FAMILIES[name].build())


@every_family
@pytest.mark.parametrize("reduce", ["width", "parameters"])
def test_nothing_dropped_is_the_model(name, reduce):
    model, inputs = build(name), FAMILIES[name].inputs()
    pruned = pruned_copy(model, 1, reduce).model
    assert type(pruned) is type(model)
    assert torch.equal(output(pruned, inputs), output(model, inputs))
    assert pruned.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(("name", "head"), [(name, head) for name, heads in HEADS.items() for head in heads])
def test_nothing_dropped_is_the_model_with_a_head(name, head):
    torch.manual_seed(0)
    model = lively(head(BACKBONES[name].build().config))
    inputs = Backbone("encoder", "", {}).inputs()
    assert torch.equal(output(pruned_copy(model, 1).model, inputs), output(model, inputs))
    assert output(pruned_copy(model, 2).model, inputs).isfinite().all()


# What is cut: leaf of a block -> what its rows and its columns are
ATTENTION = {"q": ("heads", "residual"), "k": ("kv_heads", "residual"), "v": ("kv_heads", "residual"),
             "o": ("residual", "heads")}  # fmt: skip
LLAMA = {f"self_attn.{role}_proj": axes for role, axes in ATTENTION.items()} | {
    "mlp.gate_proj": ("ffn", "residual"),
    "mlp.up_proj": ("ffn", "residual"),
    "mlp.down_proj": ("residual", "ffn"),
}
BERT = {
    "attention.self.query": ("heads", "residual"),
    "attention.self.key": ("kv_heads", "residual"),
    "attention.self.value": ("kv_heads", "residual"),
    "attention.output.dense": ("residual", "heads"),
    "intermediate.dense": ("ffn", "residual"),
    "output.dense": ("residual", "ffn"),
}
GPT2 = {
    "attn.c_attn": ("fused", "residual"),
    "attn.c_proj": ("residual", "heads"),
    "mlp.c_fc": ("ffn", "residual"),
    "mlp.c_proj": ("residual", "ffn"),
}
T5_ENCODER = {f"layer.0.SelfAttention.{role}": axes for role, axes in ATTENTION.items()} | {
    "layer.1.DenseReluDense.wi": ("ffn", "residual"),
    "layer.1.DenseReluDense.wo": ("residual", "ffn"),
}
T5_DECODER = {f"layer.0.SelfAttention.{role}": axes for role, axes in ATTENTION.items()} | {
    **{
        f"layer.1.EncDecAttention.{role}": tuple(a if a == "residual" else f"cross_{a}" for a in axes)
        for role, axes in ATTENTION.items()
    },
    "layer.2.DenseReluDense.wi": ("ffn", "residual"),
    "layer.2.DenseReluDense.wo": ("residual", "ffn"),
}
STACKS = {
    "llama": [("model.layers", LLAMA, 0)],
    "qwen2": [("model.layers", LLAMA, 0)],
    "bert": [("encoder.layer", BERT, 0)],
    "gpt2": [("transformer.h", GPT2, 0)],
    "t5": [("encoder.block", T5_ENCODER, 0), ("decoder.block", T5_DECODER, LAYERS)],
}
BLOCKS = {
    name: [(f"{stack}.{i}.{leaf}", axes, f"{first + i}.") for stack, leaves, first in stacks for i in range(LAYERS)
           for leaf, axes in leaves.items()]
    for name, stacks in STACKS.items()
}  # fmt: skip


# What reads or writes the stream outside the blocks: module -> the dimension of its weight that lies along it.
OUTSIDE = {
    "llama": [("model.embed_tokens", 1), ("lm_head", 1)],
    "bert": [("embeddings.word_embeddings", 1), ("pooler.dense", 0), ("pooler.dense", 1)],
    "t5": [("shared", 1)],  # which is the head too
}


def matrix(model, path):
    """A leaf's weight as (rows, columns)."""
    leaf = model.get_submodule(path)
    return leaf.weight if isinstance(leaf, nn.Linear) else leaf.weight.T


def kept_channels(pruned, axis, prefix, head_dim, heads):
    """The kept channels of one dimension, by loops."""
    if axis == "fused":
        parts = [kept_channels(pruned, "heads", prefix, head_dim, heads) for _ in range(3)]
        return [channel + part * heads * head_dim for part in range(3) for channel in parts[part]]
    kept = pruned.kept[axis if axis == "residual" else prefix + axis].tolist()
    if not axis.endswith("heads"):
        return kept
    cross = "cross_" if axis.startswith("cross_") else ""
    return [head * head_dim + i for head in kept for i in pruned.kept[f"{prefix}{cross}head_dim"].tolist()]


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("r", [2, 7])
def test_weights_are_cut_as_a_loop_cuts_them(name, r):
    """Every projection, bias and norm of the blocks holds the large model's at the kept rows and columns."""
    model = build(name)
    pruned, sizes = pruned_copy(model, r), sizes_of(model)
    narrow = math.sqrt(sizes_of(pruned.model).head_dim / sizes.head_dim)
    assert (narrow < 1) == (r == 7 and name in ("bert", "gpt2"))  # the others have a head width of their own
    for path, (rows, columns), prefix in BLOCKS[name]:
        at = [kept_channels(pruned, axis, prefix, sizes.head_dim, sizes.heads) for axis in (rows, columns)]
        assert pruned.rows_of(path).tolist() == at[0]
        assert pruned.columns_of(path).tolist() == at[1]
        large, cut = matrix(model, path).tolist(), matrix(pruned.model, path).detach()
        queries = len(at[0]) // 3 if rows == "fused" else len(at[0]) if path.endswith(("query", "q_proj", "q")) else 0
        scale = [narrow if i < queries else 1.0 for i in range(len(at[0]))]
        expected = [[large[row][column] * scale[i] for column in at[1]] for i, row in enumerate(at[0])]
        torch.testing.assert_close(cut, torch.tensor(expected))
        bias = getattr(model.get_submodule(path), "bias", None)
        if bias is not None:
            expected = [bias[row].item() * scale[i] for i, row in enumerate(at[0])]
            torch.testing.assert_close(pruned.model.get_submodule(path).bias.detach(), torch.tensor(expected))
    for path, module in model.named_modules():
        if "norm" in type(module).__name__.lower():
            expected = [module.weight[i].item() for i in pruned.kept["residual"]]
            assert pruned.model.get_submodule(path).weight.tolist() == expected
    words = [[row[i] for i in pruned.kept["residual"]] for row in model.get_input_embeddings().weight.tolist()]
    assert pruned.model.get_input_embeddings().weight.tolist() == words


def shares(matrix, dim):
    """What each row (0) or column (1) holds of a matrix's squares, by loops."""
    values = matrix.double().tolist()
    sums = [0.0] * matrix.shape[dim]
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            sums[i if dim == 0 else j] += value**2
    return [value / sum(sums) for value in sums]


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_what_is_kept_is_what_scores_highest(name):
    """The residual channels, heads and inner channels kept are those whose weights hold most of the squares, every
    weight counted as one; the same residual channels in all layers.
    """
    model = build(name)
    pruned, sizes = pruned_copy(model, 2), sizes_of(model)
    scores = {}

    def vote(axis, parts):
        scores[axis] = [a + b for a, b in zip(scores.get(axis, [0.0] * len(parts)), parts, strict=True)]

    for path, axes, prefix in BLOCKS[name]:
        for dim, axis in enumerate(axes):
            parts = shares(matrix(model, path), dim)
            if axis.endswith("heads"):
                parts = [sum(parts[i : i + sizes.head_dim]) for i in range(0, len(parts), sizes.head_dim)]
            vote(axis if axis == "residual" else prefix + axis, parts)
    for path, dim in OUTSIDE[name]:
        vote("residual", shares(model.get_submodule(path).weight, dim))

    def best(values, n):
        return sorted(sorted(range(len(values)), key=lambda i: -values[i])[:n])

    assert pruned.kept["residual"].tolist() == best(scores["residual"], D // 2)
    assert pruned.kept["1.ffn"].tolist() == best(scores["1.ffn"], 32)
    if name == "llama":  # one of two keys, with its two queries
        both = [k + sum(scores["1.heads"][2 * i : 2 * i + 2]) for i, k in enumerate(scores["1.kv_heads"])]
        assert pruned.kept["1.kv_heads"].tolist() == best(both, 1)
        assert pruned.kept["1.heads"].tolist() == [2 * both.index(max(both)), 2 * both.index(max(both)) + 1]
    elif name == "bert":
        both = [a + b for a, b in zip(scores["1.heads"], scores["1.kv_heads"], strict=True)]
        assert pruned.kept["1.heads"].tolist() == pruned.kept["1.kv_heads"].tolist() == best(both, 2)
    else:  # one position bias for all layers of the decoder
        both = [
            sum(scores[f"{i}.{axis}"][head] for i in (2, 3) for axis in ("heads", "kv_heads")) for head in range(4)
        ]
        assert pruned.kept["2.heads"].tolist() == pruned.kept["3.heads"].tolist() == best(both, 2)
        bias = model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        cut = pruned.model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        assert torch.equal(cut, bias[:, best(both, 2)])


def test_given_scores_decide():
    """Scores that single out some channels, heads and inner channels keep those."""
    model = build("llama")
    scores = importance(model, kind="magnitude")
    wanted = torch.arange(1, D, 2)
    for path, weights in find_channels(model).weights.items():
        for dim, table in ((weights.rows, scores.rows), (weights.columns, scores.columns)):
            if path in table and dim and dim.runs[0].axis == "residual":
                table[path] = torch.zeros(D).index_fill(0, wanted, 1.0)
    assert torch.equal(pruned_copy(model, 2, importance=scores).kept["residual"], wanted)


# Around it


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gemma2"])
def test_saved_and_loaded(name, tmp_path):
    """A pruned copy is a model like any other: saved, loaded and, if it can, generating the same."""
    model, inputs = build(name), FAMILIES[name].inputs()
    pruned = pruned_copy(model, 3).model
    pruned.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(output(again, inputs), output(pruned, inputs))
    assert again.config.hidden_size < model.config.hidden_size
    if model.can_generate():
        ids = {key: inputs[key][:1] for key in ("input_ids", "attention_mask")}
        tokens = [m.generate(**ids, max_new_tokens=4, do_sample=False) for m in (pruned, again)]
        assert torch.equal(*tokens)


def test_leaves_everything_as_it_was():
    """The large model, its config and the random numbers are those of before; the copy shares no memory with it."""
    model, inputs = build("llama"), FAMILIES["llama"].inputs()
    before, config, state = output(model, inputs), model.config.to_dict(), torch.get_rng_state()
    pruned = pruned_copy(model.train(), 1).model
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config.to_dict() == config
    assert pruned.training
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.zero_()
    assert torch.equal(output(model.eval(), inputs), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    model, inputs = build("llama").to(dtype), FAMILIES["llama"].inputs()
    pruned = pruned_copy(model, 1).model
    assert pruned.dtype == dtype
    assert torch.equal(output(pruned, inputs), output(model, inputs))


def test_inside_adapters():
    """Cut from a model with adapters in it, the copy is that of the base model."""
    model, inputs = build("llama"), FAMILIES["llama"].inputs()
    expected = output(pruned_copy(model, 2).model, inputs)
    get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    assert torch.equal(output(pruned_copy(model, 2).model, inputs), expected)


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, r"`r` \(=0\) must be a positive number\."),
        ({"r": 0.5}, r"`r` \(=0.5\) must be at least 1"),
        ({"r": float("nan")}, r"`r` \(=nan\) must be a positive number\."),
        ({"r": 2, "reduce": "depth"}, r"`reduce` \(='depth'\) must be one of width, parameters\."),
    ],
)
def test_values_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        pruned_copy(build("llama"), **arguments)


REFUSED = {
    "deepseek_v3": "the heads of model.layers.0.self_attn.q_b_proj have an unknown width",
    "jamba": "model.layers.0.mamba.out_proj belongs to no softmax attention",
    "granite_hybrid": "model.layers.0.block_sparse_moe.router has parameters along no known axis",
    "mamba": "no supported transformer blocks were found",
    "zamba2": r"model.layers.1.shared_transformer.self_attn.q_proj maps \(64, 64\), along no known axis",
}


@pytest.mark.parametrize("name", [name for name in REFUSED if name in BACKBONES | HYBRIDS])
def test_architectures_that_cannot_be_cut(name):
    model = (BACKBONES | HYBRIDS)[name].build()
    with pytest.raises(ValueError, match=rf"cannot be cut: {REFUSED[name]}"):
        pruned_copy(model, 2)


def test_fused_rows_in_an_order_of_their_own():
    """CodeGen's query, key and value are interleaved in four parts, whatever the number of heads."""
    codegen = Backbone("decoder", "codegen", {"n_embd": 64, "n_layer": 1, "n_head": 8, "rotary_dim": 4})
    with pytest.raises(ValueError, match=r"cannot be cut: (.*qkv_proj interleaves|no supported)"):  # not found in 5.15
        pruned_copy(codegen.build(), 2)


def test_a_second_stack_of_another_inner_width():
    """Each stack keeps its own share."""
    pruned = pruned_copy(BACKBONES["bart"].build(decoder_ffn_dim=48), 2)
    assert [len(pruned.kept[f"{layer}.ffn"]) for layer in range(4)] == [32, 32, 24, 24]
    assert pruned.model.config.decoder_ffn_dim == 24


def test_a_second_stack_of_other_heads():
    with pytest.raises(ValueError, match=r"cannot be cut: its blocks have widths .* and 2 shapes of heads"):
        pruned_copy(BACKBONES["bart"].build(decoder_attention_heads=2), 2)


@pytest.mark.parametrize(("name", "options"), [("gemma2", {}), ("bart", {"scale_embedding": True})])
def test_embeddings_scaled_by_the_width(name, options, tmp_path):
    """The copy scales by the large model's width; loaded it would not, so it is not saved."""
    model = lively(BACKBONES[name].build(**options))
    pruned = pruned_copy(model, 2)
    for module in (model, pruned.model):
        assert {round(float(m.embed_scale), 3) for m in module.modules() if hasattr(m, "embed_scale")} == {5.657}
    with pytest.raises(ValueError, match="scales its embeddings by the large model's width, which is lost on saving"):
        pruned.save_pretrained(tmp_path)


def test_a_weight_along_no_axis_is_named():
    model = build("llama")
    model.model.layers[0].mlp.extra = nn.Linear(7, 5)
    with pytest.raises(
        ValueError, match=r"cannot be cut: model\.layers\.0\.mlp\.extra has parameters along no known axis"
    ):
        pruned_copy(model, 2)


def test_importance_of_another_model():
    other = importance(BACKBONES["llama"].build(hidden_size=64), kind="magnitude")
    with pytest.raises(ValueError, match=r"`importance` \(=64\) must be of this model: model.* has 32 channels"):
        pruned_copy(build("llama"), 2, importance=other)
    with pytest.raises(ValueError, match="must have scores for every axis of the model"):
        pruned_copy(build("llama"), 2, importance=importance(build("bert"), kind="magnitude"))


def test_what_is_no_transformers_model():
    model = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="`model` must be a transformers model, not PeftModel"):
        pruned_copy(model, 2)
