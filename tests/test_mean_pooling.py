"""Classifiers on the mean of the last hidden states: what they compute, how they are saved, and who loads them."""

import re
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, Trainer, TrainingArguments

from hf_peft_ext import MeanPoolingForSequenceClassification, load_adapter, load_backbone
from hf_peft_ext.catalogue.adapter_report import inspect_adapter
from hf_peft_ext.compare.sizes import empty_model
from hf_peft_ext.recipes import Recipe
from hf_peft_ext.recipes.recipe_source import RecipeError

from .backbones import BACKBONES
from .methods import ALL, randomise
from .recipe_runs import FAST, classification, elsewhere, models, succeed  # noqa: F401
from .test_quantized import folders  # noqa: F401
from .test_to_lora_command import SHORT, to_lora

FAMILIES = [name for name, backbone in BACKBONES.items() if backbone.kind != "seq2seq"]
CONFIGS = {**ALL, "lora": LoraConfig, "all_linear": partial(LoraConfig, target_modules="all-linear")}
LABELS = {0: "no", 1: "perhaps", 2: "yes"}


@pytest.fixture
def saved_base(tmp_path):
    """Saves a tiny model without a head."""

    def save(family="bert"):
        backbone = BACKBONES[family]
        config = AutoConfig.for_model(backbone.model_type, vocab_size=60, pad_token_id=0, **backbone.config)
        AutoModel.from_config(config).save_pretrained(tmp_path / family)
        return tmp_path / family

    return save


def classifier(folder, **options):
    return MeanPoolingForSequenceClassification.from_pretrained(folder, id2label=LABELS, **options).eval()


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_the_mean_of_the_text(family, saved_base):
    """The mean of the base model's last hidden states over the tokens of each text; saved whole and loaded, equal."""
    folder = saved_base(family)
    model, base = classifier(folder), AutoModel.from_pretrained(folder).eval()
    inputs = BACKBONES[family].inputs()
    with torch.no_grad():
        hidden = base(**inputs).last_hidden_state
    means = [text[mask.bool()].mean(0) for text, mask in zip(hidden, inputs["attention_mask"], strict=True)]
    expected = model.mean_pooling.classifier(torch.stack(means))
    torch.testing.assert_close(logits(model, inputs), expected)
    whole = {"input_ids": inputs["input_ids"], "attention_mask": torch.ones_like(inputs["attention_mask"])}
    torch.testing.assert_close(logits(model, {"input_ids": inputs["input_ids"]}), logits(model, whole))
    model.save_pretrained(folder / "whole")
    again = MeanPoolingForSequenceClassification.from_pretrained(folder / "whole").eval()
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    assert again.config.id2label == LABELS


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
@pytest.mark.parametrize("method", ["unipelt", "s4", "ladder", "lora", "all_linear", "sparse", "intrinsic"])
def test_adapters(method, family, saved_base, tmp_path):
    """Untrained it is the base model; its head is saved; loaded by this package and by peft it is equal."""
    folder, inputs = saved_base(family), BACKBONES[family].inputs()
    config = CONFIGS[method](task_type="SEQ_CLS")
    base = classifier(folder)
    expected = logits(base, inputs)
    model = get_peft_model(base, config).eval()
    torch.testing.assert_close(logits(model, inputs), expected)
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    for load in (load_adapter, PeftModel.from_pretrained):
        loaded = load(classifier(folder), tmp_path / "adapter").eval()
        assert torch.equal(logits(loaded, inputs), logits(model, inputs))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_prompt_tuning(family, saved_base, tmp_path):
    """The mean is over the virtual tokens too."""
    inputs, folder = BACKBONES[family].inputs(), saved_base(family)
    model = get_peft_model(classifier(folder), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)).eval()
    with torch.no_grad():
        words = model.get_base_model().get_input_embeddings()(inputs["input_ids"])
        prompt = model.get_prompt(len(words))
    mask = torch.cat([torch.ones(len(words), 4), inputs["attention_mask"]], 1)
    joined = {"inputs_embeds": torch.cat([prompt, words], 1), "attention_mask": mask}
    torch.testing.assert_close(logits(model, inputs), logits(model.get_base_model(), joined))
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_adapter(classifier(folder), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_prefix_tuning(family, saved_base):
    """peft's prefixes, which are in the mask and have no hidden states, count in attention, and not in the mean."""
    inputs = BACKBONES[family].inputs()
    config = PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    model = get_peft_model(classifier(saved_base(family)), config).eval()
    first = logits(model, inputs)
    model.prompt_encoder.default.embedding.weight.data.mul_(20)
    second = logits(model, inputs)
    assert (first - second).abs().max() > 1e-3
    alone = {name: value[1:, :6] for name, value in inputs.items()}  # without its padding
    torch.testing.assert_close(logits(model, alone)[0], second[1])


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_heads_are_not_taken_for_each_other(family, saved_base, tmp_path):
    """An adapter of one class is refused on the other; the error says which class to load."""
    folder = saved_base(family)
    others = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    get_peft_model(others, LoraConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path / "theirs")
    get_peft_model(classifier(folder), LoraConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path / "ours")
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    with pytest.raises(ValueError, match="The adapter was trained on MeanPoolingForSequenceClassification: load"):
        load_adapter(model, tmp_path / "ours")
    with pytest.raises(ValueError, match="The adapter was trained on transformers' own classifier: load"):
        load_adapter(classifier(folder), tmp_path / "theirs")


def test_regression_and_labels_of_several_classes(saved_base):
    """The losses are transformers' own."""
    folder, inputs = saved_base(), BACKBONES["bert"].inputs()
    model = MeanPoolingForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    targets = torch.tensor([0.5, -1.0, 2.0])
    output = model(**inputs, labels=targets)
    torch.testing.assert_close(output.loss, (output.logits[:, 0] - targets).square().mean())
    several = classifier(folder, problem_type="multi_label_classification")
    targets = torch.tensor([[1.0, 0, 1], [0, 0, 1], [0, 1, 0]])
    output = several(**inputs, labels=targets)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(output.logits, targets)
    torch.testing.assert_close(output.loss, expected)
    loss, only = several(**inputs, labels=targets, return_dict=False)
    assert torch.equal(loss, output.loss)
    assert torch.equal(only, output.logits)
    tuples = classifier(folder, return_dict=False)
    assert [type(found) for found in tuples(**inputs)] == [torch.Tensor]


def test_half_precision_sums_in_float32(saved_base):
    """A long text in bfloat16 has the mean of its rounded states."""
    model = classifier(saved_base(), dtype=torch.bfloat16)
    inputs = BACKBONES["bert"].inputs(length=400)
    with torch.no_grad():
        hidden = model.bert(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None].double()
        exact = (hidden.double() * mask).sum(1) / mask.sum(1)
        expected = model.mean_pooling.classifier(exact.bfloat16())
    assert torch.equal(logits(model, inputs), expected)


def test_every_parameter_is_used(saved_base):
    """The pooler of the base model, which would be trained for nothing, is left out."""
    model = classifier(saved_base())
    model(**BACKBONES["bert"].inputs(), labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_gradient_accumulation_and_checkpointing(saved_base, tmp_path):
    """transformers' Trainer trains as with one large batch, with checkpointing too."""
    rows = [{"input_ids": [5 + i, 7, 9, 11 + i], "labels": i % 3} for i in range(8)]
    folder, trained = saved_base(), []
    for size, checkpointing in ((8, False), (2, False), (2, True)):
        torch.manual_seed(0)
        arguments = TrainingArguments(
            tmp_path, max_steps=2, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size,
            optim="sgd", learning_rate=0.1, report_to="none", use_cpu=True, seed=0,
        )  # fmt: skip
        model = classifier(folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        if checkpointing:
            model.gradient_checkpointing_enable()
        before = model.mean_pooling.classifier.weight.detach().clone()
        Trainer(model, arguments, train_dataset=rows).train()
        trained.append(model.mean_pooling.classifier.weight.detach() - before)
    assert trained[0].abs().max() > 1e-3
    torch.testing.assert_close(trained[1], trained[0])
    torch.testing.assert_close(trained[2], trained[1])


def test_refusals(saved_base):
    with pytest.raises(ValueError, match=r"`config` \(='t5'\) must be of an encoder or a decoder"):
        MeanPoolingForSequenceClassification.from_config(AutoConfig.for_model("t5"))
    with pytest.raises(ValueError, match=r"`trust_remote_code` \(=True\) must not be set"):
        MeanPoolingForSequenceClassification.from_pretrained(saved_base(), trust_remote_code=True)
    mask = torch.ones(3, 1, 9, 9)
    with pytest.raises(
        ValueError, match=r"`attention_mask` has the shape \(3, 1, 9, 9\), and must have \(batch, length\) = \(3, 9\)"
    ):
        classifier(saved_base())(BACKBONES["bert"].inputs()["input_ids"], mask)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized(bits, folders):  # noqa: F811
    """The head is not quantized, so that it can be trained."""
    model = load_backbone(folders("bert"), bits, auto_class=MeanPoolingForSequenceClassification, num_labels=3)
    assert type(model.mean_pooling.classifier) is torch.nn.Linear
    assert type(model.bert.encoder.layer[0].output.dense) is not torch.nn.Linear
    adapted = get_peft_model(model, ALL["unipelt"](task_type="SEQ_CLS"))
    adapted(**BACKBONES["bert"].inputs(), labels=torch.tensor([0, 1, 2])).loss.backward()


@pytest.fixture
def recipe(models, tmp_path):  # noqa: F811
    """A recipe of a classifier on the mean."""
    rows = [{"text": f"w{i} w{i % 7} w{i % 5}", "label": i % 2, "part": "ab"[i % 4 == 0]} for i in range(32)]
    path = classification(models, tmp_path, rows, split_column="part", train_split="a", eval_split="b")
    return [path, "model.pooling=mean", "peft={peft_type: UNIPELT, task_type: SEQ_CLS, bottleneck_size: 4}", *FAST]


def test_recipe_card_and_export(recipe, models, tmp_path):  # noqa: F811
    """`pooling: mean` trains it; its card's code loads it; `to-lora` loads it with the recipe and without."""
    succeed(*recipe, "learning_rate=0.1", "metrics=[accuracy]")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pip install hf_peft_ext" in card
    code = re.search(r"```python\n(.*?)\n```", card, re.DOTALL)[1].replace('"out"', repr(str(tmp_path / "out")))
    code = re.sub(r"base = .*", f"base = {models['bert']!r}", code).replace("A text to classify.", "w1 w2 w3")
    space = {}
    exec(compile(code, "card", "exec"), space)
    assert type(space["model"].get_base_model()) is MeanPoolingForSequenceClassification
    assert not empty_model(Recipe.read(recipe[0], recipe[1:]), ["a", "b"]).mean_pooling.classifier.weight.numel() % 2
    assert inspect_adapter(tmp_path / "out", base=models["bert"]).safe == "yes"
    for remove in ("", "recipe.yaml"):
        (tmp_path / "out" / remove).unlink() if remove else None
        texts = tmp_path / "texts.txt"
        texts.write_text("".join(f"w{i} w{i % 7} w{i % 5}\n" for i in range(32)))
        options = ["--texts", texts, "--model", models["bert"]] if remove else []
        result = to_lora(tmp_path / "out", tmp_path / f"lora{remove}", *SHORT, *options)
        assert result.exit_code == 0, (result.output, result.exception)
        base = MeanPoolingForSequenceClassification.from_pretrained(models["bert"], num_labels=2)
        load_adapter(base, tmp_path / f"lora{remove}")


def test_recipe_refuses_other_tasks(models, tmp_path):  # noqa: F811
    (tmp_path / "rows.jsonl").write_text('{"prompt": "w1", "response": "w2"}\n' * 4)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{model_name_or_path: {models['llama']}, pooling: mean}}\n"
        f"peft: {{peft_type: LORA, task_type: CAUSAL_LM}}\n"
        f"data: {{data_files: {tmp_path / 'rows.jsonl'}, prompt_column: prompt, response_column: response}}\n"
        f"training: {{output_dir: {tmp_path / 'out'}}}\n"
    )
    with pytest.raises(RecipeError, match=r"`model.pooling` \(='mean'\) needs a `task_type` of SEQ_CLS"):
        Recipe.read(path)
    path.write_text(path.read_text().replace("pooling: mean", "pooling: max"))
    with pytest.raises(RecipeError, match=r"model.pooling.*must be null or mean"):
        Recipe.read(path)
