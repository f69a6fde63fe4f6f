"""T-Few from a recipe: what is trained is what the trainer trains from the same rows by hand."""

import json
import re

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from hf_peft_ext import RankClassifier
from hf_peft_ext.prompts import chat
from hf_peft_ext.recipes import Recipe, RecipeError, prepare

from .backbones import BACKBONES
from .recipe_runs import elsewhere, run, succeed  # noqa: F401
from .test_rank_classification import DECODER, SEQ2SEQ
from .test_tfew_trainer import frozen  # noqa: F401

# 2026-11: the data loader asks for pinned memory wherever it runs
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")

RECIPE = "examples/recipes/tfew.yaml"
CHAT = "{% for m in messages %}<s>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders with tiny models and tokenizers: llama, t5."""
    found = {}
    for name, tokenizer in (("llama", DECODER), ("t5", SEQ2SEQ)):
        found[name] = str(tmp_path_factory.mktemp(name))
        BACKBONES[name].build(vocab_size=320).save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


def changes(model, out):
    few = ("use_cpu=true", "max_steps=3", "max_train_samples=16", "max_eval_samples=12", "disable_tqdm=true")
    return [f"model={{model_name_or_path: {model}}}", f"output_dir={out}", *few]


@pytest.mark.parametrize("name", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_tfew(name, models, tmp_path):
    """The recipe of examples/ trains an IA3 adapter whose ranking has the accuracy that is reported."""
    out = tmp_path / "adapter"
    task_type = ["task_type=SEQ_2_SEQ_LM"] if name == "t5" else []
    shown = succeed(RECIPE, *changes(models[name], out), *task_type)
    record = json.loads((out / "training_record.json").read_text())
    assert (record["trainer"], record["recipe"]["peft"]["peft_type"]) == ("T-Few", "TFEW")
    accuracy = {result["metric"]: result["value"] for result in record["results"]}["accuracy"]
    assert f"{accuracy:.4g}" in re.search(r"^accuracy +(\S+)", shown, re.MULTILINE)[1]
    auto = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
    model = PeftModel.from_pretrained(auto.from_pretrained(models[name]), out)
    assert model.peft_config["default"].peft_type == "IA3"

    recipe = Recipe.read(out / "recipe.yaml")
    _, test, _ = recipe.data.load(recipe.training.seed)
    keys, choices = list(recipe.data.choices), list(recipe.data.choices.values())
    prompts = [f"Message from a customer: {text}\nTopic of the message:" for text in test["text"]]
    classifier = RankClassifier(model, AutoTokenizer.from_pretrained(out), choices)
    predicted = [keys[choices.index(best)] for best in classifier.predict(prompts)]
    right = [p == intent for p, intent in zip(predicted, test["intent"], strict=True)]
    assert sum(right) / len(right) == pytest.approx(accuracy)


def data(file, **keys):
    return "data=" + json.dumps({"data_files": str(file), "prompt": "{{ text }}?", "answer_column": "label", **keys})


@pytest.fixture
def file(tmp_path):
    """Two rows whose choices are columns."""
    file = tmp_path / "rows.jsonl"
    rows = [
        {"text": "good", "a": "yes", "b": "no", "label": 1},
        {"text": "weather", "a": "(A)", "b": "(B)", "label": 0},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_choices_of_each_row(models, file, tmp_path):
    """Choices in Jinja or by what stands for them, answers by index, and prompts as turns of a chat."""
    keys = {"choices": ["{{ a }}", "{{ b }}"]}
    trainer = prepare(
        Recipe.read(RECIPE, [*changes(models["llama"], tmp_path / "out"), data(file, **keys), "metrics=[]"])
    )
    expected = {"prompt": "good?", "choices": ["yes", "no"], "answer": 1}
    assert trainer.train_dataset[0] == expected
    numbered = data(file, choices={"0": "no", "1": "yes"}).replace('"0"', "0").replace('"1"', "1")
    trainer = prepare(Recipe.read(RECIPE, [*changes(models["llama"], tmp_path / "out"), numbered, "metrics=[]"]))
    assert trainer.train_dataset[0] == {"prompt": "good?", "choices": ["no", "yes"], "answer": 1}
    DECODER.chat_template = CHAT
    try:
        DECODER.save_pretrained(tmp_path)
        BACKBONES["llama"].build(vocab_size=320).save_pretrained(tmp_path)
        wanted = [*changes(tmp_path, tmp_path / "out"), data(file, **keys, use_chat_template=True), "metrics=[]"]
        prompt = prepare(Recipe.read(RECIPE, wanted)).train_dataset[0]["prompt"]
        assert prompt == chat(DECODER, "good?") == "<s>good?"
    finally:
        DECODER.chat_template = None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"choices": ["yes", "no"], "prompt": " "},
            r"`data.prompt` is wrong: `prompt` \(=' '\) must be a Jinja templ",
        ),
        ({"choices": []}, r"`data.choices` is wrong: `choices` of template 'data' must hold at least one choice"),
        ({"choices": ["yes", "no"], "prompt": "{{ text"}, r"`data.prompt` is wrong: `prompt` of template 'data'"),
        (
            {"choices": ["yes", "no"], "prompt": "{{ test }}"},
            r"`data`: rows has no column `test`.*did you mean `text`\?",
        ),
        ({"choices": ["yes"]}, r"`data`: row 0 of rows: `answer` of template 'data' must be one of the choices"),
        ({"choices": {"x": "yes", "y": "no"}}, r"`data`: row 0 of rows: `label` \(=1\) must be one of x, y\."),
        (
            {"choices": ["yes", "no"], "use_chat_template": True},
            r"`data`: row 0 of rows: `tokenizer` \(TokenizersBackend\) has no chat template",
        ),
        (
            {"choices": ["yes", "no"], "max_length": 4},
            r"`data.max_length` is not a key of `data` for TFEW and CAUSAL_LM",
        ),
    ],
)
def test_wrong_data(keys, message, models, file, tmp_path):
    with pytest.raises(RecipeError, match=message):
        prepare(Recipe.read(RECIPE, [*changes(models["llama"], tmp_path / "out"), data(file, **keys), "metrics=[]"]))


def test_gguf(monkeypatch, models, tmp_path):
    """A model in GGUF is read from its file, and unpacked, tokenizer included."""
    asked = []

    def note(cls):
        stock = cls.from_pretrained.__func__

        def noted(self, source, gguf_file=None, quantization_config=None, **kwargs):
            asked.append((gguf_file, getattr(quantization_config, "dequantize", None)))
            return stock(self, source, **kwargs)

        monkeypatch.setattr(cls, "from_pretrained", classmethod(noted))

    note(AutoModelForCausalLM)
    note(AutoTokenizer)
    prepare(Recipe.read(RECIPE, [*changes(models["llama"], tmp_path / "out"), "gguf_file=model.gguf"]))
    assert asked == [("model.gguf", None), ("model.gguf", True)]


@pytest.mark.slow
def test_other_adapters(models, tmp_path):
    """Any adapter can be trained so; without `choices` CAUSAL_LM is supervised fine-tuning, as before."""
    peft = "peft={peft_type: UNIPELT, task_type: CAUSAL_LM, bottleneck_size: 8}"
    shown = succeed(RECIPE, *changes(models["llama"], tmp_path / "out"), peft, "scale_parameter=false")
    assert "UNIPELT on" in shown
    failed = run(RECIPE, *changes(models["llama"], tmp_path / "out"), "data={data_files: x.csv}")
    assert failed.exit_code == 2
