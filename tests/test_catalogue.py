"""The catalogue: complete, with traits as measured, sizes as on the real models, and the names of the lecture."""

import json

import pytest
from peft import PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoConfig
from typer.testing import CliRunner

from hf_peft_ext.budget.model_class import HEAD_CLASSES
from hf_peft_ext.catalogue.entries import METHOD_FAMILIES, TFEW, available, entry_named, read_entries
from hf_peft_ext.catalogue.measure import measure
from hf_peft_ext.catalogue.sizes import SizesOnModel
from hf_peft_ext.catalogue.table import describe, markdown
from hf_peft_ext.catalogue.traits import Traits, measurements, traits_of
from hf_peft_ext.cli import app
from hf_peft_ext.registry import REGISTERED
from hf_peft_ext.tuners.target_modules import norms, with_target_modules

from .backbones import BACKBONES, SPECIAL, VOCAB
from .test_docs import DOCS

# The names on the Venn diagram of the lecture, after Lialin et al. 2023 (https://arxiv.org/abs/2303.15647).
LECTURE = [
    *("Ladder-Side Tuning", "BitFit", "LN Tuning", "Attention Tuning", "FAR", "Parallel Adapters", "WARP"),
    *("Prompt-tuning", "Adapters", "LeTS", "(IA)³", "Prefix-Tuning", "S4", "KronA", "MAM Adapter", "UniPELT"),
    *("PHM Adapter", "Compacter", "Diff-Pruning", "Fish-Mask", "LT-SFT", "Sparse Adapter"),
]
FAST = ("bitfit", "lora", "ia3", "prompt_tuning", "unipelt")
UNMEASURED = {"xlora", "attention_fusion"}  # they need trained adapters


def run(*words, columns=None):
    environment = {} if columns is None else {"COLUMNS": str(columns)}
    done = CliRunner().invoke(app, ["methods", *words], env=environment)
    assert done.exit_code == 0, done.output
    return done.output


def test_every_type_has_an_entry():
    """Of peft and of this package; also their families and papers are written."""
    types = {entry.type for entry in available()} - {TFEW}
    assert types == {member.value for member in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert {member.value for member in REGISTERED} <= types
    assert types <= {member.value for member in PeftType}
    for entry in read_entries().values():
        assert entry.family, entry.name
        assert set(entry.family) <= set(METHOD_FAMILIES)
        assert entry.url.startswith("https://") or entry.name in ("composed", "trainable_tokens", "random_rank")
        assert entry.adds
        assert len(entry.title) <= 24


@pytest.mark.parametrize("name", LECTURE)
def test_the_names_of_the_lecture(name):
    entry = entry_named(name)
    assert entry.refused or traits_of(entry.name)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in read_entries()]
)
def test_traits_are_current(name):
    """What measured.json has is what is measured now."""
    entry = entry_named(name)
    if not entry.refused and name not in UNMEASURED:
        assert measure(entry) == traits_of(name)


def test_what_is_known_of_some_methods():
    """The measurements agree with the papers and with this package's contract."""
    assert traits_of("lora") == Traits(True, True, True, True, True, True, True, "none")
    assert [name for name, values in measurements()["traits"].items() if not values.get("backprop", True)] == [
        "ladder"
    ]
    assert not traits_of("osf").saves_memory
    assert traits_of("unipelt").inference == "FFN, input, layers"
    assert traits_of("prompt_tuning").inference == "input"
    assert {name for name, values in measurements()["traits"].items() if "error" in values} == UNMEASURED
    with pytest.raises(ValueError, match="`name` \\(='new'\\) must be measured first"):
        traits_of("new")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("model_type", ["bert", "llama"])
@pytest.mark.parametrize("name", ["bottleneck", "lora", "dora", "lokr", "ia3", "ln_tuning", "prompt_tuning", "tfew"])
def test_sizes_are_those_of_the_model(name, model_type):
    """Built on the meta device, against the real model."""
    entry = entry_named(name)
    config = AutoConfig.for_model(model_type, vocab_size=VOCAB, **SPECIAL, **BACKBONES[model_type].config)
    sizes_on = SizesOnModel(config)
    sizes, base = sizes_on.of(entry), HEAD_CLASSES[sizes_on.task].from_config(config)
    assert sizes.total == sum(p.numel() for p in base.parameters())
    model = get_peft_model(base, with_target_modules(entry.peft_config(task_type=sizes_on.task), base))
    assert sizes.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sizes.stored > 0
    assert sizes.error == ""


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sizes_on_a_model_that_peft_has_no_table_for():
    """Modules are found by structure; a method that does not fit says why."""
    config = AutoConfig.for_model("gpt_neox", vocab_size=VOCAB, **SPECIAL, **BACKBONES["gpt_neox"].config)
    sizes_on = SizesOnModel(config)
    assert all(sizes_on.of(entry_named(name)).trained > 0 for name in ("lora", "ia3", "ln_tuning", "unipelt"))
    assert norms(sizes_on.base)
    assert "vector_length" in sizes_on.of(entry_named("vblora")).error


def test_names():
    assert entry_named("kron-a").name == "krona"
    assert entry_named("Houlsby Adapter").name == "bottleneck"
    with pytest.raises(
        ValueError, match="`name` \\(='lorra'\\) must be a method of the catalogue; did you mean `lora`"
    ):
        entry_named("lorra")


# The command


@pytest.mark.parametrize("columns", [80, 200])
def test_the_table_fits(columns):
    """No line is longer than the terminal, and no cell is cut."""
    lines = [line.strip() for line in run(columns=columns).splitlines()]
    assert max(map(len, lines)) <= columns
    row = next(line for line in lines if line.startswith("Ladder side-tuning"))
    assert row.split() == ["Ladder", "side-tuning", "A", *"yes no no no no yes yes layers".split()]
    assert any(line.startswith("Refused: FAR, LeTS, WARP") for line in lines)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_for_a_model(tmp_path):
    """MethodSizes beside the traits, in blocks of columns at 80; as JSON."""
    config = AutoConfig.for_model("llama", vocab_size=VOCAB, **SPECIAL, **BACKBONES["llama"].config)
    config.save_pretrained(tmp_path)
    text = run("lora", "--for", str(tmp_path), columns=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "trained" in text
    (entry,) = json.loads(run("lora", "--for", str(tmp_path), "--json"))
    assert entry["sizes"]["trained"] == SizesOnModel(config).of(entry_named("lora")).trained
    assert entry["family"] == ["reparameterised"]
    assert entry["merges"] is True


def test_a_refused_method_says_why():
    assert "refused" in run("WARP")
    (entry,) = json.loads(run("WARP", "--json"))
    assert entry["refused"].startswith("It puts prompts between the sentences")
    assert "merges" not in entry


def test_wrong_arguments(tmp_path):
    for words, message in {("lorra",): "did you mean `lora`?", ("--for", str(tmp_path / "none")): "none"}.items():
        done = CliRunner().invoke(app, ["methods", *words])
        assert done.exit_code in (1, 2)
        assert done.stderr.startswith("Error")
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_the_table_of_the_documentation_is_current():
    """docs/methods/all_methods.md has what `hf-peft-ext methods --markdown` prints."""
    page = (DOCS / "methods" / "all_methods.md").read_text("utf-8")
    table = markdown(list(describe(available())))
    assert table in page
    assert run("--markdown") == table
