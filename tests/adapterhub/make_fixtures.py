"""Saves small adapters with AdapterHub's own library, and its logits with them, for tests/test_adapterhub.py.

adapters 1.3.0 needs transformers 4.57, so it has an environment of its own:

    python3.11 -m venv adapters_env
    adapters_env/bin/pip install torch==2.13.0 adapters==1.3.0
    adapters_env/bin/python tests/adapterhub/make_fixtures.py [FAMILY ...]

It writes one archive for each family of models: a folder for each method, as `save_adapter` leaves it, and the logits.
Attention is eager: with sdpa, no mask and no cache, adapters 1.3.0 silently drops a decoder's prefixes. Every kind of
tensor in a checkpoint is shown to matter: with its sign turned, the logits differ by more than 1e-2.
"""

import re
import sys
import tempfile
import zipfile
from pathlib import Path

import adapters
import torch
from adapters import (
    AdapterPlusConfig,
    CompacterConfig,
    CompacterPlusPlusConfig,
    ConfigUnion,
    DoRAConfig,
    DoubleSeqBnConfig,
    IA3Config,
    LoRAConfig,
    LoReftConfig,
    MAMConfig,
    NoReftConfig,
    ParBnConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    SeqBnConfig,
    SeqBnInvConfig,
    UniPELTConfig,
    VeraConfig,
)
from families import FAMILIES, MORE_FAMILIES, SEQ2SEQ, build, fill, outputs
from safetensors.torch import save_file
from torch.nn.utils import parametrize

HERE = Path(__file__).parent
PREFIX = {"prefix_length": 3, "bottleneck_size": 4}

METHODS = {
    "seq_bn": SeqBnConfig(reduction_factor=4),
    "double_seq_bn": DoubleSeqBnConfig(reduction_factor=5),
    "par_bn": ParBnConfig(reduction_factor=4),
    "scaled_par_bn": ParBnConfig(reduction_factor=4, scaling="learned"),
    "prefix_tuning": PrefixTuningConfig(**PREFIX),
    "prefix_tuning_flat": PrefixTuningConfig(flat=True, **PREFIX),
    "lora": LoRAConfig(r=2, alpha=3),
    "ia3": IA3Config(),
    "mam": MAMConfig(PrefixTuningConfig(**PREFIX), ParBnConfig(reduction_factor=4)),
    "unipelt": UniPELTConfig(PrefixTuningConfig(**PREFIX), SeqBnConfig(reduction_factor=4), LoRAConfig(r=2)),
    # settings that are not the defaults
    "seq_bn_some_layers": SeqBnConfig(
        reduction_factor={"1": 2, "default": 4}, leave_out=[0], non_linearity="gelu", scaling=2.0
    ),
    "lora_everywhere": LoRAConfig(
        r=2, alpha=3, attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True
    ),
    "ia3_values_outputs": IA3Config(attn_matrices=["v"], output_lora=True, alpha=2, leave_out=[1]),
    "lora_and_double_seq_bn": ConfigUnion(
        LoRAConfig(r=2, attn_matrices=["k"], output_lora=True), DoubleSeqBnConfig(reduction_factor=4)
    ),
}
# In T5 a prefix in some layers only is not imported: the layers share one bias, which then fits none of them.
NOT_IN_T5 = {
    "prefix_tuning_some_layers": PrefixTuningConfig(leave_out=[0], **PREFIX),
    "mam_some_layers": MAMConfig(PrefixTuningConfig(leave_out=[0], **PREFIX), ParBnConfig(reduction_factor=4)),
}
# Methods that few adapters have; they are saved for some families only.
RARE = {
    "inverse": SeqBnInvConfig(reduction_factor=4),
    "compacter": CompacterConfig(reduction_factor=2, phm_dim=2),
    "compacter_own_rules": CompacterPlusPlusConfig(
        reduction_factor=2, phm_dim=2, phm_rank=2, shared_phm_rule=False, factorized_phm_rule=True
    ),
    "norms": DoubleSeqBnConfig(reduction_factor=4, ln_before=True, ln_after=True),
    "norm_before": SeqBnConfig(reduction_factor=4, ln_before=True, use_gating=True),
    "channel": ParBnConfig(reduction_factor=4, scaling="channel"),
    "adapter_plus": AdapterPlusConfig(reduction_factor=4, stochastic_depth=0.0),
    "dora": DoRAConfig(r=2, alpha=3),
    "vera": VeraConfig(r=2, alpha=3, attn_matrices=["q", "k", "v"]),
    "prompt_tuning": PromptTuningConfig(prompt_length=3),
    "prompt_tuning_after_bos": PromptTuningConfig(prompt_length=3, combine="prefix_after_bos"),
    "loreft": LoReftConfig(r=2, prefix_positions=2, suffix_positions=1),
    "loreft_tied": LoReftConfig(r=2, prefix_positions=1, suffix_positions=2, tied_weights=True, layers=[1]),
    "loreft_prefix": LoReftConfig(r=3),
    "noreft": NoReftConfig(r=2, prefix_positions=1, suffix_positions=3, non_linearity="relu"),
}
REFT = {"loreft", "loreft_tied", "loreft_prefix", "noreft"}
PROMPTS = {"prompt_tuning", "prompt_tuning_after_bos"}
RARE_OF = {
    "bert": RARE.keys() - {"adapter_plus", "dora"},
    "gpt2": RARE.keys() - PROMPTS - {"dora", "vera"},
    "llama": RARE.keys() - PROMPTS - {"vera"},
    "t5": RARE.keys() - PROMPTS - (REFT - {"loreft_prefix"}) - {"vera", "dora"},
    "roberta": PROMPTS | {"loreft"},
    "distilbert": {"loreft"},
    "beit": PROMPTS | {"loreft"},
    "xlm-roberta": PROMPTS,
    "electra": PROMPTS,
    "bart": {"inverse", "compacter", "loreft_prefix"},
    "albert": PROMPTS | {"inverse", "loreft"},
    "clip": {"inverse", "loreft_prefix"},
    "deberta-v2": {"loreft"},
    "encoder-decoder": {"inverse", "compacter", "loreft_prefix"},
    "mistral": {"loreft"},
    "vit": PROMPTS | {"adapter_plus", "channel", "loreft"},
    "whisper": {"inverse", "loreft_prefix"},
}
# where encoder and decoder differ
SEQ2SEQ_METHODS = {
    "double_seq_bn_cross": DoubleSeqBnConfig(reduction_factor=5, cross_adapter=True),
    "prefix_tuning_decoder": PrefixTuningConfig(encoder_prefix=False, cross_prefix=False, flat=True, **PREFIX),
}


# the methods of `MORE_FAMILIES`
FEWER = ("seq_bn", "double_seq_bn", "par_bn", "prefix_tuning", "lora_everywhere", "ia3", "unipelt")
# The library does not support them in these families, or we do not: see docs/guides/adapterhub.md.
NOT_IN = {
    "deberta": {"prefix_tuning", "unipelt"},
    "deberta-v2": {"prefix_tuning", "unipelt"},
    "gptj": {"par_bn"},
    "mt5": set(NOT_IN_T5),
    "t5": set(NOT_IN_T5),
}


def methods_of(family):
    """The adapters that are saved for a family."""
    methods = METHODS | NOT_IN_T5 if family in FAMILIES else {name: METHODS[name] for name in FEWER}
    methods |= {key: SEQ2SEQ_METHODS[key] for key in SEQ2SEQ_METHODS if family in SEQ2SEQ}
    methods |= {name: RARE[name] for name in RARE if name in RARE_OF.get(family, ())}
    return {name: config for name, config in methods.items() if name not in NOT_IN.get(family, ())}


@torch.no_grad()
def check_effect(model, family, expected, name):
    """Every kind of tensor matters, whatever layer it is in."""
    kinds = {}
    for key, parameter in model.named_parameters():
        if f".{name}." in key:
            kinds.setdefault(re.sub(r"\.\d+\.", ".*.", key), []).append(parameter)
    assert kinds
    for kind, parameters in kinds.items():
        kept = [parameter.clone() for parameter in parameters]
        for parameter in parameters:
            parameter.neg_()
        effect = (outputs(model, family) - expected).abs().max().item()
        assert effect > 1e-2, f"{kind} changes the logits by {effect:.1g} only"
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)


@torch.no_grad()
def fill_orthogonal(model):
    """What was drawn becomes the matrix that training starts from, and a change of the form that torch needs."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            drawn = module.parametrizations.weight.original.clone()
            module.weight = drawn
            module.parametrizations.weight.original.add_(drawn.t().tril(-1).t())


def save(family, name, config, folder, safetensors):
    """Save one adapter; returns its logits."""
    model = build(family)
    base, own = outputs(model, family), {key for key, _ in model.named_parameters()}
    adapters.init(model)
    model.add_adapter(name, config=config)
    model.set_active_adapters(name)
    model.eval()
    for key, value in model.named_parameters():
        if key not in own and f".{name}." not in key:  # adapters 1.3.0 gives DeBERTa's fused leaf a random bias
            value.data.zero_()
    fill({key: value for key, value in model.named_parameters() if f".{name}." in key}, 0.5)
    fill_orthogonal(model)
    result = outputs(model, family)
    if name not in PROMPTS:  # which lengthen the output
        assert (result - base).abs().max() > 1e-1
    check_effect(model, family, result, name)
    model.save_adapter(str(folder), name, with_head=False, use_safetensors=safetensors)
    return result


def main(families):
    for family in families:
        results = {"base": outputs(build(family), family)}
        with tempfile.TemporaryDirectory() as folder:
            for number, (name, config) in enumerate(methods_of(family).items()):
                # adapters 1.3.0 fails to write safetensors with a tensor of several names: prefixes, norms of its own
                shared = name in RARE or "prefix_tuning" in str(config.to_dict())
                safetensors = number % 2 > 0 and not shared
                results[name] = save(family, name, config, Path(folder) / name, safetensors)
            save_file(results, Path(folder) / "logits.safetensors")
            with zipfile.ZipFile(HERE / f"{family}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
                for path in sorted(Path(folder).rglob("*.*")):
                    entry = zipfile.ZipInfo(str(path.relative_to(folder)))  # dated 1980: the same file at every run
                    archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
        print(family, len(results) - 1, "adapters")


if __name__ == "__main__":
    main(sys.argv[1:] or FAMILIES | MORE_FAMILIES)
