"""Every method of the catalogue end to end: two steps with our trainer, a card, `load_adapter` into a fresh model."""

import copy

import pytest
import torch
from peft import PeftModel, PeftType

from hf_peft_ext import load_adapter
from hf_peft_ext.catalogue.entries import TFEW, available, entry_named
from hf_peft_ext.catalogue.measure import close, outputs, perturb, task_ids, tiny_model
from hf_peft_ext.loading.config import ONLY, REFUSED, STOCK
from hf_peft_ext.registry import REGISTERED
from hf_peft_ext.trainers import AdapterTrainer
from hf_peft_ext.tuners.target_modules import with_target_modules

from .saved_adapters import WEIGHTS, refused_on, reweigh, rewrite
from .test_safe_load_refusals import FORBIDDEN
from .test_training import arguments

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),  # of AdaLoRA
]
FAST = ("adalora", "beft", "boft", "dora", "fourierft", "krona", "ln_tuning", "shira", "unipelt", "vera")

BEYOND = [
    ("multitask_prompt_tuning", "prompt_tuning_init_state_dict_path", "/etc/passwd"),
    ("shadow", "shadow_model", "someone/model"),
    ("vblora", "save_only_topk_weights", True),
    ("unilora", "save_indices", True),
    ("unilora", "r", 65),
    ("boft", "boft_n_butterfly_factor", 5),
]


def rows(name):
    """Text for a language model; with the task of each row where a method has several."""
    ids = torch.randint(0, 3, (8, 7), generator=torch.Generator().manual_seed(5))
    task = {"task_ids": torch.tensor(0)} if name in ("poly", "multitask_prompt_tuning") else {}
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row, **task} for row in ids]


def train(name, folder):
    """A model whose adapter was trained for two steps (AdaLoRA's for four) and then perturbed, saved with its card."""
    config = with_target_modules(entry_named(name).peft_config(task_type="CAUSAL_LM"), tiny_model())
    steps = 4 if name == "adalora" else 2  # it prunes after the first step, and before the last
    options = {"save_strategy": "no", "per_device_train_batch_size": 4, "remove_unused_columns": False}
    args = arguments(folder, max_steps=steps, **options)
    trainer = AdapterTrainer(copy.deepcopy(tiny_model()), args, train_dataset=rows(name), peft_config=config)
    before = {n: p.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert any(not torch.equal(after[n], p) for n, p in before.items())
    perturb(trainer.model)
    if name == "adalora":  # what was pruned stays zero
        tuner = trainer.model.base_model
        tuner.rankallocator.mask_using_rank_pattern(tuner.model, tuner.peft_config["default"].rank_pattern)
    trainer.save_model(str(folder / "adapter"))
    return trainer.model.eval()


def names():
    return [n.name if n.name in FAST else pytest.param(n.name, marks=pytest.mark.slow) for n in available()]


@pytest.mark.parametrize("name", names())
def test_trained_saved_and_loaded(name, tmp_path):
    """The loaded adapter has the outputs of the trained one, the base weights are unchanged, and there is a card."""
    kind = entry_named(name).type
    if kind in ("XLORA", "ATTENTION_FUSION"):
        pytest.skip("it needs trained adapters")
    model = train(name, tmp_path)
    folder = tmp_path / "adapter"
    assert "library_name: peft" in (folder / "README.md").read_text("utf-8")
    base = copy.deepcopy(tiny_model())
    if kind in REFUSED:
        with pytest.raises(ValueError, match=f"`peft_type` \\(='{kind}'\\) {REFUSED[kind][:30]}"):
            load_adapter(base, folder)
        return
    loaded = load_adapter(base, folder).eval()
    assert close(outputs(loaded), outputs(model))
    assert not close(outputs(loaded), outputs(tiny_model()))
    with torch.no_grad(), loaded.disable_adapter():
        if not loaded.active_peft_config.is_prompt_learning:
            assert close(loaded(input_ids=torch.arange(7)[None], **task_ids(loaded)).logits,
                         tiny_model()(input_ids=torch.arange(7)[None]).logits)  # fmt: skip


def test_every_rule_is_tried():
    assert {*FORBIDDEN} | {field for _, field, _ in BEYOND} >= {*ONLY}


def test_every_type_is_loaded_or_refused():
    assert not {*STOCK} & {*REFUSED}
    ours = {member.value for member in REGISTERED}
    assert {*STOCK, *REFUSED} | ours | {TFEW} == {entry.type for entry in available()} | ours
    assert {*STOCK, *REFUSED} | ours == {member.value for member in PeftType}


@pytest.mark.parametrize("change", ["key", "length", "kind"])
def test_ranks_that_do_not_fit(change, tmp_path):
    """An untrusted `rank_pattern` names modules, and says of each direction whether it is left."""
    model = train("adalora", tmp_path)
    pattern = model.peft_config["default"].rank_pattern
    key = next(iter(pattern))
    wrong = {
        "key": {"model.norm2.lora_E": pattern[key]},
        "length": {key: pattern[key][:-1]},
        "kind": {key: [1] * len(pattern[key])},
    }
    rewrite(tmp_path / "adapter", rank_pattern=wrong[change])
    refused_on(copy.deepcopy(tiny_model()), tmp_path / "adapter", "`rank_pattern` .* must (name modules|have true)")


@pytest.mark.parametrize(("name", "row"), [("shira", 0), ("shira", 1), ("supertuning", None)])
def test_indices_out_of_range(name, row, tmp_path):
    """Indices into the weights of a layer lie inside of them."""
    train(name, tmp_path)
    folder = tmp_path / "adapter"

    def change(tensors):
        key = next(key for key in tensors if key.endswith("_indices"))
        (tensors[key] if row is None else tensors[key][row])[0] = -1 if row == 0 else 2**20

    reweigh(folder, change)
    refused_on(copy.deepcopy(tiny_model()), folder, "_indices holds an index that is not in")


@pytest.mark.parametrize(("name", "field", "value"), BEYOND)
def test_fields_that_reach_beyond_the_file(name, field, value, tmp_path):
    entry_named(name).peft_config(task_type="CAUSAL_LM").save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"")
    rewrite(tmp_path, **{field: value})
    refused_on(copy.deepcopy(tiny_model()), tmp_path, f"`{field}` \\(=.*\\) must be")


def test_stock_peft_loads_the_same(tmp_path):
    """An AdaLoRA adapter, whose file holds fewer directions than its config's `init_r`."""
    train("adalora", tmp_path)
    stock = PeftModel.from_pretrained(copy.deepcopy(tiny_model()), tmp_path / "adapter")
    loaded = load_adapter(copy.deepcopy(tiny_model()), tmp_path / "adapter")
    assert torch.equal(outputs(loaded), outputs(stock))
