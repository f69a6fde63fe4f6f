"""Scores of answer choices, against a loop over choices and tokens, and against themselves in other batches."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

from hf_peft_ext.ranking.classifier import RankClassifier, batches, score_choices
from hf_peft_ext.ranking.encode import Example, collate, encode_choices
from hf_peft_ext.ranking.losses import choice_scores
from hf_peft_ext.ranking.packing import choice_token_scores

from .backbones import BACKBONES
from .methods import METHODS, randomise

TEXT = "Question: is the weather good today?\nAnswer: yes, it is; no, it is not; perhaps it will be. (A) (B) été"
PROMPTS = ["Question: is it good?\nAnswer:", "Is the weather not good today? ", "été", "The answer is:\n", ""]
CHOICES = [
    ["yes", "no", "perhaps it will be"],
    ["yes, it is"],
    ["no", "(A)"],
    ["good weather", " été", "no", "(B)"],
    ["a"],
]
SPECIAL = ["<pad>", "<s>", "</s>"]


def tokenizer(template=None, **kwargs):
    """Byte-level BPE: words are tokens with the space before them."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([TEXT] * 3, trainer)
    if template:
        ids = [(token, SPECIAL.index(token)) for token in SPECIAL]
        bpe.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    known = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **kwargs}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **known)


DECODER, SEQ2SEQ = tokenizer("<s> $A"), tokenizer("$A </s>", bos_token=None)


def build(backbone, adapter=True):
    family = BACKBONES[backbone]
    model = family.build(vocab_size=320)
    if adapter:
        task = "SEQ_2_SEQ_LM" if family.kind == "seq2seq" else "CAUSAL_LM"
        model = get_peft_model(model, METHODS["unipelt"](task_type=task))
        randomise(model)
    return model, SEQ2SEQ if family.kind == "seq2seq" else DECODER


@torch.no_grad()
def log_p(model, prompt, choice):
    """log p of a choice, one token after another."""
    total = 0.0
    for t, token in enumerate(choice):
        if model.config.is_encoder_decoder:
            ids = torch.tensor([[model.config.decoder_start_token_id, *choice[:t]]])
            logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=ids).logits
        else:
            logits = model(input_ids=torch.tensor([prompt + choice[:t]])).logits
        total += logits[0, -1].log_softmax(-1)[token].item()
    return total


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backbone", ["llama", "bloom", "t5", "bart"])
def test_scores_are_log_probabilities(backbone):
    """Each way to normalise, for one, two, three and four choices a prompt."""
    model, tok = build(backbone)
    scores = {way: score_choices(model, tok, PROMPTS, CHOICES, way) for way in ("none", "token", "byte", "character")}
    for i, (prompt, choices) in enumerate(zip(PROMPTS, CHOICES, strict=True)):
        encoded = encode_choices(tok, prompt, choices, model.config.is_encoder_decoder)
        for j, (text, ids) in enumerate(zip(choices, encoded.choices, strict=True)):
            whole = log_p(model, encoded.prompt, ids)
            divisors = {"none": 1, "token": len(ids), "byte": len(text.encode()), "character": len(text)}
            for way, divisor in divisors.items():
                assert scores[way][i][j].item() == pytest.approx(whole / divisor, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("packed", [None, False])
@pytest.mark.parametrize("backbone", ["llama", "mistral", "t5"])
def test_scores_do_not_depend_on_the_batch(backbone, packed):
    """On what shares a forward, on how choices are split, on order, side of padding, or the gates' view of padding."""
    model, tok = build(backbone)
    expected = [
        score_choices(model, tok, [p], [[c] for _ in "1"], packed=False)[0]
        for p, cs in zip(PROMPTS, CHOICES, strict=True)
        for c in cs
    ]
    for max_tokens in (1, 30, 70, 10_000):
        for side in ("left", "right"):
            tok.padding_side = side
            found = score_choices(model, tok, PROMPTS, CHOICES, max_tokens=max_tokens, packed=packed)
            assert [len(score) for score in found] == [3, 1, 2, 4, 1]
            assert_same(torch.cat(found).split(1), expected)
    backwards = score_choices(model, tok, PROMPTS[::-1], [c[::-1] for c in CHOICES[::-1]], packed=packed)
    assert_same(torch.cat(backwards).flip(0).split(1), expected)


@pytest.mark.parametrize("backbone", ["llama", "bloom", "t5"])
@pytest.mark.parametrize("max_tokens", [24, 60])
def test_forwards_are_bounded(backbone, max_tokens):
    """No forward reads more tokens than it may, and a prompt with many choices is split."""
    model, tok = build(backbone, adapter=False)
    read = []

    def note(module, args, kwargs):
        ids = kwargs["input_ids"]
        choices = kwargs.get("decoder_input_ids")
        read.append(ids.numel() if choices is None else len(choices) * (ids.shape[1] + choices.shape[1]))

    model.register_forward_pre_hook(note, with_kwargs=True)
    choices = ["yes", "no", "perhaps", "it is", "it is not", "good", "will be"]
    score_choices(model, tok, PROMPTS[2:], choices, max_tokens=max_tokens)
    assert len(read) > 1
    assert max(read) <= max_tokens
    assert sum(read) > len(read) * max_tokens / 4  # forwards are filled


@pytest.mark.parametrize("size", [1, 8, 50, 10_000])
def test_every_choice_is_in_one_batch(size):
    examples = [
        Example([1] * n, [[2] * m for m in lengths]) for n, lengths in ((5, (1, 4, 2)), (9, (3,)), (2, (7, 7)))
    ]
    for packed in (True, False):
        parts = [part for batch in batches(examples, size, packed) for part in batch]
        covered = [(i, j) for i, start, stop in parts for j in range(start, stop)]
        assert sorted(covered) == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1)]


def decoded(tok, *args, **kwargs):
    example = encode_choices(tok, *args, **kwargs)
    return tok.decode(example.prompt), [tok.decode(choice) for choice in example.choices]


def test_where_a_choice_begins():
    """White space goes with the choice, a space is put between words, and special tokens stand once, in front."""
    both = ["yes", "no"]
    assert decoded(DECODER, "Answer:", both) == ("<s>Answer:", [" yes", " no"])
    assert decoded(DECODER, "Answer: ", both) == ("<s>Answer:", [" yes", " no"])
    assert decoded(DECODER, "Answer:\n", [" yes"]) == ("<s>Answer:", ["\n yes"])
    assert decoded(DECODER, "Answer:", ["\nyes"]) == ("<s>Answer:", ["\nyes"])
    assert decoded(DECODER, "Answer: (", ["A)"], separator="") == ("<s>Answer: (", ["A)"])
    assert decoded(DECODER, "<s>Answer:", both) == ("<s>Answer:", [" yes", " no"])
    assert decoded(DECODER, "", both) == ("<s>", [" yes", " no"])
    assert decoded(tokenizer(), "", ["yes"]) == ("<s>", [" yes"])
    assert decoded(tokenizer(bos_token=None), "", ["yes"]) == ("</s>", [" yes"])
    assert decoded(tokenizer("<s> $A </s>"), "Answer:", both) == ("<s>Answer:", [" yes", " no"])
    assert decoded(SEQ2SEQ, "Answer:", both, encoder_decoder=True) == ("Answer:</s>", ["yes</s>", "no</s>"])


def test_choices_are_words_as_the_model_knows_them():
    """The space belongs to the word, as in the text itself; only what is behind the prompt's tokens is the choice."""
    ids = DECODER("Answer: yes")["input_ids"]
    assert encode_choices(DECODER, "Answer: ", ["yes"]) == Example(ids[:-1], [ids[-1:]])


def test_classifier():
    """The best choice of each prompt, and how probable the model finds it among them."""
    model, tok = build("llama")
    classifier = RankClassifier(model, tok, choices=["yes", "no", "perhaps"], normalization="none")
    scores = score_choices(model, tok, PROMPTS, ["yes", "no", "perhaps"], "none")
    assert classifier.predict(PROMPTS) == [["yes", "no", "perhaps"][score.argmax()] for score in scores]
    for score, p in zip(scores, classifier.predict_proba(PROMPTS), strict=True):
        joint = [math.exp(value) for value in score.tolist()]
        assert p.tolist() == pytest.approx([value / sum(joint) for value in joint], rel=1e-4)
    own = classifier.predict(PROMPTS, CHOICES)
    assert all(answer in choices for answer, choices in zip(own, CHOICES, strict=True))
    with model.disable_adapter():
        base = classifier.predict_proba(PROMPTS)
    assert not torch.allclose(torch.stack(base), torch.stack(classifier.predict_proba(PROMPTS)), atol=1e-3)
    assert RankClassifier(model, tok).predict(["Answer:"], ["no", "no"]) == ["no"]


def test_model_is_left_as_it_was():
    """Modes, types and devices; no gradient is kept, and dropout is off while scoring."""
    model, tok = build("t5")
    expected = score_choices(model, tok, PROMPTS, CHOICES)
    model.train()
    model.base_model.model.encoder.eval()
    before = {name: module.training for name, module in model.named_modules()}
    state = {name: (p.dtype, p.device, p.grad) for name, p in model.named_parameters()}
    scores = score_choices(model, tok, PROMPTS, CHOICES)
    assert_same(scores, expected)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert {name: (p.dtype, p.device, p.grad) for name, p in model.named_parameters()} == state
    assert all(s.dtype == torch.float32 and s.device.type == "cpu" and not s.requires_grad for s in scores)
    with pytest.raises(RuntimeError, match="no"):
        score_choices(broken(model), tok, PROMPTS, CHOICES)
    assert {name: module.training for name, module in model.named_modules()} == before


def broken(model):
    def fail(*_):
        raise RuntimeError("no")

    model.register_forward_pre_hook(fail)
    return model


def test_half_precision():
    """A bfloat16 model is scored in its own type; log-probabilities are taken in float32."""
    model, tok = build("llama")
    expected = score_choices(model, tok, PROMPTS, CHOICES)
    for a, b in zip(score_choices(model.bfloat16(), tok, PROMPTS, CHOICES), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.1)


def test_four_bit_models_train_after_scoring(tmp_path):
    """bitsandbytes' repacking at the first evaluation on a CPU takes no gradient from stock adapters either."""
    pytest.importorskip("bitsandbytes")
    BACKBONES["llama"].build(vocab_size=320, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map={"": "cpu"})
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"]))
    scores = score_choices(model, DECODER, PROMPTS, CHOICES)
    batch = collate([encode_choices(DECODER, *pair) for pair in zip(PROMPTS, CHOICES, strict=True)])
    choice_scores(choice_token_scores(model.train(), batch)).sum().backward()
    # B is 0 at the start, so that A has a gradient of 0
    assert all(p.grad.any() for name, p in model.named_parameters() if "lora_B" in name)
    assert_same(score_choices(model, DECODER, PROMPTS, CHOICES), scores)


def test_training_batches_are_the_same():
    """What is collated for training is what is scored."""
    encoded = [encode_choices(DECODER, *pair) for pair in zip(PROMPTS, CHOICES, strict=True)]
    made = collate(encoded, pad_token_id=0)
    assert made["example"].tolist() == [0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 4]
    assert made["prompt_mask"].sum(1).tolist() == [len(example.prompt) for example in encoded]
    rows = [choice for example in encoded for choice in example.choices]
    assert [row[row != -100].tolist() for row in made["choice_ids"]] == rows


def test_what_a_batch_holds():
    """Prompts padded with the padding token, choices with -100, and which example a choice belongs to."""
    examples = [Example([5, 6], [[1], [2, 3]]), Example([4], [[9, 8, 7]])]
    made = {name: tensor.tolist() for name, tensor in collate(examples, pad_token_id=3).items()}
    assert made == {
        "prompt_ids": [[5, 6], [4, 3]],
        "prompt_mask": [[1, 1], [1, 0]],
        "choice_ids": [[1, -100, -100], [2, 3, -100], [9, 8, 7]],
        "example": [0, 0, 1],
    }
    assert examples[0].part(1, 2) == Example([5, 6], [[2, 3]])


def test_wrong_arguments_are_named():
    model, tok = build("llama", adapter=False)
    with pytest.raises(ValueError, match=r"`normalization` \(='words'\) must be one of token, byte, character, none"):
        score_choices(model, tok, PROMPTS, CHOICES, "words")
    with pytest.raises(ValueError, match=r"`max_tokens` \(=0\) must be a positive whole number"):
        score_choices(model, tok, PROMPTS, CHOICES, max_tokens=0)
    with pytest.raises(TypeError, match="`prompts` must be a list of texts, not the single text 'Answer:'"):
        score_choices(model, tok, "Answer:", CHOICES)
    with pytest.raises(TypeError, match="`choices` must be a list of texts, not the single text 'yes'"):
        score_choices(model, tok, PROMPTS, "yes")
    with pytest.raises(ValueError, match=r"must be one list of texts, or a list of texts for each of the 5 prompts"):
        score_choices(model, tok, PROMPTS, CHOICES[:2])
    with pytest.raises(ValueError, match=r"must hold at least one text, and no empty one"):
        score_choices(model, tok, ["Answer:"], [["yes", ""]])
    with pytest.raises(ValueError, match=r"`choices` \(=None\) must be passed here or to the classifier"):
        RankClassifier(model, tok).predict(PROMPTS)
    with pytest.raises(ValueError, match="must be a list of at least one text"):
        encode_choices(tok, "Answer:", [])
    with pytest.raises(ValueError, match="must be a list of at least one text"):
        encode_choices(tok, "Answer:", "yes")
    with pytest.raises(
        ValueError, match=r"`tokenizer` \(='Swallowing'\) has neither a BOS nor an EOS token for an empty prompt"
    ):
        encode_choices(Swallowing(), "", ["a"])
    with pytest.raises(ValueError, match=r"`choices` \(=' '\) has no tokens after its prompt"):
        encode_choices(Swallowing(), "a", [" "])
    assert score_choices(model, tok, [], ["yes"]) == []


class Swallowing:
    """A tokenizer that makes one token of any text."""

    bos_token = bos_token_id = eos_token_id = None

    def __call__(self, text, **kwargs):
        return {"input_ids": [5] if text else []}
