"""The keys and values of a side network, kept in the backbone's own cache.

Their layers follow the backbone's. So every change of the cache between two forwards (beams reordered, tokens cropped,
rows repeated, all reset) applies to both networks.
"""

from collections.abc import Mapping
from typing import Any

from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedConfig, StaticCache

from hf_peft_ext.model.structure import CACHES
from hf_peft_ext.validation.checks import check


def check_cache(arguments: Mapping[str, Any]) -> None:
    """Refuse caches that cannot hold the layers of two networks.

    Args:
        arguments: of the backbone's forward, by name.

    Raises:
        ValueError: the cache is of another kind, or offloaded.
    """
    name = next((name for name in CACHES if arguments.get(name) is not None), None)
    if name is None:
        return
    cache = arguments[name]
    parts = (cache.self_attention_cache, cache.cross_attention_cache) if isinstance(cache, EncoderDecoderCache) else ()
    for part in parts or (cache,):
        extendable = type(part) in (DynamicCache, StaticCache) and not part.offloading
        check(name, type(part).__name__, extendable, "must be a dynamic or static cache, not offloaded, for a ladder")


def side_cache(cache: Cache, config: PreTrainedConfig, n_layers: int, n_tokens: int) -> Cache:
    """The side network's part of a cache, added where it is missing. Its layers are shared, not copied.

    Args:
        cache: the backbone's, after its forward.
        config: the side network's.
        n_layers: number of the backbone's blocks.
        n_tokens: number of tokens of this forward.

    Raises:
        ValueError: the cache has tokens that this side network has not seen.
    """
    if isinstance(cache, EncoderDecoderCache):
        own = side_cache(cache.self_attention_cache, config, n_layers, n_tokens)
        source = cache.cross_attention_cache
        return EncoderDecoderCache(own, side_cache(source, config, n_layers, source.get_seq_length()))
    if len(cache.layers) <= n_layers:
        seen = int(cache.get_seq_length())
        rule = f"has {seen - n_tokens} tokens that were read without this ladder; start with an empty cache"
        check("cache", type(cache).__name__, seen <= n_tokens, rule)
        cache.layers.extend(empty_like(cache, config).layers)
    return Cache(layers=cache.layers[n_layers:])


def empty_like(cache: Cache, config: PreTrainedConfig) -> Cache:
    """An empty cache of the same kind, for the model of a config."""
    if isinstance(cache, StaticCache):
        return StaticCache(config, max_cache_len=cache.layers[0].get_max_length())
    return DynamicCache(config=config)
