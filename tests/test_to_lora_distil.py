"""`to_lora` where no LoRA equals the adapter: the least-squares fit, distillation, what is measured and refused."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

from hf_peft_ext import BottleneckConfig, LadderConfig, LayerPrefixConfig, UniPELTConfig, to_lora
from hf_peft_ext.export import DistillationSettings
from hf_peft_ext.export import distil as distil_module
from hf_peft_ext.export.divergence import agreement, divergence, kind_of
from hf_peft_ext.export.fidelity import difference, interval, row_scores
from hf_peft_ext.export.least_squares import fit_least_squares, reduced_rank
from hf_peft_ext.export.low_rank_factors import Factors
from hf_peft_ext.export.roles import Roles, linear_leaves
from hf_peft_ext.hub_cards import TrainingRecord
from hf_peft_ext.training_loop import train_steps

from .backbones import BACKBONES, PLAIN, SPECIAL, VOCAB, output
from .methods import METHODS, randomise

FEW = DistillationSettings(steps=40, batch_size=8, learning_rate=3e-3, fit_rows=32, held_out=0.25)


@pytest.fixture
def tokenizer():
    fast = Tokenizer(models.WordLevel({str(i): i for i in range(VOCAB)}, unk_token="1"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="0", eos_token="2", unk_token="1")


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 10, (64,), generator=generator).tolist()
    return [" ".join(map(str, torch.randint(3, VOCAB, (n,), generator=generator).tolist())) for n in lengths]


def classifier(config, std=0.2, **kwargs):
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=VOCAB, **PLAIN, **kwargs))
    model = get_peft_model(base, config)
    randomise(model, std=std)
    return model.eval(), base


def base_classifier(**kwargs):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=VOCAB, **PLAIN, **kwargs))


CONFIGS = {
    "unipelt": METHODS["unipelt"],
    "pfeiffer": lambda **kw: BottleneckConfig(style="pfeiffer", r=4, **kw),
    "prefix": lambda **kw: LayerPrefixConfig(num_virtual_tokens=4, **kw),
    "prefix_paper": lambda **kw: LayerPrefixConfig(num_virtual_tokens=4, init="paper", **kw),
    "ladder": lambda **kw: LadderConfig(r=4, **kw),
    "bitfit": METHODS["bitfit"],
}


@pytest.mark.parametrize("method", CONFIGS)
def test_classifier(tmp_path, tokenizer, texts, method):
    """The LoRA is nearer to the adapter than the base is; the head is copied; the model does not change."""
    std = 1.0 if method == "prefix" else 0.2  # a prefix with a softmax of its own changes little else
    model, _ = classifier(CONFIGS[method](task_type="SEQ_CLS"), std, num_labels=3)
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    before = [(name, p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with torch.no_grad():
        expected = model(**inputs).logits
    lines = []
    export = to_lora(model, tmp_path, r=8, texts=texts, tokenizer=tokenizer, settings=FEW, progress=lines.append)
    lost = export.fidelity
    assert (export.exact, export.r, export.texts, lost.rows) == (False, 8, 48, 16)
    assert lost.kl < min(0.5 * lost.kl_base, lost.kl_lora_base)
    assert lost.agreement >= lost.agreement_base
    assert lines[0].startswith("Distilled: ")
    assert lines[1].startswith("step 8 of 40: KL ")
    assert lines[-1].startswith("KL from the adapter ")

    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)
    after = list(model.named_parameters())
    assert [(name, p.requires_grad) for name, p in after] == [(name, flag) for name, flag, _ in before]
    assert all(torch.equal(p, value) for (_, p), (_, _, value) in zip(after, before, strict=True))
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks

    loaded = PeftModel.from_pretrained(base_classifier(num_labels=3), tmp_path).eval()
    with torch.no_grad():
        kl = divergence(expected[::4], loaded(**inputs).logits[::4], "classes").mean().item()
    assert kl == pytest.approx(lost.kl, rel=1e-2, abs=1e-6)
    state = dict(loaded.named_parameters())
    head = dict(model.named_parameters())["base_model.model.classifier.modules_to_save.default.weight"]
    assert torch.equal(state["base_model.model.classifier.modules_to_save.default.weight"], head)


def test_card_and_scores(tmp_path, tokenizer, texts):
    """With labelled rows: accuracy of all three with intervals, printed, in the record and on the card."""
    model, _ = classifier(METHODS["unipelt"](task_type="SEQ_CLS"), num_labels=3)
    rows = [{**tokenizer(text), "labels": i % 3} for i, text in enumerate(texts[:12])]
    lines, record = [], TrainingRecord(labels=["a", "b", "c"], license="mit", base_model="org/base", trainer="SFT")
    to_lora(
        model, tmp_path, r=8, texts=texts, tokenizer=tokenizer, eval_rows=rows, settings=FEW, record=record,
        progress=lines.append,
    )  # fmt: skip
    assert lines[-1].startswith("accuracy: adapter 0.")
    assert lines[-1].endswith("(95 %)")
    saved = TrainingRecord.load(tmp_path)
    assert (saved.exported_from, saved.labels, saved.license, saved.trainer) == ("UNIPELT", record.labels, "mit", None)
    assert {result.method for result in saved.results} == {"adapter", "original", "base"}
    assert {"kl", "kl_base", "agreement", "accuracy difference", "accuracy low"} <= saved.export.keys()
    card = (tmp_path / "README.md").read_text()
    assert "Distilled from an adapter of UniPELT on 48 texts without labels, in 40 steps." in card
    assert "| on 16 texts held out | this adapter | base model |" in card
    assert "against the original adapter, 95 % interval [" in card
    assert "| metric | this adapter | original adapter | base model |" in card
    assert "pip install peft" in card


def test_causal_language_model(tmp_path, tokenizer, texts):
    """KL at each token; loss and token accuracy on rows with labels."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCAB, num_key_value_heads=2, **PLAIN, **SPECIAL)
    base = AutoModelForCausalLM.from_config(config)
    model = get_peft_model(base, METHODS["unipelt"](task_type="CAUSAL_LM"))
    randomise(model)
    rows = [{**tokenizer(text), "labels": tokenizer(text)["input_ids"]} for text in texts[:6]]
    export = to_lora(
        model.eval(), tmp_path, r=8, texts=texts, tokenizer=tokenizer, eval_rows=rows, settings=FEW, progress=None
    )
    assert export.fidelity.kl < 0.5 * export.fidelity.kl_base
    assert [score.metric for score in export.fidelity.scores] == ["loss", "token accuracy"]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


def test_sequence_to_sequence(tmp_path, tokenizer, texts):
    """Without labels the decoder reads what the adapter generates; rows with labels keep theirs."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    model = get_peft_model(
        AutoModelForSeq2SeqLM.from_config(T5Config(vocab_size=VOCAB, pad_token_id=0, eos_token_id=2, **sizes)),
        METHODS["pfeiffer"](task_type="SEQ_2_SEQ_LM"),
    )
    randomise(model)
    labelled = {**tokenizer(texts[0]), "labels": [5, 6, 2]}
    settings = DistillationSettings(steps=30, batch_size=8, learning_rate=1e-2, fit_rows=16, max_new_tokens=5)
    export = to_lora(
        model.eval(), tmp_path, r=8, texts=[*texts, labelled], tokenizer=tokenizer, eval_rows=[labelled] * 3,
        settings=settings, progress=None,
    )  # fmt: skip
    assert export.fidelity.kl < 0.7 * export.fidelity.kl_base
    assert [score.metric for score in export.fidelity.scores] == ["loss", "token accuracy"]


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_other_heads(tmp_path, tokenizer, texts, problem):
    """Numbers by their squared difference, labels each for itself."""
    number = problem == "regression"
    kind = {"num_labels": 1 if number else 3, "problem_type": problem}
    model, _ = classifier(METHODS["pfeiffer"](task_type="SEQ_CLS"), **kind)
    label = 0.5 if number else [1.0, 0.0, 1.0]
    rows = [{**tokenizer(text), "labels": label} for text in texts[:4]]
    settings = DistillationSettings(steps=40, batch_size=8, learning_rate=1e-2)
    export = to_lora(model, tmp_path, r=8, texts=texts, tokenizer=tokenizer, eval_rows=rows, settings=settings,
                     progress=None)  # fmt: skip
    assert export.fidelity.kl < 0.5 * export.fidelity.kl_base
    assert (export.fidelity.agreement is None) == number
    assert [s.metric for s in export.fidelity.scores] == ["squared error" if number else "accuracy"]


@pytest.mark.parametrize(("method", "rate"), [("pfeiffer", 3e-4), ("ladder", 4e-3)])
def test_usual_learning_rate(tmp_path, tokenizer, texts, method, rate, monkeypatch):
    """A fit is trained on gently; where nothing could be fitted, as for a ladder, training starts at zero."""
    used = []

    def train(parameters, loss, batches, steps, learning_rate, warmup):
        used.append(learning_rate)
        return train_steps(parameters, loss, batches, steps, learning_rate, warmup)

    monkeypatch.setattr(distil_module, "train_steps", train)
    model, _ = classifier(CONFIGS[method](task_type="SEQ_CLS"), num_labels=3)
    settings = DistillationSettings(steps=60, batch_size=8, fit_rows=32)
    export = to_lora(model, tmp_path, r=8, texts=texts, tokenizer=tokenizer, settings=settings, progress=None)
    assert used == [rate]
    assert export.fidelity.kl < 0.5 * export.fidelity.kl_base


def test_language_models_begin_without_a_fit(tmp_path, tokenizer, texts, monkeypatch):
    """By default; `fit_rows` asks for one, and so does `steps=0`, the fit alone."""
    used, fitted = [], []
    monkeypatch.setattr(distil_module, "train_steps", lambda *args: (used.append(args[4]), iter(()))[1])
    monkeypatch.setattr(distil_module, "fit_least_squares", lambda *args: fitted.append(True))
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCAB, num_key_value_heads=2, **PLAIN, **SPECIAL)
    model = get_peft_model(AutoModelForCausalLM.from_config(config), METHODS["unipelt"](task_type="CAUSAL_LM"))
    randomise(model)
    for fit_rows in (None, 4):
        settings = DistillationSettings(steps=1, fit_rows=fit_rows)
        with pytest.raises(ValueError, match="closer to the base model"):
            to_lora(model, tmp_path / "lora", texts=texts, tokenizer=tokenizer, settings=settings, progress=None)
    assert used == [1e-3, 1e-3]
    assert fitted == [True]
    with pytest.raises(ValueError, match="closer to the base model"):
        to_lora(model, tmp_path / "lora", texts=texts, tokenizer=tokenizer, progress=None,
                settings=DistillationSettings(steps=0))  # fmt: skip
    assert fitted == [True, True]


def test_refuses_what_is_closer_to_the_base(tmp_path, tokenizer, texts):
    """Nothing is written, and the error has both distances."""
    model, _ = classifier(METHODS["unipelt"](task_type="SEQ_CLS"), num_labels=3)
    settings = DistillationSettings(steps=1, learning_rate=1e-9, fit_rows=0)
    with pytest.raises(ValueError, match=r"closer to the base model \(KL .*\) than to the adapter \(KL"):
        to_lora(model, tmp_path / "lora", texts=texts, tokenizer=tokenizer, settings=settings, progress=None)
    assert not (tmp_path / "lora").exists()


def test_four_bits(tmp_path, tokenizer, texts):
    """The adapter and the LoRA share quantized weights."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCAB, num_key_value_heads=2, **{**PLAIN, "hidden_size": 64}, **SPECIAL)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantized, device_map="cpu")
    model = get_peft_model(base, METHODS["unipelt"](task_type="CAUSAL_LM"))
    randomise(model)
    export = to_lora(model.eval(), tmp_path / "lora", r=8, texts=texts, tokenizer=tokenizer, settings=FEW,
                     progress=None)  # fmt: skip
    assert export.fidelity.kl < 0.5 * export.fidelity.kl_base


def test_an_exact_export_is_measured_too(tmp_path, tokenizer, texts):
    model, _ = classifier(UniPELTConfig(methods=("lora",), gated=False, task_type="SEQ_CLS"), num_labels=3)
    export = to_lora(model, tmp_path, texts=texts, tokenizer=tokenizer, progress=None)
    assert export.exact
    assert export.fidelity.kl == pytest.approx(0, abs=1e-6)
    assert export.fidelity.agreement == 1


def test_target_modules(tmp_path, tokenizer, texts):
    """The leaves can be chosen; by default they are all linear leaves of the blocks."""
    model, base = classifier(METHODS["pfeiffer"](task_type="SEQ_CLS"), num_labels=3)
    assert len(linear_leaves(base)) == 12
    to_lora(model, tmp_path, texts=texts, tokenizer=tokenizer, target_modules=["query", "output.dense"], settings=FEW,
            progress=None)  # fmt: skip
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {*config["target_modules"]} == {"query", "output.dense"}
    with pytest.raises(ValueError, match="must name linear leaves, such as bert"):
        linear_leaves(base, ["nothing"])


# the parts


def test_reduced_rank_regression():
    """Beside the full least-squares matrix cut by SVD in the metric of the outputs."""
    torch.manual_seed(0)
    x, m = torch.randn(500, 6), torch.randn(5, 6)
    d = x @ m.T
    a, b = reduced_rank(x.T @ x, x.T @ d, 2)
    u, s, v = torch.linalg.svd(d, full_matrices=False)
    torch.testing.assert_close(x @ (b @ a).T, u[:, :2] * s[:2] @ v[:2], rtol=0.05, atol=0.5)
    a, b = reduced_rank(x.T @ x, x.T @ d, 8)  # above the leaf's width
    assert a.shape == (8, 6)
    torch.testing.assert_close(b @ a, m, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("backbone", ["bert", "llama", "gpt2", "t5"])
def test_least_squares_recovers_a_low_rank_branch(backbone):
    """An adapter that is a LoRA is met by the fit alone, nearly."""
    family = BACKBONES[backbone]
    model = get_peft_model(family.build(), UniPELTConfig(methods=("lora",), gated=False, r=2))
    randomise(model, std=0.1)
    model.eval()
    batch = family.inputs(batch=40)
    roles = Roles(model, linear_leaves(model.get_base_model()), 4)  # GPT-2 has two branches at one leaf
    with roles.attached(), torch.no_grad():
        fit_least_squares(roles, [batch])
        distances = {}
        for role in ("adapter", "lora", "base"):
            roles.use(role)
            distances[role] = output(model, batch)
        base = (distances["base"] - distances["adapter"]).norm()
        assert (distances["lora"] - distances["adapter"]).norm() < 0.2 * base


@pytest.mark.parametrize("method", ["pfeiffer", "unipelt", "layer_prefix"])
@pytest.mark.parametrize("backbone", ["bert", "llama"])
def test_least_squares_is_a_beginning(backbone, method):
    """On other adapters the fit alone takes a good part of the way."""
    family = BACKBONES[backbone]
    model = get_peft_model(family.build(), METHODS[method]())
    randomise(model)
    model.eval()
    batch = family.inputs(batch=40)
    with Roles(model, linear_leaves(model.get_base_model()), 8).attached() as roles, torch.no_grad():
        fit_least_squares(roles, [batch])
        of = {}
        for role in ("adapter", "lora", "base"):
            roles.use(role)
            of[role] = output(model, batch)
        assert (of["lora"] - of["adapter"]).norm() < 0.7 * (of["base"] - of["adapter"]).norm()


def test_roles_load_and_return_factors():
    """Factors of a lower rank are filled up with zeros."""
    model = get_peft_model(BACKBONES["llama"].build(), METHODS["pfeiffer"]())
    path = "model.layers.0.self_attn.q_proj"
    with Roles(model, [path], 3).attached() as roles:
        roles.load({path: Factors(torch.ones(2, 32), torch.ones(32, 2))})
        a, b = roles.factors()[path]
    assert (a.sum(), b.sum(), a[2].abs().sum()) == (64, 64, 0)


def test_divergences():
    p, q = torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([[0.5, 2.5, 0.0]])
    kl = torch.nn.functional.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="sum")
    torch.testing.assert_close(divergence(p, q, "classes"), kl[None])
    each = [torch.distributions.Bernoulli(logits=x[0]) for x in (p, q)]
    torch.testing.assert_close(divergence(p, q, "labels"), torch.distributions.kl_divergence(*each).sum()[None])
    torch.testing.assert_close(divergence(p, q, "numbers"), torch.tensor([0.375]))
    assert agreement(p, q, "classes").tolist() == [True]
    assert agreement(p, q, "labels").tolist() == [False]
    assert agreement(p, q, "numbers") is None
    assert kind_of(BertConfig(num_labels=1)) == "numbers"
    assert kind_of(T5Config(num_labels=1)) == "classes"


def test_row_scores():
    """Labels of a causal model are one token ahead of its logits; those of a decoder are not."""
    labels = torch.tensor([[-100, 1, 2]])
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 1] = logits[0, 1, 3] = 100.0
    scores = row_scores(logits, labels, "classes", writes_answers=False)
    assert scores["token accuracy"].tolist() == [0.5]
    assert scores["loss"].tolist() == [50.0]
    assert row_scores(logits, labels, "classes", writes_answers=True)["token accuracy"].tolist() == [0.0]


def test_intervals():
    """Wilson's for shares, the normal one else."""
    share = interval([1.0] * 9 + [0.0])
    assert (share.value, round(share.low, 3), round(share.high, 3)) == (0.9, 0.596, 0.982)
    mean = interval([0.0, 0.5, 1.0, 0.5])
    assert (mean.value, round(mean.high - mean.low, 3)) == (0.5, 0.8)
    alike = difference([1.0, 0.0], [1.0, 0.0])
    assert (alike.value, round(alike.high, 3), round(alike.low, 3)) == (0.0, 0.49, -0.49)
    better = difference([1.0] * 60 + [0.0] * 40, [1.0] * 50 + [0.0] * 50)
    assert better.value == 0.1
    assert 0 < better.low < 0.1 < better.high < 0.2
    assert difference([0.5, 0.75], [0.25, 0.5]).value == 0.25


def test_settings():
    for name, value in (
        ("steps", -1),
        ("steps", None),
        ("batch_size", 0),
        ("learning_rate", 0),
        ("held_out", 1.0),
        ("fit_rows", 1.5),
    ):
        with pytest.raises(ValueError, match=rf"`{name}` \(={value}\) must"):
            DistillationSettings(**{name: value})
