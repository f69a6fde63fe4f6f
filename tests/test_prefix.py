"""Prefixes in attention: against a naive attention, against peft's PrefixTuning, and under every mask and cache."""

import re
from functools import partial

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForSeq2SeqLM, DynamicCache

from hf_peft_ext import ComposedConfig, LayerPrefixConfig, Placement, UniPELTConfig
from hf_peft_ext.attach.attention import PrefixLayer, prefix_attention
from hf_peft_ext.attach.prefix_states import PrefixStates, joined

from .backbones import BACKBONES, output
from .methods import METHODS, randomise

P, T = 3, 5
joint = partial(LayerPrefixConfig, init="paper")


def naive_attention(q, k, v, mask, p_k, p_v, scores, bias, scaling):
    """softmax over [prefix, keys], one query at a time. mask: True where allowed."""
    out = torch.zeros(*q.shape[:3], v.shape[-1])
    group = q.shape[1] // k.shape[1]
    for b, h, t in ((b, h, t) for b in range(len(q)) for h in range(q.shape[1]) for t in range(q.shape[2])):
        keys = torch.cat([p_k[b, h // group], k[b, h // group]])
        values = torch.cat([p_v[b, h // group], v[b, h // group]])
        s = keys @ q[b, h, t] * scaling
        if scores is not None:
            s[:P] += scores[b, 0, t]
        if bias is not None:
            s[P:] += bias[0, h, t]
        s[P:] = s[P:].masked_fill(~mask[b, t], float("-inf"))
        out[b, h, t] = torch.softmax(s, 0) @ values
    return out.transpose(1, 2)


def factors(scores):
    """Scores of shape (batch, 1, length, P) as a product U V^T."""
    return (None, None) if scores is None else (scores, torch.eye(P)[None, None])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_against_naive_attention(attention, gated, kind):
    """Values and gradients of queries, keys, prefixes and scores; grouped heads; masks of all kinds."""
    model = get_peft_model(BACKBONES["llama"].build(attention), joint())
    module = model.base_model.model.model.layers[0].self_attn
    q, k, v = torch.randn(2, 4, T, 8), torch.randn(2, 2, T, 8), torch.randn(2, 2, T, 8)
    p_k, p_v = torch.randn(2, 2, P, 8), torch.randn(2, 2, P, 8)
    scores = torch.randn(2, 1, T, P) if gated else None
    allowed = torch.ones(T, T).tril().bool().expand(2, T, T).clone()
    mask = None
    if kind != "none":
        allowed[1, :, 0] = False
        allowed[1, 0, 0] = True
        mask = allowed[:, None]
    if kind == "float" or (attention == "eager" and kind == "bool"):
        mask = torch.where(allowed[:, None], 0.0, torch.finfo(torch.float32).min)
    if kind == "none" and attention == "eager":
        allowed = torch.ones(2, T, T).bool()  # eager leaves causality to the mask
    tensors = [t.requires_grad_() for t in (q, k, v, p_k, p_v, *([scores] if gated else []))]
    ours, _ = prefix_attention(module, q, k, v, mask, PrefixStates(p_k, p_v, *factors(scores)), scaling=0.3)
    naive = naive_attention(q, k, v, allowed, p_k, p_v, scores, None, 0.3)
    torch.testing.assert_close(ours, naive)
    weight = torch.randn_like(naive)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), tensors),
        torch.autograd.grad((naive * weight).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("length", "d_v", "scaling"), [(1, 8, 0.3), (1, 6, None), (T, 6, None), (T, 12, 0.3)])
def test_other_shapes_against_naive_attention(attention, gated, length, d_v, scaling):
    """One query behind a cache, values of another width, the default scale, one prefix for all rows."""
    model = get_peft_model(BACKBONES["llama"].build(attention), joint())
    module = model.base_model.model.model.layers[0].self_attn
    q, k, v = torch.randn(2, 4, length, 8), torch.randn(2, 2, T, 8), torch.randn(2, 2, T, d_v)
    p_k, p_v = torch.randn(1, 2, P, 8), torch.randn(1, 2, P, d_v)
    scores = torch.randn(2, 1, length, P) if gated else None
    allowed = torch.ones(2, length, T).bool()
    allowed[1, :, 1] = False
    mask = allowed[:, None]
    if attention == "eager":
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    scale = 8**-0.5 if scaling is None else scaling
    kwargs = {"scaling": scale if attention == "eager" else scaling}
    ours, weights = prefix_attention(module, q, k, v, mask, PrefixStates(p_k, p_v, *factors(scores)), **kwargs)
    pairs = (p.expand(2, -1, -1, -1) for p in (p_k, p_v))
    torch.testing.assert_close(ours, naive_attention(q, k, v, allowed, *pairs, scores, None, scale))
    assert weights is None or weights.shape == (2, 4, length, T)


@pytest.mark.parametrize("causal", [None, False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_causality_without_a_mask(gated, causal):
    """By the keyword, or else by the module; a bias for the keys changes nothing in that."""
    model = get_peft_model(BACKBONES["llama"].build("sdpa"), joint())
    module = model.base_model.model.model.layers[0].self_attn
    q, k, v = torch.randn(2, 4, T, 8), torch.randn(2, 2, T, 8), torch.randn(2, 2, T, 8)
    p_k, p_v = torch.randn(2, 2, P, 8), torch.randn(2, 2, P, 8)
    scores = torch.randn(2, 1, T, P) if gated else None
    kwargs = {"scaling": 0.3} | ({} if causal is None else {"is_causal": causal})
    for module.is_causal in (True, False):
        seen = torch.ones(2, T, T).bool()
        if module.is_causal if causal is None else causal:
            seen = seen.tril()
        ours, _ = prefix_attention(module, q, k, v, None, PrefixStates(p_k, p_v, *factors(scores)), **kwargs)
        torch.testing.assert_close(ours, naive_attention(q, k, v, seen, p_k, p_v, scores, None, 0.3))


def test_prefixes_one_behind_the_other():
    """Those of several adapters: their vectors side by side, and each token's log-gate on its own adapter's alone."""
    sizes, gated = (2, 3, 1, 2), (True, False, True, False)
    parts = [
        PrefixStates(
            *(torch.randn(1, 2, n, d) for d in (4, 5)),
            *((torch.randn(3, 1, T, 1), torch.ones(1, 1, n, 1)) if has_gate else (None, None)),
        )
        for n, has_gate in zip(sizes, gated, strict=True)
    ]
    states = joined(parts, batch=3)
    assert states.p_k.shape == (3, 2, 8, 4)
    assert states.p_v.shape == (3, 2, 8, 5)
    scores, start = states.scores(), 0
    for part, n, has_gate in zip(parts, sizes, gated, strict=True):
        columns = slice(start, start + n)
        assert torch.equal(states.p_k[:, :, columns], part.p_k.expand(3, -1, -1, -1))
        assert torch.equal(states.p_v[:, :, columns], part.p_v.expand(3, -1, -1, -1))
        expected = part.u.expand(-1, -1, -1, n) if has_gate else torch.zeros(3, 1, T, n)
        torch.testing.assert_close(scores[..., columns], expected)
        start += n
    assert joined(parts[1::2], batch=3).scores() is None


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_position_bias_leaves_the_prefix_alone(attention):
    """T5's bias is for keys; the prefix gets none."""
    model = get_peft_model(BACKBONES["t5"].build(attention), joint())
    module = model.base_model.model.encoder.block[0].layer[0].SelfAttention
    q, k, v = (torch.randn(2, 4, T, 8) for _ in range(3))
    p_k, p_v, bias = torch.randn(2, 4, P, 8), torch.randn(2, 4, P, 8), torch.randn(1, 4, T, T)
    ours, _ = prefix_attention(module, q, k, v, None, PrefixStates(p_k, p_v), position_bias=bias, scaling=1.0)
    everything = torch.ones(2, T, T).bool()
    torch.testing.assert_close(ours, naive_attention(q, k, v, everything, p_k, p_v, None, bias, 1.0))


@pytest.mark.parametrize("backbone", ["llama", "gpt2", "qwen2", "opt"])
def test_equals_peft_prefix_tuning(backbone):
    """The same vectors in peft's cache give the same logits, once its shift of positions is made up for."""
    family = BACKBONES[backbone]
    theirs = get_peft_model(family.build(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)).eval()
    table = theirs.prompt_encoder["default"].embedding.weight  # (P, layers * 2 * heads * d)
    ours = get_peft_model(family.build(), joint(num_virtual_tokens=P)).eval()
    layers = [layer.sublayer_of["default"] for layer in ours.modules() if isinstance(layer, PrefixLayer)]
    heads, _, d = layers[0].P_K.shape
    with torch.no_grad():
        table.normal_(0, 0.5)
        vectors = table.view(P, 2 * len(layers), heads, d).permute(1, 2, 0, 3)
        for i, prefix in enumerate(layers):
            prefix.P_K.copy_(vectors[2 * i])
            prefix.P_V.copy_(vectors[2 * i + 1])
        inputs = family.inputs(padding="none")
        positions = torch.arange(inputs["input_ids"].shape[1]).expand_as(inputs["input_ids"]) + P
        expected = output(theirs, inputs)  # peft counts positions from P on
        torch.testing.assert_close(output(ours, inputs, position_ids=positions), expected, rtol=1e-4, atol=1e-4)
        with ours.disable_adapter():
            assert (output(ours, inputs, position_ids=positions) - expected).abs().max() > 0.1


def test_through_the_cache_equals_a_filled_cache():
    """Falcon does not use AttentionInterface: the same logits as from a cache that holds the prefixes."""
    family = BACKBONES["falcon"]
    model = get_peft_model(family.build(), joint(num_virtual_tokens=P)).eval()
    randomise(model)
    cache = DynamicCache()
    for i, layer in enumerate(layer for layer in model.modules() if isinstance(layer, PrefixLayer)):
        vectors = layer.sublayer_of["default"].vectors()
        cache.update(*(p.repeat_interleave(2, dim=0).expand(3, -1, -1, -1) for p in vectors), i)  # 4 heads share 2
    ids = family.inputs()["input_ids"]
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        ours = output(model, {"input_ids": ids}, position_ids=positions)
        with model.disable_adapter():
            expected = output(model, {"input_ids": ids}, position_ids=positions, past_key_values=cache)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("gated", [True, False])
def test_through_the_cache_without_a_mask(gated):
    """LED hands its decoder no mask: the causal one is made, for one new token and for several."""
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "attention_window": [4]}
    config = AutoConfig.for_model("led", vocab_size=60, **sizes, **heads)
    base = AutoModelForSeq2SeqLM.from_config(config).eval()
    model = get_peft_model(base, UniPELTConfig(methods=["prefix"], gated=gated, init="paper"))
    randomise(model)
    inputs = {"input_ids": torch.randint(3, 60, (2, 8)), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    ids = torch.randint(3, 60, (2, 6))
    with torch.no_grad():
        full = model(**inputs, decoder_input_ids=ids, use_cache=False).logits
        cache, parts = None, []
        for chunk in ids.split([3, 1, 2], dim=1):
            result = model(**inputs, decoder_input_ids=chunk, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            parts.append(result.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1)[:, :4], full[:, :4], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["projected_prefix", "unipelt", "unipelt_paper", "mam"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_eager_and_sdpa_agree(method, backbone):
    family = BACKBONES[backbone]
    results = []
    for attention in ("eager", "sdpa"):
        model = get_peft_model(family.build(attention), METHODS[method]())
        randomise(model)
        with torch.no_grad():
            results.append([output(model.eval(), family.inputs(padding=side)) for side in ("right", "none")])
    real = family.inputs()["attention_mask"].bool()
    real = torch.ones(results[0][0].shape[:2]).bool() if family.kind == "seq2seq" else real
    torch.testing.assert_close(results[0][0][real], results[1][0][real], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backbone", ["bert", "distilbert", "modernbert", "albert", "t5", "bart"])
def test_padding_changes_nothing_in_encoders(method, backbone):
    """A padded example and the same example alone: the same states, mean gates included."""
    family = BACKBONES[backbone]
    model = get_peft_model(family.build(), METHODS[method]())
    randomise(model)
    padded = family.inputs()
    alone = {key: value[1:2] for key, value in padded.items()}
    alone |= {key: alone[key][:, :6] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        wide, narrow = output(model.eval(), padded)[1:2], output(model, alone)
    torch.testing.assert_close(wide[:, : narrow.shape[1]], narrow, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backbone", ["llama", "gpt2", "gpt_neox", "opt"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_left_padding_changes_nothing_in_decoders(method, backbone, attention):
    family = BACKBONES[backbone]
    model = get_peft_model(family.build(attention), METHODS[method]())
    randomise(model)
    padded = family.inputs(padding="left")
    positions = (padded["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    alone = {key: value[1:2, 3:] for key, value in padded.items()}
    with torch.no_grad():
        wide = output(model.eval(), padded, position_ids=positions)[1:2, 3:]
        narrow = output(model, alone, position_ids=positions[1:2, 3:])
    torch.testing.assert_close(wide, narrow, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["projected_prefix", "unipelt", "unipelt_paper"])
@pytest.mark.parametrize("backbone", ["llama", "gpt2", "gemma2", "mistral"])
def test_static_cache_and_sampling(method, backbone):
    """The static cache, and sampling from the same seed, give the tokens of the dynamic cache and of none."""
    family = BACKBONES[backbone]
    model = get_peft_model(family.build(), METHODS[method]())
    randomise(model)
    model.eval()
    inputs = family.inputs(padding="left")
    options = {"max_new_tokens": 6, "eos_token_id": None}
    greedy = model.generate(**inputs, **options, do_sample=False)
    static = model.generate(**inputs, **options, do_sample=False, cache_implementation="static", disable_compile=True)
    assert torch.equal(greedy, static)
    samples = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        samples.append(model.generate(**inputs, **options, do_sample=True, use_cache=use_cache))
    assert torch.equal(*samples)


@pytest.mark.parametrize("init", ["base", "paper"])
def test_packed_sequences(init):
    """Sequences packed in one row by position_ids: the same logits as one by one."""
    model = get_peft_model(BACKBONES["llama"].build(), UniPELTConfig(bottleneck_size=4, init=init))
    randomise(model)
    model.eval()
    one, two = torch.randint(3, 60, (1, 4)), torch.randint(3, 60, (1, 5))
    packed = torch.cat([one, two], dim=1)
    positions = torch.cat([torch.arange(4), torch.arange(5)])[None]
    with torch.no_grad():
        together = model(input_ids=packed, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(together[:, :4], model(input_ids=one).logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together[:, 4:], model(input_ids=two).logits, rtol=1e-4, atol=1e-4)


def test_switching_the_implementation_and_reading_attentions():
    """set_attn_implementation works after injection; attentions keep their shape, without the prefix's columns."""
    family = BACKBONES["bert"]
    model = get_peft_model(family.build("sdpa"), joint(num_virtual_tokens=P)).eval()
    randomise(model)
    inputs = family.inputs()
    with torch.no_grad():
        before = output(model, inputs)
        model.base_model.model.set_attn_implementation("eager")
        result = model(**inputs, output_attentions=True)
    torch.testing.assert_close(result.last_hidden_state, before, rtol=1e-4, atol=1e-4)
    assert result.attentions[0].shape == (3, 4, 9, 9)
    assert (result.attentions[0].sum(-1) < 1).all()  # the rest went to the prefix


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_kernels_that_cannot_take_a_prefix(implementation):
    """A clear error, before the model is touched or, switched later, before anything wrong is computed."""
    model = BACKBONES["llama"].build()
    model.config._attn_implementation_internal = implementation
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=f"`attn_implementation` \\(='{implementation}'\\) cannot take a prefix"):
        get_peft_model(model, joint())
    assert names == [name for name, _ in model.named_parameters()]
    model.config._attn_implementation_internal = "sdpa"
    tuned = get_peft_model(model, joint())
    model.config._attn_implementation_internal = implementation
    with pytest.raises(ValueError, match="cannot take a prefix"):
        tuned(input_ids=torch.ones(1, 4, dtype=torch.long), attention_mask=torch.ones(1, 1, 4, 4).bool())


def counting(layers=None):
    """A prefix that T5's relative positions count."""
    options = {"num_virtual_tokens": 3, "shift_positions": True}
    return ComposedConfig(placements=[Placement("prefix", "attention", layers=layers, options=options)])


def test_counted_positions_move_the_keys():
    """T5's bias for query i is B(0 - i) on the first prefix vector and B(j + 3 - i) on key j."""
    family = BACKBONES["t5"]
    model, inputs = get_peft_model(family.build("eager"), counting()).eval(), family.inputs()
    attention = model.get_base_model().encoder.block[0].layer[0].SelfAttention
    seen = {}
    attention.register_forward_hook(lambda *args: seen.update(bias=args[-1][1]))
    with torch.no_grad():
        output(model, inputs)
        length = inputs["input_ids"].shape[1]
        expected = attention.compute_bias(length, length + 3)
    torch.testing.assert_close(seen["bias"], expected)


@pytest.mark.parametrize("cache", [None, "static"])
def test_counted_positions_in_generation(cache):
    family = BACKBONES["t5"]
    model = get_peft_model(family.build(), counting()).eval()
    randomise(model)
    inputs = {key: value for key, value in family.inputs().items() if key != "decoder_input_ids"}
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        cached = model.generate(**inputs, **options, cache_implementation=cache)
        assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))


def test_counted_positions_need_whole_stacks_and_batches():
    family = BACKBONES["t5"]
    with pytest.raises(ValueError, match=re.escape("`layers` (=[0, 2, 3]) must hold every layer of a stack")):
        get_peft_model(family.build(), counting(layers=[0, 2, 3]))
    model, inputs = get_peft_model(family.build(), counting(layers=[2, 3])).eval(), family.inputs()
    names = ["default", "__base__", "default"]
    with pytest.raises(ValueError, match=r"`adapter_names` \(=.*\) cannot be mixed in one batch"):
        model(**inputs, adapter_names=names)
