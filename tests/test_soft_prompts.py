"""Transfer of peft's prompts: beginning at another task's, similarity, subspaces of several tasks."""

import copy

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file
from transformers import TrainingArguments

from hf_peft_ext.soft_prompts import (
    PromptSubspace,
    init_prompt_from,
    prompt_similarity,
    read_prompt,
    train_in_subspace,
)
from hf_peft_ext.trainers import AdapterTrainer

from .backbones import BACKBONES

SIZES = {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}
TYPES = {
    "prompt": lambda **kw: PromptTuningConfig(**SIZES | kw),
    "mlp": lambda **kw: PromptEncoderConfig(encoder_hidden_size=16, **SIZES | kw),
    "lstm": lambda **kw: PromptEncoderConfig(
        encoder_reparameterization_type="LSTM", encoder_hidden_size=16, encoder_dropout=0.5, **SIZES | kw
    ),
    "prefix": lambda **kw: PrefixTuningConfig(**SIZES | kw),
    "projected": lambda **kw: PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=16, **SIZES | kw),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:dropout option adds dropout:UserWarning"),
]


def prompted(kind, seed=0, backbone="llama", size=None, **fields):
    base = BACKBONES[backbone].build(**size or {})
    torch.manual_seed(seed)
    return get_peft_model(base, TYPES[kind](**fields))


def vectors(model):
    return get_peft_model_state_dict(model.eval())["prompt_embeddings"]


@pytest.mark.parametrize(
    ("source", "target"),
    [("prompt", "prompt"), ("mlp", "prompt"), ("prompt", "mlp"), ("prompt", "lstm"), ("prefix", "prefix"),
     ("projected", "prefix"), ("prefix", "projected")],
)  # fmt: skip
def test_begins_at_another_prompt(source, target, tmp_path):
    """The vectors and the outputs are those of the saved prompt, also where a network computes them."""
    other, model = prompted(source, 1).eval(), prompted(target, 2)
    other.save_pretrained(tmp_path)
    init_prompt_from(model, tmp_path)
    torch.testing.assert_close(vectors(model), read_prompt(tmp_path), rtol=1e-5, atol=1e-5)
    inputs = BACKBONES["llama"].inputs()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**inputs).logits, other(**inputs).logits, rtol=1e-4, atol=1e-4)
    model.train()(**inputs).logits.square().mean().backward()
    assert all(p.grad is not None for p in model.prompt_encoder.parameters())


def test_encoder_decoder(tmp_path):
    """A prompt of T5 has vectors for encoder and decoder; a classifier's prompt of the same length differs."""
    other, model = (prompted("prompt", s, "t5", task_type="SEQ_2_SEQ_LM") for s in (1, 2))
    other.save_pretrained(tmp_path)
    init_prompt_from(model, tmp_path)
    assert torch.equal(vectors(model), vectors(other))
    assert len(vectors(model)) == 8
    message = r"`num_transformer_submodules` \(=2\) must be 1, as in the adapter 'default'"
    with pytest.raises(ValueError, match=message):
        init_prompt_from(prompted("prompt", 0, "t5", task_type="CAUSAL_LM", num_transformer_submodules=1), tmp_path)


def test_similarity(tmp_path):
    """The cosine of the mean tokens, and the mean cosine of all pairs of tokens."""
    a, b = torch.randn(4, 8), torch.randn(5, 8)
    cosine = torch.nn.functional.cosine_similarity
    assert prompt_similarity(a, b) == pytest.approx(cosine(a.mean(0), b.mean(0), dim=0).item(), abs=1e-6)
    pairs = [cosine(x, y, dim=0).item() for x in a for y in b]
    assert prompt_similarity(a, b, per_token=True) == pytest.approx(sum(pairs) / 20, abs=1e-6)
    assert prompt_similarity(a, 2 * a) == pytest.approx(1)
    with pytest.raises(ValueError, match=r"`second` \(=\(5, 7\)\) must have the width 8, as the first prompt"):
        prompt_similarity(a, b[:, :7])


def test_subspace(tmp_path):
    """It holds the prompts that span it, has the variance of principal components, and survives its file."""
    torch.manual_seed(0)
    prompts = list(torch.randn(4, 3, 5))
    subspace = PromptSubspace.fit(prompts, 3)
    assert subspace.explained == pytest.approx(1)
    for prompt in prompts:
        torch.testing.assert_close(subspace.decode(subspace.encode(prompt)), prompt, rtol=1e-4, atol=1e-5)
    coordinates = torch.stack([subspace.encode(prompt) for prompt in prompts])
    torch.testing.assert_close(coordinates.std(0), torch.ones(3), rtol=1e-4, atol=1e-4)
    flat = torch.stack(prompts).flatten(1)
    variances = torch.linalg.eigvalsh(torch.cov(flat.T)).flip(0)
    assert PromptSubspace.fit(prompts, 1).explained == pytest.approx((variances[0] / variances.sum()).item(), abs=1e-5)
    subspace.save(tmp_path / "subspace.safetensors")
    loaded = PromptSubspace.load(tmp_path / "subspace.safetensors")
    assert torch.equal(loaded.directions, subspace.directions)
    assert torch.equal(loaded.mean, subspace.mean)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_trains_coordinates_only(kind, tmp_path):
    """d numbers have gradients, those of the prompt along the directions; the file is a plain prompt of stock peft."""
    for task in range(4):
        prompted(kind, task).save_pretrained(tmp_path / str(task))
    folders = [tmp_path / str(task) for task in range(4)]
    subspace = PromptSubspace.fit(folders, 2)
    model, inputs = prompted(kind, 9), BACKBONES["llama"].inputs()
    init_prompt_from(model, folders[1])
    z = train_in_subspace(model, subspace)
    assert model.get_nb_trainable_parameters()[0] == 2
    torch.testing.assert_close(z, subspace.encode(read_prompt(folders[1])), rtol=1e-4, atol=1e-5)
    model.train()(**inputs).logits.square().mean().backward()
    plain = prompted(kind, 9)
    with torch.no_grad():
        plain.prompt_encoder["default"].embedding.weight.copy_(vectors(model))
    plain.train()(**inputs).logits.square().mean().backward()
    gradient = plain.prompt_encoder["default"].embedding.weight.grad
    torch.testing.assert_close(z.grad, torch.einsum("ktd,td->k", subspace.directions, gradient), rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        z += 1
        expected = model.eval()(**inputs).logits
        assert torch.equal(copy.deepcopy(model)(**inputs).logits, expected)
        model.save_pretrained(tmp_path / "tuned")
        assert [*load_file(tmp_path / "tuned" / "adapter_model.safetensors")] == ["prompt_embeddings"]
        again = PeftModel.from_pretrained(BACKBONES["llama"].build(), tmp_path / "tuned").eval()
        assert torch.equal(again(**inputs).logits, expected)


class Interrupted(AdapterTrainer):
    """Stops after its second step."""

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return super().training_step(*args, **kwargs)


@pytest.mark.parametrize("kind", ["mlp", "subspace"])
def test_resumes_exactly(kind, tmp_path):
    """A trainer's checkpoint keeps the numbers that compute a prompt: a resumed run ends at the same ones."""
    subspace = PromptSubspace.fit(list(torch.randn(4, 4, 32, generator=torch.Generator().manual_seed(0))), 2)
    rows = [{"input_ids": torch.arange(i, i + 6), "labels": torch.arange(i, i + 6)} for i in range(3, 11)]

    def run(cls, name, resume=None):
        model = prompted("prompt" if kind == "subspace" else kind)
        if kind == "subspace":
            train_in_subspace(model, subspace)
        args = TrainingArguments(str(tmp_path / name), max_steps=4, save_steps=1, per_device_train_batch_size=2,
                                 report_to="none", use_cpu=True, learning_rate=0.1)  # fmt: skip
        trainer = cls(model, args, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return [p.detach() for p in model.parameters() if p.requires_grad]

    whole = run(AdapterTrainer, "whole")
    with pytest.raises(KeyboardInterrupt):
        run(Interrupted, "halves")
    for ours, theirs in zip(run(AdapterTrainer, "halves", True), whole, strict=True):
        assert torch.equal(ours, theirs)


def saved(kind, folder, **kwargs):
    prompted(kind, **kwargs).save_pretrained(folder)
    return folder


LARGE = {"hidden_size": 64}
ERRORS = [
    (lambda f: init_prompt_from(prompted("prompt"), saved("prompt", f, size=LARGE)), "`token_dim` .=64. must be 32"),
    (
        lambda f: init_prompt_from(prompted("prompt"), saved("prompt", f, num_virtual_tokens=3)),
        "`num_virtual_tokens` .=3. must be 4, as in the adapter 'default'",
    ),
    (
        lambda f: init_prompt_from(prompted("prompt"), saved("prefix", f)),
        "`peft_type` .='PREFIX_TUNING'. must be a type whose vectors are embeddings of tokens",
    ),
    (lambda f: init_prompt_from(prompted("prompt"), f, "b"), "`adapter_name` .='b'. must be one of .'default'."),
    (
        lambda f: init_prompt_from(get_peft_model(BACKBONES["llama"].build(), LoraConfig()), f),
        "`peft_type` .='LORA'. must be one of PROMPT_TUNING, P_TUNING, PREFIX_TUNING",
    ),
    (
        lambda f: init_prompt_from(prompted("prompt", inference_mode=True), f),
        "`inference_mode` .=True. must be False to train the prompt",
    ),
    (
        lambda f: init_prompt_from(
            get_peft_model(BACKBONES["llama"].build(), PromptEncoderConfig(encoder_hidden_size=1, **SIZES)),
            saved("prompt", f),
        ),
        "`encoder_hidden_size` .=1. must be larger, so that the network can compute the prompt: it misses it by",
    ),
    (
        lambda f: PromptSubspace.fit(list(torch.randn(3, 2, 5)), 3),
        "`dim` .=3. must be at most 2, the dimension that 3",
    ),
    (lambda f: PromptSubspace.fit([torch.ones(2, 5), torch.ones(3, 5)], 1), "`prompts` .*must have one shape"),
    (
        lambda f: train_in_subspace(prompted("mlp"), PromptSubspace.fit(list(torch.randn(3, 4, 32)), 1)),
        "`adapter_name` .='default'. must be a plain prompt",
    ),
    (
        lambda f: train_in_subspace(prompted("prompt"), PromptSubspace.fit(list(torch.randn(3, 4, 8)), 1)),
        "`subspace` .=.4, 8.. must have the shape .4, 32.",
    ),
    (
        lambda f: get_peft_model(BACKBONES["llama"].build(), LoraConfig()).save_pretrained(f) or read_prompt(f),
        "`id_or_path` .* must hold a prompt of peft",
    ),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[message[:36] for _, message in ERRORS])
def test_errors(call, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        call(tmp_path)
