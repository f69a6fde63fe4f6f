"""Generation with a ladder: the side network has keys and values of its own in the model's cache.

Checked: tokens with the cache against those without it, for every way of decoding that moves the cache about.
"""

import functools
import inspect

import pytest
import torch
from transformers import DynamicCache, StaticCache

from hf_peft_ext import LadderConfig
from hf_peft_ext.structure import CACHES, given_cache

from .backbones import BACKBONES
from .test_ladder import laddered
from .test_rank_packing import adapted, assert_packing_changes_nothing

DECODERS = ("t5", "gpt2", "llama", "qwen2", "mistral")
every_decoder = pytest.mark.parametrize("family", DECODERS)
LENGTH = {"max_new_tokens": 6, "eos_token_id": None}


def named(model, cache):
    """The cache, by the name that this version's forwards have for it."""
    names = inspect.signature(model.get_base_model().forward).parameters
    return {next(name for name in CACHES if name in names): cache}


def prompts(family):
    inputs = BACKBONES[family].inputs(padding="left")
    inputs.pop("decoder_input_ids", None)
    return inputs


@every_decoder
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cached_generation_equals_uncached(family, attention):
    """Sampled, and beams of several sequences; greedy and beam search are in the contract."""
    model, _ = laddered(family, attention=attention)
    for options in ({"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 2}):
        found = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            found.append(
                model.generate(**prompts(family), **{"do_sample": False, **LENGTH, **options}, use_cache=use_cache)
            )
        assert torch.equal(*found), options


@every_decoder
def test_static_cache(family):
    model, _ = laddered(family)
    expected = model.generate(**prompts(family), **LENGTH, do_sample=False, use_cache=False)
    options = {"cache_implementation": "static", "disable_compile": True}
    for beams in (1, 2):
        if beams == 2:
            expected = model.generate(**prompts(family), **LENGTH, num_beams=2, do_sample=False, use_cache=False)
        found = model.generate(**prompts(family), **LENGTH, **options, num_beams=beams, do_sample=False)
        assert torch.equal(found, expected)


@every_decoder
def test_layers_kept(family):
    """Fewer rungs than blocks: the side network's part of the cache is shorter than the backbone's."""
    model, _ = laddered(family, LadderConfig(r=2, layers_to_keep=[1, 3] if family == "t5" else 1))
    options = {**LENGTH, "do_sample": False, "num_beams": 2}
    found = [model.generate(**prompts(family), **options, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*found)


def test_logits_token_by_token():
    """Through a cache made by the model, by the user, and a static one: the logits of one forward over all."""
    model, inputs = laddered("llama")
    ids = inputs["input_ids"]
    config = model.get_base_model().config
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        for cache in (None, DynamicCache(), DynamicCache(config=config), StaticCache(config, max_cache_len=12)):
            found = []
            for i in range(ids.shape[1]):
                result = model(input_ids=ids[:, i : i + 1], **named(model, cache), use_cache=True)
                cache = given_cache(result)
                found.append(result.logits)
            torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-4)


def test_cropped_cache():
    """Tokens taken back from the cache are taken back from the side network's too."""
    model, inputs = laddered("llama")
    ids = inputs["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        cache = given_cache(model(input_ids=torch.cat([ids[:, :5], ids[:, :3]], 1), use_cache=True))
        cache.crop(-3)
        found = model(input_ids=ids[:, 5:], **named(model, cache)).logits
    torch.testing.assert_close(found, expected[:, 5:], rtol=1e-4, atol=1e-4)


def test_assisted_generation():
    """Speculative decoding by prompt look-up crops the cache."""
    model, _ = laddered("llama")
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    expected = model.generate(input_ids=ids, **LENGTH, do_sample=False)
    assert torch.equal(model.generate(input_ids=ids, **LENGTH, do_sample=False, prompt_lookup_num_tokens=2), expected)


def test_encoder_outputs_are_read_once():
    """A user's own encoder outputs hold both networks' states; those made without the ladder are refused."""
    model, inputs = laddered("t5")
    base = model.get_base_model()
    with torch.no_grad():
        expected = model(**inputs).logits
        states = base.encoder(inputs["input_ids"], attention_mask=inputs["attention_mask"])
        assert states.last_hidden_state.shape[-1] == 32 + 8
        rest = {key: inputs[key] for key in ("attention_mask", "decoder_input_ids")}
        assert torch.equal(model(encoder_outputs=states, **rest).logits, expected)
        with model.disable_adapter():
            states = base.encoder(inputs["input_ids"])
        with pytest.raises(ValueError, match=r"`encoder_outputs.shape\[-1\]` \(=32\) must be 40"):
            model(encoder_outputs=states, **rest)


def test_refused_caches():
    model, inputs = laddered("llama")
    ids = inputs["input_ids"]
    with torch.no_grad():
        with model.disable_adapter():
            cache = given_cache(model(input_ids=ids, use_cache=True))
        with pytest.raises(ValueError, match="has 9 tokens that were read without this ladder"):
            model(input_ids=ids[:, :1], **named(model, cache))
        with pytest.raises(ValueError, match="must be a dynamic or static cache, not offloaded"):
            model(input_ids=ids, **named(model, DynamicCache(config=model.config, offloading=True)))


@pytest.mark.parametrize("family", DECODERS)
def test_ranking_choices_packed(family):
    """All choices behind one prompt, under a mask: losses and gradients of each choice by itself."""
    assert_packing_changes_nothing(adapted(family, functools.partial(LadderConfig, r=4)))
