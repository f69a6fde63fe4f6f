"""Prefixes of both forms in float32 and in bf16: values and gradients.

A joint prefix is compared with attention that is written out in float32. A separate prefix reads the queries before
position embeddings, which attention kernels do not see: it is compared with the same model in float64.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import get_peft_model, get_peft_model_state_dict
from tables import Row
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from hf_peft_ext import LayerPrefixConfig

from .part import Part, Setting

NAIVE = "prefix_written_out"
UNREAD = "the reference has no effect: this model does not look its attention up"
N_TOKENS = 30
Vectors = dict[str, tuple[Tensor, Tensor]]  # path of an attention module -> P_K, P_V: (kv_heads, n_tokens, d)


@dataclass(frozen=True)
class Case:
    """A kind of attention.

    Args:
        model_type: transformers' name of a model that has it.
        sizes: fields of its config, where widths have other names.
        padding: which side of every other row is padded.
        window: whether attention is within a sliding window.
    """

    model_type: str
    sizes: dict[str, Any] = field(default_factory=dict)
    padding: str | None = None
    window: bool = False

    def config(self, smoke: bool) -> Any:
        d, heads, layers = (64, 4, 2) if smoke else (512, 8, 4)
        sizes = {"hidden_size": d, "intermediate_size": 2 * d, "num_hidden_layers": layers}
        sizes |= {"num_attention_heads": heads, "vocab_size": 300, "pad_token_id": 0}
        if self.model_type == "bart":
            sizes |= {"d_model": d, "decoder_layers": layers, "encoder_layers": layers, "decoder_start_token_id": 2}
            sizes |= {"encoder_attention_heads": heads, "decoder_attention_heads": heads}
            sizes |= {"encoder_ffn_dim": 2 * d, "decoder_ffn_dim": 2 * d}
        if self.model_type == "t5":
            sizes |= {"d_model": d, "d_kv": d // heads, "d_ff": 2 * d, "num_layers": layers, "num_heads": heads}
            sizes["decoder_start_token_id"] = 0
        if self.window:
            sizes["sliding_window"] = 6 if smoke else 64
        return AutoConfig.for_model(self.model_type, **{**sizes, **self.sizes})

    def inputs(self, setting: Setting) -> dict[str, Any]:
        rows, length = (2, 16) if setting.smoke else (4, 256)
        ids = torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(0))
        inputs: dict[str, Any] = {"input_ids": ids}
        if self.padding:
            mask = torch.ones_like(ids)
            mask[::2, slice(None, length // 4) if self.padding == "left" else slice(-length // 4, None)] = 0
            inputs["attention_mask"] = mask
        if self.model_type in ("bart", "t5"):
            inputs["decoder_input_ids"] = ids.flip(1)[:, : 3 * length // 4].contiguous()
        inputs = {name: tensor.to(setting.device) for name, tensor in inputs.items()}
        return inputs if self.model_type == "bert" else {**inputs, "use_cache": False}


CASES = {
    "encoder, right padding": Case("bert", padding="right"),
    "causal, no padding": Case("llama", {"num_key_value_heads": 4}),
    "causal, grouped queries": Case("llama", {"num_key_value_heads": 2}),
    "grouped queries, left padding": Case("llama", {"num_key_value_heads": 2}, "left"),
    "sliding window": Case("mistral", {"num_key_value_heads": 2}, window=True),
    "sliding window, left padding": Case("mistral", {"num_key_value_heads": 2}, "left", window=True),
    "self and cross": Case("bart", padding="right"),
    "self and cross, position bias": Case("t5", padding="right"),
}


def written_out(
    module: Any,
    query: Tensor,  # shape: (batch, heads, length, d)
    key: Tensor,  # shape: (batch, kv_heads, keys, d)
    value: Tensor,  # shape: (batch, kv_heads, keys, d)
    attention_mask: Tensor | None,  # shape: (batch or 1, heads or 1, length, keys)
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax(Q [P_K, K]^T + [0, bias + mask]) [P_V, V] in float32, every score kept."""
    n_tokens, scale = 0, query.shape[-1] ** -0.5 if scaling is None else scaling
    if (vectors := getattr(module, "written_out", None)) is not None:
        key, value = (
            torch.cat([p.expand(len(query), -1, -1, -1), x], 2) for p, x in zip(vectors, (key, value), strict=True)
        )
        n_tokens = vectors[0].shape[1]
    group = query.shape[1] // key.shape[1]
    key, value = (x.float().repeat_interleave(group, dim=1) for x in (key, value))
    scores = query.float() @ key.mT * scale
    for added in (position_bias, attention_mask):
        if added is not None:
            scores = torch.cat([scores[..., :n_tokens], scores[..., n_tokens:] + added.float()], dim=-1)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAIVE, written_out)
AttentionMaskInterface.register(NAIVE, eager_mask)  # pyright: ignore[reportArgumentType]


def vectors_of(model: Any, bare: nn.Module) -> Vectors:
    """The prefix of each attention module of the bare model, from the adapter's saved form."""
    state = get_peft_model_state_dict(model)
    paths = {path for path, _ in bare.named_modules()}
    found: Vectors = {}
    for name in state:
        if name.endswith(".P_K"):
            path = name.removeprefix("base_model.model.")
            while path not in paths:
                path = path.rpartition(".")[0]
            found[path] = state[name].float(), state[f"{name.removesuffix('P_K')}P_V"].float()
    return found


def run(model: Any, case: Case, inputs: dict[str, Any], trained: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Last hidden states without padding, and the gradient of the prefixes."""
    y = model(**inputs).last_hidden_state.float()
    if case.padding and "decoder_input_ids" not in inputs:
        y = y[inputs["attention_mask"].bool()]
    if not trained:
        return y.detach(), None
    if not y.requires_grad:
        raise RuntimeError(f"{UNREAD} in this version of transformers")
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.device)
    gradients = torch.autograd.grad((y * probe).mean(), trained)
    return y.detach(), torch.cat([g.float().flatten() for g in gradients])


def off(found: Tensor | None, expected: Tensor | None) -> float | None:
    """Norm of the difference, relative."""
    return None if found is None or expected is None else ((found - expected).norm() / expected.norm()).item()


def expected_of_joint(model: Any, bare: Any, case: Case, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None, int]:
    """Hidden states and gradients of the attention written out, and how many attention modules have a prefix."""
    bare.requires_grad_(False)
    vectors = vectors_of(model, bare)
    for path, pair in vectors.items():
        bare.get_submodule(path).written_out = [p.requires_grad_() for p in pair]
    expected, gradient = run(bare, case, inputs, [p for pair in vectors.values() for p in pair])
    return expected, gradient, len(vectors)


def measure(form: str, name: str, setting: Setting) -> Row:
    case = CASES[name]
    inputs = case.inputs(setting)
    torch.manual_seed(0)
    with torch.device(setting.device):
        base = AutoModel.from_config(case.config(setting.smoke), attn_implementation="sdpa").eval()
    base.to(torch.bfloat16).float()  # numbers that bf16 has
    plain, _ = run(copy.deepcopy(base).requires_grad_(False), case, inputs, [])
    in_bf16, _ = run(copy.deepcopy(base).to(torch.bfloat16).requires_grad_(False), case, inputs, [])

    bare = copy.deepcopy(base)
    config = LayerPrefixConfig(num_virtual_tokens=N_TOKENS, init="paper" if form == "joint" else "base")
    model: Any = get_peft_model(base, config).eval()
    with torch.no_grad():
        for parameter in trained(model):
            parameter.copy_(torch.randn_like(parameter).bfloat16())
    if form == "joint":
        bare.set_attn_implementation(NAIVE)
        expected, gradient, attentions = expected_of_joint(model, bare, case, inputs)
    else:
        exact = copy.deepcopy(model).double()
        expected, gradient = run(exact, case, inputs, trained(exact))
        attentions = len(trained(model)) // 2
    found, found_gradient = run(model, case, inputs, trained(model))
    half = model.to(torch.bfloat16)
    half_found, half_gradient = run(half, case, inputs, trained(half))
    return {
        "attentions": attentions,
        "prefix moves by": off(expected, plain),
        "float32": off(found, expected),
        "float32, gradient": off(found_gradient, gradient),
        "bf16": off(half_found, expected),
        "bf16, gradient": off(half_gradient, gradient),
        "bf16 without prefix": off(in_bf16, plain),
    }


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


PART = Part(
    "Prefixes against attention written out in float32 (joint) and against float64 (separate)",
    "Norm of the difference of the last hidden states, or of the prefixes' gradients, over the norm of the reference.",
    ("form", "attention"),
    {form: list(CASES) for form in ("separate", "joint")},
    measure,
)
