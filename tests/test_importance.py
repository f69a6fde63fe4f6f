"""Importance of rows and columns: Fisher against the squared weight gradients of each example by itself, in double
precision; activations and magnitudes against loops; 4-bit models against their dequantised copies; and the errors.
"""

from collections import defaultdict

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import BertForSequenceClassification
from transformers.pytorch_utils import Conv1D

from hf_peft_ext.model.calls import own_modules
from hf_peft_ext.pruning import importance, pruned_copy

from .backbones import BACKBONES, output

NAMES = ["llama", "gpt2", "t5", "bert", "modernbert"]


def build(name):
    """A model whose head is not tied to its embeddings, so that each has its own gradient."""
    if name == "bert":
        torch.manual_seed(0)
        return BertForSequenceClassification(BACKBONES["bert"].build().config).eval()
    model = BACKBONES[name].build()
    if (head := model.get_output_embeddings()) is not None:
        head.weight = nn.Parameter(head.weight.detach().clone())
    return model


def labelled(name, **kwargs):
    backbone = BACKBONES[name]
    batch = backbone.inputs(**kwargs)
    if name == "bert":
        return batch | {"labels": torch.tensor([0, 1, 1])}
    if backbone.kind == "seq2seq":
        batch["labels"] = batch.pop("decoder_input_ids").index_fill(1, torch.tensor([5]), -100)
    else:
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def rows(batch, first, last):
    return {key: value[first:last] for key, value in batch.items()}


def log_likelihood(model, example):
    """log p(y | x) of one example, label by label."""
    labels, logits = example["labels"][0], model(**example).logits[0]
    if labels.ndim == 0:
        return logits.log_softmax(dim=-1)[labels]
    if not model.config.is_encoder_decoder:
        logits, labels = logits[:-1], labels[1:]
    return sum(at.log_softmax(dim=-1)[label] for at, label in zip(logits, labels, strict=True) if label != -100)


def matrix(module, weight):
    """A weight, or its gradient, as (rows, columns)."""
    return weight.T if isinstance(module, (Conv1D, nn.Embedding)) else weight


@pytest.mark.filterwarnings("ignore:.*loss_type=None")
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_fisher_is_the_mean_of_squared_gradients(name):
    """Two batches of two and one: the mean over three examples of their squared weight gradients, one by one."""
    model, batch = build(name).double(), labelled(name)
    found = importance(model, [rows(batch, 0, 2), rows(batch, 2, 3)])
    squares = defaultdict(float)
    for i in range(3):
        model.zero_grad()
        log_likelihood(model, rows(batch, i, i + 1)).backward()
        for path, module in model.named_modules():
            if path in found.rows:
                squares[path] = squares[path] + matrix(module, module.weight.grad) ** 2 / 3
    assert found.examples == 3
    assert found.columns.keys() == {path for path, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    assert len(found.rows) - len(found.columns) == (2 if name == "t5" else 1)  # embeddings of tokens
    for path, expected in squares.items():
        if "embed_tokens" in path and name == "t5":
            continue  # one matrix for both stacks: its gradient is that of both uses
        torch.testing.assert_close(found.rows[path], expected.sum(dim=1), rtol=1e-9, atol=1e-15)
        if path in found.columns:
            torch.testing.assert_close(found.columns[path], expected.sum(dim=0), rtol=1e-9, atol=1e-15)


def test_batches_and_padding_do_not_matter():
    """One batch with padding, or the examples one by one without: the same scores."""
    model, batch = build("llama").double(), labelled("llama")
    one = importance(model, [batch])
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    alone = [{k: v[i : i + 1, :n] for k, v in batch.items()} for i, n in enumerate(lengths)]
    for kind, first in (("fisher", one), ("activation", importance(model, [batch], "activation"))):
        second = importance(model, alone, kind)
        for path in first.rows:
            torch.testing.assert_close(second.rows[path], first.rows[path])
        for path in first.columns:
            torch.testing.assert_close(second.columns[path], first.columns[path])


def test_a_likelihood_of_ones_own():
    """Given log p, labels are not needed: here that of one token behind the text."""
    model, batch = build("llama").double(), BACKBONES["llama"].inputs(padding="none")
    answer = torch.tensor([7, 8, 9])

    def of_answer(model, batch):
        logits = model(**batch).logits[:, -1]
        return -F.cross_entropy(logits, answer, reduction="none")

    labels = torch.full_like(batch["input_ids"], -100)
    longer = {"input_ids": torch.cat([batch["input_ids"], answer[:, None]], 1),
              "labels": torch.cat([labels, answer[:, None]], 1)}  # fmt: skip
    first, second = importance(model, [batch], log_likelihood=of_answer), importance(model, [longer])
    for path in first.columns:
        torch.testing.assert_close(first.columns[path], second.columns[path])


@pytest.mark.parametrize("name", NAMES)
def test_magnitude_is_the_sum_of_squares(name):
    model = build(name)
    found = importance(model, kind="magnitude")
    assert len(found.columns) >= 8
    for path, columns in found.columns.items():
        module = model.get_submodule(path)
        weight = matrix(module, module.weight.detach())
        torch.testing.assert_close(columns, (weight**2).sum(dim=0))
        torch.testing.assert_close(found.rows[path], (weight**2).sum(dim=1))


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_activation_is_the_mean_square_over_tokens(name):
    """Against a loop over examples and the tokens of each that are no padding, on the side of the model it reads."""
    model, batch = build(name), labelled(name)
    found = importance(model, [batch], "activation")
    seen, calls = {}, []
    for path, module in own_modules(model):
        if isinstance(module, nn.Linear):
            calls.append(
                module.register_forward_hook(lambda m, x, y, path=path: seen.__setitem__(path, (x[0].detach(), y)))
            )
    with torch.no_grad():
        model(**batch)
    for call in calls:
        call.remove()
    assert seen.keys() == found.columns.keys()
    for path, (x, y) in seen.items():
        reads_encoder = not path.startswith(("decoder", "lm_head")) or "EncDecAttention.k" in path
        reads_encoder |= "EncDecAttention.v" in path
        mask = batch["attention_mask"] if reads_encoder or name != "t5" else batch["labels"] != -100
        for scores, values in ((found.columns[path], x), (found.rows[path], y)):
            expected = torch.zeros(values.shape[-1])
            for i, example in enumerate(values):
                tokens = [example] if example.ndim == 1 else [t for t, m in zip(example, mask[i], strict=True) if m]
                expected += sum(token**2 for token in tokens) / len(tokens) / len(values)
            torch.testing.assert_close(scores, expected, msg=path)


# Quantised models, and models in use


@pytest.fixture(scope="module")
def four_bit(tmp_path_factory):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    BACKBONES["llama"].build(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                bnb_4bit_compute_dtype=torch.float32)  # fmt: skip
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"}).eval()
    assert sum(isinstance(m, bitsandbytes.nn.Linear4bit) for m in model.modules()) > 8
    return model


def test_a_4bit_model_is_cut_from_its_dequantised_weights(four_bit):
    """With nothing dropped, the copy is a plain model with the 4-bit one's logits; cut, it can be trained."""
    inputs = BACKBONES["llama"].inputs()
    whole = pruned_copy(four_bit, 1).model
    assert {type(module) for module in whole.modules() if "Linear" in type(module).__name__} == {nn.Linear}
    torch.testing.assert_close(output(whole, inputs), output(four_bit, inputs), rtol=1e-4, atol=1e-4)
    pruned = pruned_copy(four_bit, 2, importance=importance(four_bit, [labelled("llama")])).model
    pruned(**labelled("llama")).loss.backward()
    assert all(p.grad is not None for p in pruned.parameters())


@pytest.mark.parametrize("kind", ["fisher", "activation", "magnitude"])
def test_a_4bit_model_scores_as_its_dequantised_copy(four_bit, kind):
    """Also after it was evaluated, which on some processors repacks its weights."""
    with torch.no_grad():
        four_bit(**BACKBONES["llama"].inputs())
    found = importance(four_bit, [labelled("llama")], kind)
    expected = importance(pruned_copy(four_bit, 1).model, [labelled("llama")], kind)
    assert found.columns.keys() == expected.columns.keys()
    for path in found.columns:
        torch.testing.assert_close(found.columns[path], expected.columns[path], rtol=1e-2, atol=1e-6)
        torch.testing.assert_close(found.rows[path], expected.rows[path], rtol=1e-2, atol=1e-6)


def test_leaves_the_model_as_it_was():
    """Gradients, hooks, training and what is trainable are those of before, also after a failure."""
    model = build("llama").train()
    model.lm_head.weight.requires_grad = False
    model.model.norm.eval()
    wanted = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    importance(model, [labelled("llama")])
    with pytest.raises(ValueError, match="log_likelihood"):
        importance(model, [BACKBONES["llama"].inputs()])
    assert wanted == ([p.requires_grad for p in model.parameters()], [m.training for m in model.modules()])
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


def test_of_the_base_model_inside_adapters():
    """An adapter that does nothing yet changes no score."""
    model, batch = build("llama"), labelled("llama")
    expected = importance(model, [batch])
    get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"]))
    found = importance(model, [batch])
    assert found.rows.keys() == expected.rows.keys()
    for path in expected.columns:
        torch.testing.assert_close(found.columns[path], expected.columns[path])


def test_reports_its_peak_memory():
    """Not less than the weights that it read."""
    model = build("llama")
    found = importance(model, [labelled("llama")])
    assert found.peak_memory is None or found.peak_memory > sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, {"kind": "random"}, r"`kind` \(='random'\) must be one of fisher, activation, magnitude\."),
        (None, {}, r"`batches` \(=None\) must be given for fisher\."),
        (None, {"kind": "activation"}, r"`batches` \(=None\) must be given for activation\."),
        (
            {"labels": torch.rand(3, 9)},
            {},
            r"`labels` \(=torch\.float32\) must be indices; else give `log_likelihood`",
        ),
    ],
)
def test_errors(change, arguments, message):
    batches = None if change is None else [labelled("llama") | change]
    with pytest.raises(ValueError, match=message):
        importance(build("llama"), batches, **arguments)


def test_no_examples():
    with pytest.raises(ValueError, match=r"`batches` .* must hold at least one example"):
        importance(build("llama"), [])


class Flat(nn.Module):
    """Runs a module on all tokens of a batch in one row, as mixtures of experts do."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x.flatten(0, 1)).view_as(x)


def test_examples_that_cannot_be_told_apart():
    """A leaf that sees tokens without their examples is refused; one example at a time they are its own."""
    model, batch = build("llama").double(), labelled("llama")
    alone = [rows(batch, i, i + 1) for i in range(3)]
    expected = importance(model, alone)
    model.model.layers[0].mlp = Flat(model.model.layers[0].mlp)
    message = r"runs model\.layers\.0\.mlp\.module\.gate_proj on \(27, 32\), without an axis of 3 examples"
    with pytest.raises(ValueError, match=message):
        importance(model, [batch])
    found = importance(model, alone)
    for path in expected.columns:
        torch.testing.assert_close(found.columns[path.replace("0.mlp", "0.mlp.module")], expected.columns[path])
