"""Ladders: the formula against a loop over the blocks, and the properties of the contract on every family they know.

No gradient goes through the backbone, which is counted in the tensors that autograd keeps.
"""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.autograd.graph import saved_tensors_hooks
from transformers import BertConfig, BertForSequenceClassification, T5EncoderModel

from hf_peft_ext import LadderConfig, prune_ladder
from hf_peft_ext.pruning import Importance, importance, pruned_copy

from .backbones import BACKBONES, output
from .methods import randomise

FAMILIES = ("bert", "roberta", "t5", "gpt2", "llama", "qwen2", "mistral")
every_family = pytest.mark.parametrize("family", FAMILIES)


def laddered(family, config=None, **kwargs):
    """A model with a random ladder, and inputs for it."""
    model = get_peft_model(BACKBONES[family].build(**kwargs), config or LadderConfig(r=4))
    randomise(model)
    return model.eval(), BACKBONES[family].inputs()


def loss(result):
    return (result * torch.randn(result.shape, generator=torch.Generator().manual_seed(2))).mean()


def gradients(model, inputs, **kwargs):
    model.zero_grad()
    loss(output(model, inputs, **kwargs)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def seen(blocks):
    """The outputs of the backbone's blocks, as they come."""
    found = []
    for block in blocks:
        block.register_forward_hook(lambda _, __, y: found.append(y[0] if isinstance(y, tuple) else y))
    return found


def mixed(side_block, h, b):
    gate = torch.sigmoid(side_block.alpha / 0.1)
    return gate * h + (1 - gate) * (b @ side_block.down.weight.T + side_block.down.bias)


@pytest.mark.parametrize("init", ["base", "paper"])
def test_formula_of_a_decoder(init):
    """GPT-2: h_s <- g h_s + (1 - g) W b before each block; then norm, W_up, the sum with b, and the frozen head."""
    model, inputs = laddered("gpt2", LadderConfig(r=4, init=init))
    base = model.get_base_model()
    side = base.transformer.h[0].ladder.side_of["default"]
    found = seen(base.transformer.h)
    ids = inputs["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        h = side.stack.wte.down(base.transformer.wte(ids)) + side.stack.wpe.weight[: ids.shape[1]]
        for side_block, b in zip(side.side_blocks, found, strict=True):
            h = side_block.block(mixed(side_block, h, b))
        last = base.transformer.ln_f(found[-1]) if init == "base" else 0.0
        expected = base.lm_head(last + side.up(side.stack.ln_f(h)))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", ["base", "paper"])
def test_formula_of_an_encoder_decoder(init):
    """T5 without its first encoder block: the side decoder reads the side encoder, the base decoder the base one."""
    model, inputs = laddered("t5", LadderConfig(r=4, layers_to_keep=[1, 2, 3], init=init))
    base = model.get_base_model()
    encoder, decoder = (stack.block[0].ladder.side_of["default"] for stack in (base.encoder, base.decoder))
    shown, read = seen(base.encoder.block), seen(base.decoder.block)
    ids, target = inputs["input_ids"], inputs["decoder_input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids, decoder_input_ids=target).logits
        shown, read = list(shown), list(read)
        with model.disable_adapter():
            plain = seen(base.decoder.block)
            model(input_ids=ids, decoder_input_ids=target)
        assert all(torch.equal(b, p) for b, p in zip(read, plain, strict=True))
        [side_block] = encoder.side_blocks
        h = mixed(side_block, encoder.stack.embed_tokens.down(base.shared(ids)), shown[1])
        memory = encoder.stack.final_layer_norm(side_block.block(h)[0])
        h, bias = decoder.stack.embed_tokens.down(base.shared(target)), None
        future = torch.full((target.shape[1],) * 2, float("-inf")).triu(1)[None, None]
        for side_block, b in zip(decoder.side_blocks, read, strict=True):
            h, bias, _ = side_block.block(mixed(side_block, h, b), future, bias, memory)
        scale = 32**-0.5 if base.config.scale_decoder_outputs else 1.0  # T5's own, where its head is the embedding
        last = base.decoder.final_layer_norm(read[-1]) if init == "base" else 0.0
        expected = base.lm_head((last + decoder.up(decoder.stack.final_layer_norm(h))) * scale)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@every_family
def test_trains_only_itself(family):
    """Every weight of the side network gets a gradient (in BERT the outputs leave the pooler out), no other does."""
    model, inputs = laddered(family)
    found = gradients(model.train(), inputs)
    own = {name for name, _ in model.named_parameters() if ".side_of.default." in name}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == own
    assert found.keys() == own
    assert all(gradient.abs().max() > 0 for name, gradient in found.items() if "k_proj.bias" not in name)


@every_family
def test_keeps_nothing_of_the_backbone(family):
    """The backbone runs without gradients; autograd keeps its hidden states once for each side block."""
    model, inputs = laddered(family, LadderConfig(r=8))  # no part of it is as wide as the backbone
    model.enable_input_require_grads()  # as Trainer does for LoRA under checkpointing
    kept, ran = [], []
    base = model.get_base_model()
    weights = {parameter.data_ptr() for parameter in base.parameters()}

    def ran_plainly(module, args, result):
        ran.append((torch.is_grad_enabled(), any(t.grad_fn is not None for t in result if torch.is_tensor(t))))

    own = [m for name, m in base.named_modules() if name.endswith(("self", "attn", "self_attn", "SelfAttention"))
           and "ladder" not in name]  # fmt: skip
    for module in own:
        module.register_forward_hook(ran_plainly)
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        result = output(model, inputs)
    assert len(ran) >= 2
    assert not any(grad or graph for grad, graph in ran)
    wide = {t.data_ptr(): t for t in kept if t.shape[-1] == 32 and t.ndim == 3 and t.data_ptr() not in weights}
    side_blocks = sum(len(side.side_blocks) + 1 for side in sides(model))
    assert len(wide) <= side_blocks + (result.shape[-1] == 32)
    config = LoraConfig(r=1, target_modules="all-linear", fan_in_fan_out=family == "gpt2")
    lora = get_peft_model(BACKBONES[family].build(), config)
    full = []
    with saved_tensors_hooks(lambda t: full.append(t) or t, lambda t: t):
        output(lora, inputs)
    assert size(kept, weights) < 0.6 * size(full, {p.data_ptr() for p in lora.parameters()})


def sides(model):
    return [m.side_of["default"] for m in model.modules() if hasattr(m, "side_of")]


def size(tensors, weights):
    return sum({t.data_ptr(): t.nbytes for t in tensors if t.data_ptr() not in weights}.values())


@every_family
def test_saves_exactly_itself(family, tmp_path):
    """The file holds the side network only, no matrix over the vocabulary; reloaded, outputs are equal to the bit."""
    model, inputs = laddered(family)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all(".ladder.side_of." in key for key in saved)
    assert not any(60 in tensor.shape for tensor in saved.values())
    with torch.no_grad():
        expected = output(model, inputs)
        for low_cpu_mem_usage in (False, True):
            base = BACKBONES[family].build()
            again = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
            assert torch.equal(output(again, inputs), expected)
        base = BACKBONES[family].build()
        base.load_adapter(str(tmp_path))  # transformers' own
        assert torch.equal(output(base.eval(), inputs), expected)


@every_family
@pytest.mark.parametrize("reentrant", [False, True], ids=["nonreentrant", "reentrant"])
def test_gradient_checkpointing(family, reentrant):
    """It changes no gradient, and stays on in the model's own settings."""
    quiet = {"dropout_rate": 0.0} if family == "t5" else {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if "bert" in family else quiet
    model, inputs = laddered(family, **quiet)
    model.train()
    kwargs = {} if "bert" in family else {"use_cache": False}
    plain = gradients(model, inputs, **kwargs)
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    checkpointed = gradients(model, inputs, **kwargs)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-6)
    assert all(getattr(m, "gradient_checkpointing", True) for m in model.modules())


def test_starts_as_the_pruned_backbone():
    """At r = 1, with nothing taken in (g = 1) and both projections the identity, it is the backbone itself."""
    for family in FAMILIES:
        model = get_peft_model(BACKBONES[family].build(), LadderConfig(r=1, init="paper")).eval()
        with torch.no_grad():
            for side in sides(model):
                for side_block in side.side_blocks:
                    side_block.alpha.fill_(10.0)
                for linear in [side.stack.get_input_embeddings().down, *([side.up] if side.up else [])]:
                    linear.weight.copy_(torch.eye(32))
                    linear.bias.zero_()
            inputs = BACKBONES[family].inputs()
            base = output(BACKBONES[family].build(), inputs)
            torch.testing.assert_close(output(model, inputs), base, rtol=1e-4, atol=1e-4)


def test_pruned_by_other_scores():
    """By Fisher scores, the side blocks are the backbone's channels that those say; projections stay."""
    for family in ("gpt2", "t5"):
        base, inputs = BACKBONES[family].build(), BACKBONES[family].inputs()
        labels = inputs["decoder_input_ids" if family == "t5" else "input_ids"]
        batch = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": labels}
        scores = importance(base, [batch])
        rows, columns = ({k.removeprefix("transformer."): v for k, v in t.items() if k != "lm_head" or family == "t5"}
                         for t in (scores.rows, scores.columns))  # fmt: skip
        pruned = pruned_copy(base.base_model, 4, importance=Importance("fisher", rows, columns)).model
        model = get_peft_model(base, LadderConfig(r=4))
        downs = {name: p.clone() for name, p in model.named_parameters() if "down" in name}
        before = [side.side_blocks[0].block.state_dict() for side in sides(copy.deepcopy(model))]
        prune_ladder(model, scores)
        stacks = [pruned.encoder.block, pruned.decoder.block] if family == "t5" else [pruned.h]
        for side, blocks, old in zip(sides(model), stacks, before, strict=True):
            found = side.side_blocks[0].block.state_dict()
            assert not all(torch.equal(tensor, old[name]) for name, tensor in found.items())
            for side_block, block in zip(side.side_blocks, blocks, strict=True):
                expected = block.state_dict()
                assert all(
                    torch.equal(tensor, expected[name]) for name, tensor in side_block.block.state_dict().items()
                )
        assert all(torch.equal(p, downs[name]) for name, p in model.named_parameters() if "down" in name)
    with pytest.raises(ValueError, match=r"`adapter_name` \(='other'\) is no ladder of this model"):
        prune_ladder(model, scores, "other")


def test_pooler_reads_the_ladder():
    """A classifier on BERT: the frozen pooler reads the side network's output; the head is trained and saved."""
    tiny = BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    model = get_peft_model(BertForSequenceClassification(tiny), LadderConfig(task_type="SEQ_CLS", r=4)).eval()
    inputs = BACKBONES["bert"].inputs()
    found = gradients(model, inputs)
    assert any("classifier.modules_to_save" in name for name in found)
    assert any("ladder.side_of.default.up" in name for name in found)
    assert all("classifier" in name or "ladder" in name for name in found)


def test_encoder_alone():
    """T5's encoder without its decoder gives states of its own width."""
    base = T5EncoderModel(BACKBONES["t5"].build().config).eval()
    model = get_peft_model(base, LadderConfig(r=4, layers_to_keep=[1])).eval()
    assert model(input_ids=torch.tensor([[5, 6, 7]])).last_hidden_state.shape == (1, 3, 32)


@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_half_precision(family):
    """A bfloat16 backbone; the side network is kept in float32, as peft keeps adapters."""
    model = get_peft_model(BACKBONES[family].build().to(torch.bfloat16), LadderConfig(r=4)).eval()
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if ".side_of." in name)
    found = gradients(model, BACKBONES[family].inputs())
    assert found
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_hidden_states_and_tuples():
    """The hidden states that are asked for are the backbone's; return_dict=False gives a tuple."""
    for family in ("bert", "gpt2", "llama"):
        model, inputs = laddered(family)
        with torch.no_grad():
            base = BACKBONES[family].build()(**inputs, output_hidden_states=True).hidden_states
            found = model(**inputs, output_hidden_states=True).hidden_states
            assert len(found) == len(base)
            assert all(torch.equal(a, b) for a, b in zip(found[:-1], base[:-1], strict=True))
            plain = model(**inputs, return_dict=False)
            assert isinstance(plain, tuple)
            assert torch.equal(plain[0], output(model, inputs))


def test_a_failing_backbone_leaves_gradients_on():
    model, inputs = laddered("gpt2")
    inputs["input_ids"] = inputs["input_ids"] + 1000  # beyond the vocabulary
    with pytest.raises(IndexError):
        model(**inputs)
    assert torch.is_grad_enabled()
    assert gradients(model, BACKBONES["gpt2"].inputs())
