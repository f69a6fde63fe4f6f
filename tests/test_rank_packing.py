"""Choices behind one prompt, against each choice run alone, and against the plain way: scores, losses, gradients."""

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from torch.nn.parallel import DistributedDataParallel
from transformers import BitsAndBytesConfig

from hf_peft_ext import UniPELTConfig
from hf_peft_ext.ranking.encode import Example, collate
from hf_peft_ext.ranking.losses import choice_loss, lm_loss, unlikelihood_loss
from hf_peft_ext.ranking.packing import choice_token_scores, why_not_packed

from .backbones import BACKBONES, PLAIN, VOCAB, Backbone
from .methods import METHODS, randomise

GENERATORS = {
    **{name: backbone for name, backbone in BACKBONES.items() if backbone.kind != "encoder"},
    "granite": Backbone("decoder", "granite", {**PLAIN, "num_key_value_heads": 2, "logits_scaling": 4.0}),
    "cohere": Backbone("decoder", "cohere", {**PLAIN, "num_key_value_heads": 2, "logit_scale": 0.25}),
}
PACKED = [name for name in GENERATORS if name != "bloom"]
TASKS = {"decoder": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}
CORRECT = torch.tensor([False, True, False, True, True, False, False, False])


def tokens(n, generator):
    return torch.randint(3, VOCAB, (n,), generator=generator).tolist()


def examples():
    """Three, two of them shorter than the longest prompt, with three, one and four choices of one to five tokens."""
    generator = torch.Generator().manual_seed(3)
    sizes = [(7, (3, 1, 4)), (4, (2,)), (9, (1, 1, 5, 2))]
    return [Example(tokens(n, generator), [tokens(m, generator) for m in choices]) for n, choices in sizes]


def batch(side="right", device="cpu"):
    made = collate(examples())
    if side == "left":
        for i, n in enumerate(made["prompt_mask"].sum(1).tolist()):
            for key in ("prompt_ids", "prompt_mask"):
                made[key][i] = made[key][i].roll(made[key].shape[1] - n)
    return {key: value.to(device) for key, value in made.items()}


def alone(model, config):
    """log p of every choice, each run by itself, token after token."""
    sums = []
    for prompt, choices in examples():
        for choice in choices:
            if config.is_encoder_decoder:
                start = [config.decoder_start_token_id]
                ids = torch.tensor([start + choice[:-1]])
                logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=ids).logits[0]
            else:
                logits = model(input_ids=torch.tensor([prompt + choice[:-1]])).logits[0, -len(choice) :]
            log_p = logits.float().log_softmax(-1)
            sums.append(sum(log_p[t, token] for t, token in enumerate(choice)))
    return torch.stack(sums)


def adapted(backbone, config=None, **overrides):
    family = GENERATORS[backbone]
    config = METHODS["unipelt"] if config is None else config
    model = get_peft_model(family.build(**overrides), config(task_type=TASKS[family.kind]))
    randomise(model)
    return model


def loss_and_gradients(model, packed, **kwargs):
    model.zero_grad()
    torch.manual_seed(0)  # the same experts of AdaMix
    made = batch(**kwargs)
    scores = choice_token_scores(model, made, packed=packed)
    correct, example = CORRECT.to(made["example"].device), made["example"]
    loss = lm_loss(scores, correct) + choice_loss(scores, correct, example)
    loss = loss + unlikelihood_loss(scores, correct, example)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_agree(found, expected):
    """Losses to 1e-5, and gradients to 1e-5 of the largest."""
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert found[1].keys() == expected[1].keys()
    assert found[1]
    largest = max(gradient.abs().max().item() for gradient in expected[1].values())
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=0, atol=1e-5 * max(1, largest), msg=name)


def assert_packing_changes_nothing(model):
    plain = loss_and_gradients(model, packed=False)
    for side in ("left", "right"):
        assert_agree(loss_and_gradients(model, packed=True, side=side), plain)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("backbone", GENERATORS)
def test_scores_are_those_of_each_choice_alone(backbone, side):
    """Packed or not, padded left or right; grouped heads, capped and scaled logits, windows shorter than a prompt."""
    model = GENERATORS[backbone].build()
    expected = alone(model, model.config)
    for packed in (False, True) if backbone in PACKED else (False,):
        scores = choice_token_scores(model, batch(side), packed=packed)
        torch.testing.assert_close(scores.row_sums(scores.log_p), expected, rtol=1e-5, atol=1e-5)
        rest = (-scores.log_p.exp()).log1p()
        torch.testing.assert_close(scores.log_rest, rest, rtol=1e-4, atol=1e-5)
        assert scores.lengths.tolist() == [3, 1, 4, 2, 1, 1, 5, 2]


@pytest.mark.parametrize("backbone", PACKED)
def test_losses_and_gradients_equal_the_plain_way(backbone):
    """All three losses and the gradients of the whole model, in every family."""
    assert_packing_changes_nothing(GENERATORS[backbone].build())


@pytest.mark.parametrize(
    ("backbone", "method"),
    [(b, m) for b in ("llama", "t5") for m in METHODS if (b, m) != ("llama", "intervention")]
    + [("mistral", "unipelt"), ("gpt2", "mam")],
)
def test_methods_pack(backbone, method):
    """Our prefixes, token gates and bottlenecks under a mask of blocks, with windows and relative positions."""
    assert_packing_changes_nothing(adapted(backbone, METHODS[method]))


@pytest.mark.parametrize("config", [LoraConfig, IA3Config])
@pytest.mark.parametrize("backbone", ["llama", "t5", "gpt_neox"])
def test_stock_methods_pack(backbone, config):
    """peft's own LoRA and (IA)3."""
    assert_packing_changes_nothing(adapted(backbone, config))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("backbone", ["llama", "gpt2", "qwen2"])
def test_kernels(backbone, attention):
    """Masks of booleans and of numbers."""
    assert_packing_changes_nothing(adapted(backbone, attention=attention))


def test_two_kinds_of_layers():
    """Gemma 2 and Qwen 2 with windows in some layers and full attention in others get a mask for each."""
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True, "sliding_window": 3}
    model = GENERATORS["qwen2"].build(**kinds)
    assert_packing_changes_nothing(model)
    wide = choice_token_scores(GENERATORS["qwen2"].build(), batch(), packed=True)
    assert not torch.allclose(choice_token_scores(model, batch(), packed=True).log_p, wide.log_p, atol=1e-2)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backbone", ["llama", "mistral", "t5"])
def test_gradient_checkpointing(backbone, reentrant):
    """Both kinds recompute under the same masks."""
    dropout = {"dropout_rate": 0.0} if backbone == "t5" else {}
    model = adapted(backbone, **dropout).train()
    model.enable_input_require_grads()
    expected = loss_and_gradients(model, packed=False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls = []
    model.get_base_model().get_decoder().register_forward_pre_hook(lambda *_: calls.append("decoder"))
    ffn = [module for name, module in model.named_modules() if name.endswith(("down_proj", ".wo"))]
    ffn[-1].register_forward_pre_hook(lambda *_: calls.append("layer"))
    found = loss_and_gradients(model, packed=True)
    assert calls == ["decoder", "layer", "layer"]  # its layers once more in the backward pass
    assert_agree(found, expected)


@pytest.mark.parametrize("backbone", ["llama", "t5"])
def test_four_bit(backbone, tmp_path):
    """NF4 with UniPELT, after an evaluation."""
    pytest.importorskip("bitsandbytes")
    wide = {"llama": {"hidden_size": 64, "intermediate_size": 128}, "t5": {"d_model": 64, "d_kv": 16, "d_ff": 128}}
    base = GENERATORS[backbone].build(**wide[backbone])
    base.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    four_bit = type(base).from_pretrained(tmp_path, quantization_config=config, device_map={"": "cpu"})
    four_bit = prepare_model_for_kbit_training(four_bit, use_gradient_checkpointing=False)
    model = get_peft_model(four_bit, UniPELTConfig(task_type=TASKS[GENERATORS[backbone].kind]))
    randomise(model)
    with torch.no_grad():
        choice_token_scores(model.eval(), batch(), packed=True)
    assert_packing_changes_nothing(model)


def test_autocast_and_half_precision():
    """Masks fit bfloat16 weights with either kernel, and autocast; the scores agree as far as bfloat16 does."""
    for attention in ("sdpa", "eager"):
        model = GENERATORS["llama"].build(attention=attention)
        expected = choice_token_scores(model, batch(), packed=False).log_p
        with torch.autocast("cpu", torch.bfloat16):
            cast = choice_token_scores(model, batch(), packed=True).log_p
        half = choice_token_scores(model.bfloat16(), batch(), packed=True).log_p
        assert cast.dtype == half.dtype == torch.float32
        torch.testing.assert_close(cast, expected, rtol=0.05, atol=0.1)
        torch.testing.assert_close(half, expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("backbone", ["llama", "t5"])
def test_prompts_are_read_once(backbone):
    """A decoder reads prompt and choices without their last tokens, an encoder each prompt; the head projects what
    predicts choices.
    """
    model, seen = GENERATORS[backbone].build(), {}

    def note(name):
        return lambda module, args, output: seen.setdefault(name, []).append(tuple(args[0].shape[:2]))

    model.get_output_embeddings().register_forward_hook(note("head"))
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and len(module.weight) == VOCAB:
            module.register_forward_hook(note("embeddings"))
    choice_token_scores(model, batch(), packed=True)
    if backbone == "llama":  # 9 for the longest prompt, 5 for the most tokens of choices that are read
        assert seen == {"embeddings": [(3, 14)], "head": [(3, 6)]}
    else:
        assert seen == {"embeddings": [(3, 9), (8, 5)], "head": [(8, 5)]}


@pytest.mark.parametrize("backbone", ["llama", "t5"])
def test_distributed(backbone, tmp_path):
    """Wrapped in DistributedDataParallel, the model is called through it, so that its gradients are reduced."""
    expected = loss_and_gradients(adapted(backbone), packed=False)[1]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(adapted(backbone))
        forwards = []
        model.register_forward_hook(lambda *_: forwards.append(1))
        gradients = loss_and_gradients(model, packed=True)[1]
        assert forwards == [1]
    finally:
        torch.distributed.destroy_process_group()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name.removeprefix("module.")], rtol=1e-4, atol=1e-5, msg=name)


REFUSED = {
    "alibi": (lambda: GENERATORS["bloom"].build(), "BloomForCausalLM derives positions from the order of the tokens"),
    "mean gates": (
        lambda: adapted("llama", lambda **kw: UniPELTConfig(gate_pooling="mean", **kw)),
        "gates that average over tokens would include other choices",
    ),
    "interventions": (
        lambda: adapted("llama", METHODS["intervention"]),
        "interventions count the tokens of a row, in which the choices follow one another",
    ),
    "prompt tuning": (
        lambda: adapted("llama", lambda **kw: PromptTuningConfig(num_virtual_tokens=3, **kw)),
        "PROMPT_TUNING inserts tokens before the prompt",
    ),
    "prefix tuning": (
        lambda: adapted("t5", lambda **kw: PrefixTuningConfig(num_virtual_tokens=3, **kw)),
        "PREFIX_TUNING inserts tokens before the prompt",
    ),
    "recurrent": (
        lambda: Backbone("decoder", "recurrent_gemma", {**PLAIN, "num_hidden_layers": 3, "lru_width": 32}).build(),
        "RecurrentGemmaForCausalLM has layers other than full or sliding attention",
    ),
    "own masks": (
        lambda: Backbone(
            "decoder",
            "gpt_neo",
            {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["local", "global"], 1]]},
        ).build(),
        "the layers of GPTNeoForCausalLM build their own masks",
    ),
    "both ways": (
        lambda: Backbone("decoder", "bert", PLAIN).build(),
        "BertLMHeadModel lets tokens attend to later ones",
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_pack_says_so(case):
    """It is refused when asked for, and otherwise run the plain way, which is right."""
    build, reason = REFUSED[case]
    model = build().eval()
    assert why_not_packed(model).startswith(reason)
    with pytest.raises(ValueError, match=r"`packed` \(=True\) is not possible: "):
        choice_token_scores(model, batch(), packed=True)
    scores = choice_token_scores(model, batch())
    assert scores.log_p.equal(choice_token_scores(model, batch(), packed=False).log_p)
    if case != "mean gates":  # their padding is seen by no token, so that these too are as if alone
        expected = alone(model, model.config)
        torch.testing.assert_close(scores.row_sums(scores.log_p), expected, rtol=1e-5, atol=1e-5)


def test_rows_without_tokens_are_named():
    model, made = GENERATORS["llama"].build(), batch()
    made["choice_ids"][2] = -100
    with pytest.raises(ValueError, match=r"`choice_ids` \(=\[2\]\) has rows without a token"):
        choice_token_scores(model, made)
    made = batch()
    made["prompt_mask"][1] = 0
    with pytest.raises(ValueError, match=r"`prompt_mask` \(=\[1\]\) has rows without a token"):
        choice_token_scores(model, made)
