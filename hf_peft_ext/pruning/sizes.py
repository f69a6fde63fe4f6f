"""The sizes of a thin model, from the large one's config alone.

A thin model has the depth, the vocabulary and the positions of the large one, and a fraction 1 / s of its width, heads
and inner width. What s is hangs on how the factor r is read:

    "width"        s = r        every dimension / r; a weight matrix / r^2 (the text of the plug-in paper, section 2)
    "parameters"   s = sqrt(r)  a weight matrix / r (what the paper's Table 2 shows, and r = 16 in all its experiments)

Parameter-efficient Tuning for Large Language Model without Calculating Its Gradients, Jin et al. 2023.
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..placement import check, check_positive

Reading = Literal["width", "parameters"]


@dataclass(frozen=True)
class Family:
    """How the config of an architecture says its sizes.

    Args:
        ffn: field of the inner width of the feed-forward network.
        own_head_dim: whether the width of a head is a field of its own; else it is the model's width / heads.
        grouped: whether several query heads may share a key and value head.
    """

    ffn: str
    own_head_dim: bool = False
    grouped: bool = False


# Fields for the inner width of the feed-forward network, for heads of keys, and for what a second stack or the
# embeddings have of a size that the first stack has too.
FFN = ("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "hidden_dim", "n_inner")
TWINS = {
    "decoder_attention_heads": "heads",
    "decoder_ffn_dim": "ffn",
    "embedding_size": "width",
    "word_embed_proj_dim": "width",
}
# Architectures whose attention takes a head's width from the config, where the config's class does not name it.
OWN_HEAD_DIM = {"qwen2", "mistral", "llama"}
SHARED = "shares one block among its layers"
# What the shapes of weights do not tell.
UNCUT = {
    "albert": SHARED,
    "bloom": "has a bias over positions that is another for each number of heads",
    "deepseek_v3": "has experts, and keys and values from a latent vector",
}


@dataclass(frozen=True)
class Sizes:
    """Channels of the residual stream, heads, heads of keys and values, channels of a head, inner width of the FFN."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int


@dataclass(frozen=True)
class ThinSizes:
    """A thin model that has not been built.

    Args:
        config: its config.
        parameters: number of its parameters; tied ones count once.
        embeddings: how many of them are the embeddings of tokens and positions, and a head tied to them or not.
    """

    config: PreTrainedConfig
    parameters: int
    embeddings: int


def family_of(config: PreTrainedConfig) -> Family:
    """How a config says its sizes, by the fields that it has.

    Raises:
        ValueError: how to cut this architecture is not known.
    """
    reason = UNCUT.get(config.model_type)
    check("model_type", config.model_type, reason is None, f"cannot be cut to a thin model: it {reason}")
    sizes = all(isinstance(getattr(config, name, None), int) for name in ("hidden_size", "num_attention_heads"))
    ffn = next((name for name in FFN if hasattr(config, name)), None)
    rule = "cannot be cut to a thin model: its config has no known fields for width, heads and inner width"
    check("model_type", config.model_type, sizes and ffn is not None, rule)
    named = "head_dim" in vars(config) or "head_dim" in type(config).attribute_map
    own = named or config.model_type in OWN_HEAD_DIM
    return Family(ffn or "", own_head_dim=own, grouped=hasattr(config, "num_key_value_heads"))


def sizes_of(config: PreTrainedConfig) -> Sizes:
    """The sizes that a config gives.

    Raises:
        ValueError: how to cut this architecture is not known, or its key heads do not divide its heads.
    """
    family = family_of(config)
    width, heads = config.hidden_size, config.num_attention_heads
    kv_heads = config.num_key_value_heads if family.grouped else heads
    rule = f"must divide `num_attention_heads` (={heads}); a config that does not name it has its class's default"
    check("num_key_value_heads", kv_heads, heads % kv_heads == 0, rule)
    head_dim = getattr(config, "head_dim", None) if family.own_head_dim else None
    ffn = getattr(config, family.ffn) or 4 * width  # GPT-2 says None
    found = Sizes(width=width, heads=heads, kv_heads=kv_heads, head_dim=head_dim or width // heads, ffn=ffn)
    for name, twin in TWINS.items():
        value = getattr(config, name, None)
        rule = f"must be {getattr(found, twin)}, as in the rest of the model, to be cut to a thin one"
        check(name, value, value in (None, getattr(found, twin)), rule)
    return found


def thinner(large: Sizes, family: Family, r: float, reading: Reading) -> Sizes:
    """The sizes / s, rounded to the nearest, never below 1.

    Heads are kept or dropped whole, key and value heads together with the queries that share them, so `head_dim`
    stays. Where a class has no head width of its own, the width is that of the heads kept, and only where that would
    leave less than one head is the one head cut to the width / s. A width that is a multiple of the number of heads
    stays one: Llama's config asks for it.

    Raises:
        ValueError: `r` is below 1, or `reading` unknown.
    """
    check_positive("r", r)
    check("r", r, r >= 1, "must be at least 1: a thin model is not wider than the large one")
    check("reading", reading, reading in get_args(Reading), f"must be one of {', '.join(get_args(Reading))}")
    s = r if reading == "width" else math.sqrt(r)

    def part(size: float) -> int:
        return max(1, round(size / s))

    kv_heads, head_dim = part(large.kv_heads), large.head_dim
    heads = kv_heads * max(1, round(large.heads / s / kv_heads))
    if family.own_head_dim:
        step = heads if large.width % large.heads == 0 else 1
        width = step * max(1, round(large.width / s / step))
    else:
        head_dim = min(head_dim, part(large.width)) if heads == 1 else head_dim
        width = heads * head_dim
    return Sizes(width, heads, kv_heads, head_dim, part(large.ffn))


def thin_config(config: PreTrainedConfig, r: float, reading: Reading = "width") -> PreTrainedConfig:
    """The config of the thin model: a copy with the thin sizes, and without quantisation.

    Raises:
        ValueError: `r` is below 1, `reading` unknown, or the architecture cannot be cut.
    """
    family = family_of(config)
    sizes = thinner(sizes_of(config), family, r, reading)
    thin = copy.deepcopy(config)
    thin.hidden_size, thin.num_attention_heads = sizes.width, sizes.heads
    setattr(thin, family.ffn, sizes.ffn)
    if family.grouped:
        thin.num_key_value_heads = sizes.kv_heads
    if family.own_head_dim:
        thin.head_dim = sizes.head_dim
    for name, twin in TWINS.items():
        if getattr(config, name, None) is not None:
            setattr(thin, name, getattr(sizes, twin))
    vars(thin).pop("quantization_config", None)
    return thin


def thin_sizes(
    config: PreTrainedConfig,
    r: float,
    reading: Reading = "width",
    model_class: type[PreTrainedModel] | None = None,
) -> ThinSizes:
    """How large a thin model would be, without building it: no weights are needed, and none are made.

    Args:
        config: the large model's config.
        r: the factor; 1 gives the large model's own size.
        reading: what r divides, every dimension ("width") or the number of parameters ("parameters").
        model_class: class of the model; None for the language model of this architecture.

    Raises:
        ValueError: `r` is below 1, `reading` unknown, or the architecture cannot be cut.
    """
    thin = thin_config(config, r, reading)
    with torch.device("meta"):
        model = model_class(thin) if model_class else language_model(thin)
    total = sum(p.numel() for p in model.parameters())
    embeddings = {id(p): p.numel() for p in embedding_weights(model)}
    return ThinSizes(thin, total, sum(embeddings.values()))


def language_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The language model of an architecture, or its bare body where it has none."""
    for auto in (AutoModelForSeq2SeqLM, AutoModelForMaskedLM, AutoModelForCausalLM):  # BERT can be a decoder too
        if type(config) in auto._model_mapping:
            return auto.from_config(config)
    return AutoModel.from_config(config)


def embedding_weights(model: PreTrainedModel) -> list[Tensor]:
    """The matrices over the vocabulary and over positions: embeddings and the head, tied or not."""
    width = model.config.hidden_size
    outside = [m.weight for m in model.modules() if isinstance(m, nn.Embedding) and m.embedding_dim == width]
    head = model.get_output_embeddings()
    return outside + ([head.weight] if head is not None else [])
