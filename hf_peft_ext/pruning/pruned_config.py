"""The config of a pruned model: depth, vocabulary and positions stay, width, heads and inner width are divided by s.

The factor r is read in one of two ways:

    "width"        s = r        every dimension / r; a weight matrix / r^2 (the text of the plug-in paper, section 2)
    "parameters"   s = sqrt(r)  a weight matrix / r (what the paper's Table 2 shows, and r = 16 in all its experiments)

Parameter-efficient Tuning for Large Language Model without Calculating Its Gradients, Jin et al. 2023.

The sizes are read from the blocks. A class of transformers builds its blocks from its config, so a few names of
config fields have to be listed here; the pruned model is checked weight by weight when it is filled.
"""

import copy
import inspect
import math
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

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

from hf_peft_ext.model.sites import find_sites
from hf_peft_ext.model.structure import is_attention, is_norm, layer_of, layer_paths
from hf_peft_ext.pruning.sizes import Sizes, refuse_pruning, sizes_of
from hf_peft_ext.validation.checks import check, check_positive

Reduce = Literal["width", "parameters"]

# Config fields beside `hidden_size` and `num_attention_heads`, which every config has by these names.
SAME_AS_WIDTH = ("embedding_size", "word_embed_proj_dim")
HEAD_FIELDS = ("decoder_attention_heads", "encoder_attention_heads")
KV_HEAD_FIELDS = ("num_key_value_heads", "num_kv_heads")
FFN_FIELDS = (
    *("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim", "n_inner"),
    *("ffn_hidden_size", "d_inner"),
)


@dataclass(frozen=True)
class PrunedSizes:
    """The sizes of a pruned model that has not been built.

    Args:
        config: its config.
        parameters: number of its parameters; tied ones count once.
        embeddings: the part of `parameters` in embeddings of tokens and positions, and in the head, tied or not.
    """

    config: PreTrainedConfig
    parameters: int
    embeddings: int


def pruned_config(source: PreTrainedModel | PreTrainedConfig, r: float, reduce: Reduce = "width") -> PreTrainedConfig:
    """A copy of a config with the sizes of the pruned model, and without quantization.

    Args:
        source: the large model, or its config, from which a model without data is built to read its structure.
        r: the factor, at least 1.
        reduce: what r divides, every dimension ("width") or the number of parameters ("parameters").

    Raises:
        ValueError: `r` is below 1, `reduce` unknown, or the architecture cannot be cut.
    """
    check_positive("r", r)
    check("r", r, r >= 1, "must be at least 1: a pruned model is not wider than the large one")
    check("reduce", reduce, reduce in get_args(Reduce), f"must be one of {', '.join(get_args(Reduce))}")
    model = source if isinstance(source, PreTrainedModel) else meta_model(AutoModel, source)
    config, large = model.config, sizes_of(model)
    named = all(isinstance(getattr(config, name, None), int) for name in ("hidden_size", "num_attention_heads"))
    if not named:
        refuse_pruning(model, "its config has no `hidden_size` and `num_attention_heads` of its own")
    s = r if reduce == "width" else math.sqrt(r)
    own_head_dim = reads_head_dim(model)
    small = divided(large, s, own_head_dim, keeps_heads(model))
    pruned = copy.deepcopy(config)
    set_sizes(pruned, large, small, own_head_dim)
    divide_ffn(pruned, s, next((site.d_in for site in find_sites(model) if site.name == "ffn_output"), 0))
    vars(pruned).pop("quantization_config", None)
    return pruned


def divided(large: Sizes, s: float, own_head_dim: bool, keep_head_dim: bool) -> Sizes:
    """The sizes / s, rounded to the nearest, never below 1.

    Heads are kept or dropped whole, key and value heads together with the queries that share them, so `head_dim`
    stays. Where a class has no head width of its own, the width is that of the kept heads, and only where that would
    leave less than one head is the one head cut to the width / s. A width that is a multiple of the number of heads
    stays one: Llama's config asks for it.

    Args:
        large: the sizes of the large model.
        s: the factor.
        own_head_dim: whether the class takes the width of a head from its config, not from width / heads.
        keep_head_dim: whether the width of a head must stay, as rotary positions need.
    """

    def part(size: float) -> int:
        return max(1, round(size / s))

    kv_heads, head_dim = part(large.kv_heads), large.head_dim
    heads = kv_heads * max(1, round(large.heads / s / kv_heads))
    if own_head_dim:
        step = heads if large.width % large.heads == 0 else 1
        width = step * max(1, round(large.width / s / step))
    else:
        head_dim = min(head_dim, part(large.width)) if heads == 1 and not keep_head_dim else head_dim
        width = heads * head_dim
    return Sizes(width, heads, kv_heads, head_dim)


def set_sizes(config: PreTrainedConfig, large: Sizes, small: Sizes, own_head_dim: bool) -> None:
    """Replace the large sizes in a config by the small ones, in each field that has the large one."""
    config.hidden_size, config.num_attention_heads = small.width, small.heads
    if own_head_dim:
        config.head_dim = small.head_dim
    for names, old, new in (
        (SAME_AS_WIDTH, large.width, small.width),
        (HEAD_FIELDS, large.heads, small.heads),
        (KV_HEAD_FIELDS, large.kv_heads, small.kv_heads),
    ):
        for name in names:
            if vars(config).get(name) == old:
                setattr(config, name, new)


def divide_ffn(config: PreTrainedConfig, s: float, width: int) -> None:
    """Divide every field that holds an inner width of feed-forward networks.

    Args:
        config: changed in place.
        s: the factor.
        width: inner width of the first block; replaces a field whose value is None (GPT-2).
    """
    for name in FFN_FIELDS:
        if name in vars(config):
            setattr(config, name, max(1, round((getattr(config, name) or width) / s)))


def reads_head_dim(model: nn.Module) -> bool:
    """Whether the attention modules of a model take the width of a head from the config, by their code."""
    attention = next(type(module) for module in model.modules() if is_attention(module))
    config = getattr(model, "config", None)
    field = getattr(type(config), "attribute_map", {}).get("head_dim", "head_dim")
    try:
        code = inspect.getsource(attention.__init__)
    except (OSError, TypeError):  # no source: the field has to be the config's own
        return field in vars(config)
    return bool(re.search(rf'config\.({field}|head_dim)\b|getattr\(\s*config, "({field}|head_dim)"', code))


def keeps_heads(model: nn.Module) -> bool:
    """Whether the channels of a head belong together: rotary positions turn pairs of them, a norm may span them."""
    if any(name.endswith("inv_freq") for name, _ in model.named_buffers()):
        return True
    attentions = [module for module in model.modules() if is_attention(module)]
    return any(is_norm(child) for attention in attentions for child in attention.children())


def pruned_sizes(
    config: PreTrainedConfig,
    r: float,
    reduce: Reduce = "width",
    model_class: type[PreTrainedModel] | None = None,
) -> PrunedSizes:
    """The sizes of a pruned model, without weights of either model.

    Args:
        config: the large model's config.
        r: the factor; 1 gives the large model's own size.
        reduce: what r divides, every dimension ("width") or the number of parameters ("parameters").
        model_class: class of the model; None for the language model of this architecture.

    Raises:
        ValueError: `r` is below 1, `reduce` unknown, or the architecture cannot be cut.
    """
    pruned = pruned_config(config, r, reduce)
    model = meta_model(model_class or language_model(pruned), pruned)
    total = sum(p.numel() for p in model.parameters())
    embeddings = {id(p): p.numel() for p in embedding_weights(model)}
    return PrunedSizes(pruned, total, sum(embeddings.values()))


def meta_model(model_class: Any, config: PreTrainedConfig) -> PreTrainedModel:
    """A model on the meta device, from its class or from an Auto class."""
    with torch.device("meta"):
        return model_class.from_config(config) if hasattr(model_class, "from_config") else model_class(config)


def language_model(config: PreTrainedConfig) -> Any:
    """The Auto class of the language model of an architecture, or of its body where it has none."""
    autos = (AutoModelForSeq2SeqLM, AutoModelForMaskedLM, AutoModelForCausalLM)  # BERT can be a decoder too
    return next((auto for auto in autos if type(config) in auto._model_mapping), AutoModel)


def embedding_weights(model: PreTrainedModel) -> list[Tensor]:
    """The matrices over the vocabulary and over positions: embeddings and the head, tied or not."""
    layers = layer_paths(model)
    outside = [m.weight for path, m in model.named_modules()
               if isinstance(m, nn.Embedding) and layer_of(path, layers) is None]  # fmt: skip
    head = model.get_output_embeddings()
    return outside + ([head.weight] if head is not None else [])
