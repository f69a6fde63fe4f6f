"""The one call, on tiny models: what it leaves in its folder, that it goes on where it stopped, and that what does not
gain is not shipped; the tasks against transformers' own losses.
"""

import json
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from rich.progress import Progress
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from hf_peft_ext import BottleneckConfig
from hf_peft_ext.transfer import PlugInSettings, importance, plug_in
from hf_peft_ext.transfer.map import adapter_tensors
from hf_peft_ext.transfer.run.pipeline import Stages
from hf_peft_ext.transfer.run.result import Measured
from hf_peft_ext.transfer.run.task import Classification, Ranking, task_for

from .backbones import BACKBONES, SPECIAL
from .test_transfer_fold import LARGE, refuses

WORDS = "<pad> <s> </s> good bad film was the a so very yes no".split()
QUICK = {"small_steps": 4, "bridge_steps": 3, "refine_steps": 2, "batch_size": 4, "r": 4}


def word_tokenizer():
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture
def tokenizer():
    return word_tokenizer()


def rankings(n):
    texts = ["the film was good", "the film was bad", "so very good a film", "so very bad"]
    return [{"prompt": texts[i % 4], "choices": ["yes", "no"], "answer": i % 2} for i in range(n)]


def labelled(n):
    return [{"text": row["prompt"], "label": row["answer"]} for row in rankings(n)]


def classifier(**overrides):
    config = {**SPECIAL, **BACKBONES["bert"].config, "vocab_size": 60, "num_labels": 2, **overrides}
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert", **config))


def lora(**kwargs):
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **kwargs)


def run(tokenizer, folder, family="llama", **settings):
    small, large = BACKBONES[family].build(), BACKBONES[family].build(**LARGE[family])
    config = lora() if family == "llama" else LoraConfig(r=2, target_modules=["q", "v"])
    chosen = PlugInSettings(**{**QUICK, **settings})
    return plug_in(small, large, tokenizer, rankings(20), rankings(12), folder, config, None, chosen, progress=False)


def slow_run(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        slow_run("llama", {"bridge": "paper", "importance": "fisher", "refine": "module", "ladder": True}),
        slow_run("llama", {"bridge": "none", "refine": "scales", "init": "least_squares"}),
        slow_run("t5", {"around": "base", "importance": "magnitude"}),
    ],
)
def test_one_call(tokenizer, tmp_path, family, settings):
    model, result = run(tokenizer, tmp_path, family, **settings)
    assert json.loads((tmp_path / "small/adapter_config.json").read_text())["peft_type"] == "LORA"
    assert json.loads((tmp_path / "plugged/adapter_config.json").read_text())["peft_type"] == "LORA"
    assert (tmp_path / "refined").exists() == ("refine" in settings)
    assert (tmp_path / "adapter").exists() == result.gains
    assert len(result.base.correct) == 12
    assert 0.0 in result.tried
    assert not list(tmp_path.glob("partial-*"))
    fresh = BACKBONES[family].build(**LARGE[family])
    frozen = {name: p for name, p in model.get_base_model().named_parameters() if "lora_" not in name}
    for name, p in fresh.named_parameters():  # the large model is as it was
        found = frozen.get(name, frozen.get(name.replace(".weight", ".base_layer.weight")))
        assert torch.equal(found, p)
    if not result.gains:
        inputs = BACKBONES[family].inputs()
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, fresh(**inputs).logits)


def test_tensors_are_read_once_for_a_model(tokenizer, tmp_path, monkeypatch):
    """Of the small model's adapter, the large one's and the pruned copy's."""
    read, models = adapter_tensors.read_adapter, []
    monkeypatch.setattr(
        adapter_tensors, "read_adapter", lambda model, name: (models.append(model), read(model, name))[1]
    )
    run(tokenizer, tmp_path, refine="scales")
    assert len(models) == len({id(model) for model in models}) == 3


@pytest.mark.slow
def test_classification_with_bottlenecks(tokenizer, tmp_path):
    config = BottleneckConfig(task_type="SEQ_CLS", r=4)
    large = classifier(**LARGE["bert"])
    settings = PlugInSettings(**QUICK)
    _, result = plug_in(
        classifier(), large, tokenizer, labelled(20), labelled(12), tmp_path, config, labelled(8), settings, False
    )
    again = PeftModel.from_pretrained(classifier(**LARGE["bert"]), tmp_path / "plugged")
    assert again.active_peft_config.peft_type.value == "BOTTLENECK"
    assert set(result.tried) == {0.0, 0.25, 0.5, 1.0}


@pytest.mark.slow
def test_goes_on_where_it_stopped(tokenizer, tmp_path, monkeypatch):
    """Stopped in front of each stage in turn, it ends with the same tensors as in one go, and does no stage twice."""
    from hf_peft_ext.transfer.run import pipeline as stages

    run(tokenizer, tmp_path / "one", refine="module")
    for name in ("importance", "plug_tensors", "refine"):
        with monkeypatch.context() as patched:
            patched.setattr(stages, name, stop)
            with pytest.raises(KeyboardInterrupt):
                run(tokenizer, tmp_path / "parts", refine="module")
    run(tokenizer, tmp_path / "parts", refine="module")
    with monkeypatch.context() as patched:
        for name in ("importance", "plug_tensors", "refine", "fit", "choose_scale"):
            patched.setattr(stages, name, stop)
        run(tokenizer, tmp_path / "parts", refine="module")
    for stage in ("small", "plugged", "refined"):
        one, parts = ((tmp_path / way / stage / "adapter_model.safetensors").read_bytes() for way in ("one", "parts"))
        assert one == parts
    other = "`folder` .*holds a run with another r\\."
    refuses(other, ValueError, lambda: run(tokenizer, tmp_path / "parts", refine="module", r=9))


def test_scale_is_the_one_with_most_right_answers(monkeypatch):
    """Though the answers are likelier at another; of as many, the likeliest, and of the same, the smallest."""
    from hf_peft_ext.transfer.refine import module_scale as scales

    def choose(*rows):
        """A row for each scale, from 0 on: of two examples, the log-odds of the right answer."""
        by_scale = dict(zip((0.0, 0.5, 1.0), rows, strict=True))
        monkeypatch.setattr(scales, "at_scale", lambda model, scale: nullcontext(current.append(scale)))
        current: list[float] = []

        class Odds:
            def scores(self, model, rows):
                return [torch.tensor([odds, 0.0]).log_softmax(0) for odds in by_scale[current[-1]]]

            def answers(self, rows):
                return [0] * len(rows)

        return scales.choose_scale(SimpleNamespace(has_prefix=False, model=None), Odds(), [{}, {}], [0.5, 1.0])

    assert choose((1, -1), (1, 1), (2, -9)) == (0.5, {0.0: 0.5, 0.5: 1.0, 1.0: 0.5})
    assert choose((3, -1), (1, 0.1), (0.2, 0.1))[0] == 0.5
    assert choose((1, -1), (1, -1), (1, -1))[0] == 0.0


def stop(*args, **kwargs):
    raise KeyboardInterrupt


def test_losses_of_tasks(tokenizer):
    """Classification is the model's own loss; ranking is the cross-entropy of the choices' mean log-probabilities."""
    model, rows = classifier().eval(), labelled(4)
    task = task_for(tokenizer, rows)
    assert isinstance(task, Classification)
    torch.testing.assert_close(task.loss(model, rows), model(**task.batch(model, rows)).loss)
    decoder, ranked = BACKBONES["llama"].build(), rankings(4)
    task = task_for(tokenizer, ranked)
    assert isinstance(task, Ranking)
    scores = torch.stack(task.scores(decoder, ranked))
    expected = torch.nn.functional.nll_loss(scores, torch.tensor(task.answers(ranked)))
    torch.testing.assert_close(task.loss(decoder, ranked), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_batches_hold_the_right_answer(tokenizer, family):
    model, rows = BACKBONES[family].build(), rankings(2)
    batch = Ranking(tokenizer).batch(model, rows)
    yes, no = (tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    answers = [row[row >= 0][0].item() for row in batch["labels"]]
    assert answers == [yes, no]
    assert model(**batch).loss.isfinite()


@pytest.mark.filterwarnings("ignore:.*loss_type=None")
@pytest.mark.parametrize("kind", ["activation", "fisher"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert"])
def test_importance_of_batches_is_that_of_single_rows(tokenizer, tmp_path, family, kind):
    """Prompts and answers of unlike lengths: no example and no padding mixes into another's; against row by row."""
    model = (classifier() if family == "bert" else BACKBONES[family].build()).double().eval()
    texts = ["so", "the film was very very good", "a bad film", "good", "the film was so bad"]
    rows = [{"prompt": text, "choices": ["yes", "very bad film"], "answer": i % 2} for i, text in enumerate(texts)]
    if family == "bert":
        rows = [{"text": row["prompt"], "label": row["answer"]} for row in rows]
    stages = Stages(tmp_path, PlugInSettings(), task_for(tokenizer, rows), rows, Progress())
    alone, together = (importance(model, stages.batches(model, size), kind) for size in (1, 3))
    assert alone.examples == together.examples == 5
    for table in ("rows", "columns"):
        expected, found = getattr(alone, table), getattr(together, table)
        assert found.keys() == expected.keys()
        for path in found:
            assert expected[path].sum() > 0
            torch.testing.assert_close(found[path], expected[path], atol=1e-9, rtol=1e-4, msg=f"{table} of {path}")


def test_a_folder_of_another_run(tokenizer, tmp_path):
    """Other rows, another config or another model are refused; a run that has made nothing yet is none."""
    given: dict[str, Any] = {
        "small": BACKBONES["llama"].build(),
        "large": BACKBONES["llama"].build(**LARGE["llama"]),
        "tokenizer": tokenizer,
        "train": rankings(8),
        "test": rankings(4),
        "dev": rankings(4),
        "folder": tmp_path,
        "peft_config": LoraConfig(r=2, target_modules=["absent"]),
        "settings": PlugInSettings(**QUICK, bridge="none"),
        "progress": False,
    }
    with pytest.raises(ValueError, match="absent"):
        plug_in(**given)
    _, result = plug_in(**(given | {"peft_config": lora()}))  # the config can be put right
    other = BACKBONES["llama"].build()
    other.get_input_embeddings().weight.data.mul_(2)
    trained = get_peft_model(BACKBONES["llama"].build(), lora())
    for name, value in {
        "train": [*rankings(7), {**rankings(8)[7], "answer": 0}],
        "test": rankings(6),
        "dev": rankings(5),
        "peft_config": lora(lora_alpha=3),
        "small": other,
        "large": other,
    }.items():
        change = lambda name=name, value=value: plug_in(**(given | {"peft_config": lora(), name: value}))  # noqa: E731
        refuses(f"`folder` .*holds a run with another {name}\\.", ValueError, change)
    call = lambda: plug_in(**(given | {"small": trained}))  # noqa: E731
    refuses("with another peft_config, small", ValueError, call)
    again = given | {"large": BACKBONES["llama"].build(**LARGE["llama"]), "peft_config": lora()}
    assert plug_in(**(again | {"small": BACKBONES["llama"].build()}))[1] == result


def test_what_does_not_fit_is_refused_before_anything_is_made(tokenizer, tmp_path):
    small, large = BACKBONES["llama"].build(), BACKBONES["llama"].build(**LARGE["llama"])
    narrow = BACKBONES["llama"].build(vocab_size=9)

    def call(small=small, large=large, train=8, test=4, config=None, dev=4):
        rows = rankings(train), rankings(test), tmp_path, config or lora(), rankings(dev)
        return lambda: plug_in(small, large, tokenizer, *rows, PlugInSettings(**QUICK), False)

    refuses("`train` .=0. must hold rows, 1 at least", ValueError, call(train=0))
    refuses("`dev` .=0. must hold rows, 1 at least", ValueError, call(dev=0))
    refuses("`test` .=1. must hold rows, 2 at least", ValueError, call(test=1))
    refuses("`tokenizer` .=13. must have no more tokens than `small` .9.", ValueError, call(small=narrow))
    refuses("`tokenizer` .=13. must have no more tokens than `large` .9.", ValueError, call(large=narrow))
    refuses("as many stacks", ValueError, call(large=BACKBONES["t5"].build()))
    shapes = type(large)(large.config).to("meta")
    refuses("`large` .*must have weights, and is on the meta device: its answers", ValueError, call(large=shapes))
    adapted = get_peft_model(BACKBONES["llama"].build(), lora())
    refuses("`large` must be a model without adapters", TypeError, call(large=adapted))
    assert not list(tmp_path.iterdir())
    refuses("adapter of type IA3", TypeError, call(config=IA3Config(task_type="CAUSAL_LM")))
    assert not (tmp_path / "small").exists()


def test_answers_that_a_model_has_not():
    scores = [torch.zeros(2), torch.zeros(2)]
    refuses("`answer` .=2. must be the index of one of 2 answers", ValueError, lambda: Measured.of(scores, [0, 2]))
    refuses("`answer` .=-1. must be the index of one of 2", ValueError, lambda: Measured.of(scores, [-1, 0]))


def test_errors(tokenizer, tmp_path):
    refuses("`bridge`.*must hold delta, paper, none", ValueError, lambda: PlugInSettings(bridge="other"))
    refuses("`bridge_lr` .=0. must be a positive number", ValueError, lambda: PlugInSettings(bridge_lr=0))
    refuses("must have `prompt` and `choices`, or `text`, all", ValueError, lambda: task_for(tokenizer, [{"a": 1}]))
    refuses("`rows` .=0. must hold at least one row", ValueError, lambda: task_for(tokenizer, []))
    small, large = BACKBONES["llama"].build(), BACKBONES["llama"].build()
    call = lambda: plug_in(small, large, tokenizer, rankings(8), rankings(4), tmp_path, progress=False)  # noqa: E731
    refuses("`small` must be a PeftModel, or `peft_config`", TypeError, call)
