"""ReLoRA as a callback: outputs are kept at each restart, the state and the learning rate start anew."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer

from hf_peft_ext import UniPELTConfig, load_backbone
from hf_peft_ext.trainers import AdapterTrainer, ReLoRACallback
from hf_peft_ext.trainers.relora import prune_state, restart, restartable

from .backbones import BACKBONES, output
from .methods import randomise
from .test_training import arguments

WIDE = {"hidden_size": 64, "intermediate_size": 128}
CONFIGS = {
    "lora": lambda **kw: LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, **kw),
    "unipelt": lambda **kw: UniPELTConfig(gated=False, r=2, bottleneck_size=4, num_virtual_tokens=3, **kw),
}
every_config = pytest.mark.parametrize("config", CONFIGS)
changed_base = pytest.mark.filterwarnings("ignore:ReLoRA has changed the base weights:UserWarning")


def rows(count=32):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 60, (count, 9), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def logits(model):
    was, inputs = model.training, BACKBONES["llama"].inputs()
    with torch.no_grad():
        y = output(model.eval(), inputs, use_cache=False)
    model.train(was)
    return y


class Watched(ReLoRACallback):
    """Keeps the outputs before and after each restart, and the learning rate of each step."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.pairs, self.rates = [], []

    def on_step_begin(self, args, state, control, **kwargs):
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])

    def on_step_end(self, args, state, control, **kwargs):
        before = logits(kwargs["model"])
        super().on_step_end(args, state, control, **kwargs)
        if self.restarts and self.restarts[-1] == state.global_step:
            self.pairs.append((before, logits(kwargs["model"])))


def trained(folder, model, callback, cls=Trainer, **kwargs):
    options = {"max_steps": 12, "learning_rate": 1e-2, "save_strategy": "no", "lr_scheduler_type": "constant"}
    args = arguments(folder, **(options | kwargs))
    made = cls(model, args, train_dataset=rows(), eval_dataset=rows(4), callbacks=[callback])
    made.train()
    return made


@changed_base
@every_config
@pytest.mark.parametrize("cls", [Trainer, AdapterTrainer])
def test_outputs_are_kept(config, cls, tmp_path):
    """Two restarts in 12 steps, none after the last; float32 outputs move by less than 1e-5, and base weights move."""
    model = get_peft_model(BACKBONES["llama"].build(), CONFIGS[config](task_type="CAUSAL_LM"))
    before = {name: p.clone() for name, p in model.named_parameters()}
    callback = Watched(merge_every=4, warmup_steps=2)
    trained(tmp_path, model, callback, cls)
    assert callback.restarts == [4, 8]
    for first, second in callback.pairs:
        torch.testing.assert_close(second, first, rtol=0, atol=1e-5)
    after = dict(model.named_parameters())
    changed = {name for name, p in before.items() if not torch.equal(after[name], p) and not p.requires_grad}
    assert len(changed) == 4  # query and value of two layers
    assert all("q_proj" in name or "v_proj" in name for name in changed)
    for name in changed:
        update = after[name] - before[name]
        assert torch.linalg.matrix_rank(update, rtol=1e-3) == 4  # two restarts of rank 2
        assert update.abs().max() < 1  # steps of 1e-2 cannot move a weight further
    assert callback.rates == pytest.approx([1e-2] * 4 + [0, 0.5e-2, 1e-2, 1e-2] * 2)


@changed_base
@every_config
def test_outputs_are_kept_in_4_bits(config, tmp_path):
    """On a 4-bit base model outputs move less than by quantizing it; the adapter alone is zero after a restart."""
    BACKBONES["llama"].build(**WIDE).save_pretrained(tmp_path / "base")
    model = get_peft_model(load_backbone(tmp_path / "base"), CONFIGS[config](task_type="CAUSAL_LM"))
    apart = (logits(load_backbone(tmp_path / "base")) - logits(load_backbone(tmp_path / "base", None))).norm()
    callback = Watched(merge_every=4, warmup_steps=2)
    trained(tmp_path, model, callback)
    assert len(callback.pairs) == 2
    for first, second in callback.pairs:
        assert 0 < (second - first).norm() < apart
    leaves = [m for m in model.modules() if type(m).__name__ == "Linear4bit" and hasattr(m, "quant_state")]
    assert leaves
    assert all(m.weight.quant_state.nested for m in leaves)


@changed_base
@every_config
def test_saved_in_two_parts(config, tmp_path):
    """The adapter and the unloaded base model, saved and loaded, give the trained model's outputs."""
    model = get_peft_model(BACKBONES["llama"].build(), CONFIGS[config](task_type="CAUSAL_LM"))
    with pytest.warns(UserWarning, match="ReLoRA has changed the base weights: save the base model too"):
        trained(tmp_path, model, ReLoRACallback(merge_every=5, warmup_steps=1))
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "adapter")), expected)


@every_config
def test_restart_by_hand(config):
    """A restart merges W + (alpha / r) B A, draws A anew, and sets B to zero; other parts of the adapter stay."""
    model = get_peft_model(BACKBONES["llama"].build(), CONFIGS[config]())
    randomise(model)
    layer, branch = restartable(model, "default")[0]
    a, b = (branch.A, branch.B) if config == "unipelt" else [
        branch.lora_A["default"].weight, branch.lora_B["default"].weight
    ]  # fmt: skip
    scaling = 8 if config == "unipelt" else 4  # 16 / 2, peft's 8 / 2
    expected = layer.get_base_layer().weight + scaling * b @ a
    before = {name: p.clone() for name, p in model.named_parameters()}
    restarted = restart(model, "default")
    torch.testing.assert_close(layer.get_base_layer().weight, expected)
    assert (b == 0).all()
    assert a.abs().max() > 0
    kept = [name for name, p in model.named_parameters() if p.requires_grad and all(p is not q for q in restarted)]
    assert len(restarted) == 8
    assert all(torch.equal(model.get_parameter(name), before[name]) for name in kept)
    assert bool(kept) == (config == "unipelt")


@pytest.mark.parametrize("fraction", [0.0, 0.9, 1.0])
def test_pruned_state(fraction):
    """A random fraction of both moments is zero; all state is dropped for 1; other parameters keep theirs."""
    first, second = (torch.nn.Parameter(torch.ones(40, 50)) for _ in range(2))
    optimizer = torch.optim.AdamW([first, second])
    (first + second).square().sum().backward()
    optimizer.step()
    prune_state(optimizer, [first], fraction)
    assert (optimizer.state[second]["exp_avg"] != 0).all()
    if fraction == 1:
        assert first not in optimizer.state
        optimizer.step()
        assert optimizer.state[first]["step"] == 1
        return
    for name in ("exp_avg", "exp_avg_sq"):
        assert (optimizer.state[first][name] == 0).float().mean().item() == pytest.approx(fraction, abs=0.03)


def test_schedule():
    """The factor of the learning rate: none before the first restart, then from 0 to 1 in `warmup_steps`."""
    callback = ReLoRACallback(merge_every=5, warmup_steps=4)
    assert [callback.factor(step) for step in range(12)] == [1] * 5 + [0, 0.25, 0.5, 0.75, 1, 0, 0.25]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge_every": 0}, r"`merge_every` \(=0\) must be a positive whole number"),
        ({"merge_every": 4, "warmup_steps": 4}, r"`warmup_steps` \(=4\) must be below `merge_every` \(=4\)"),
        ({"merge_every": 40, "prune": 1.1}, r"`prune` \(=1.1\) must lie in \[0, 1\]"),
    ],
)
def test_refuses_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        ReLoRACallback(**options)


def test_refuses_runs(tmp_path):
    """Gated branches, DoRA, schedules with a state, resuming and the best checkpoint are errors before a step."""
    callback, llama = ReLoRACallback(merge_every=4, warmup_steps=1), BACKBONES["llama"].build

    def attempt(config, **kwargs):
        trained(tmp_path, get_peft_model(llama(), config), callback, **kwargs)

    with pytest.raises(ValueError, match=r"`adapter_name` \(='default'\) must have a LoRA, or a low-rank branch with"):
        attempt(UniPELTConfig())
    with pytest.raises(ValueError, match=r"`model` \(=\['DoraLinearVariant'\]\) must have plain LoRA for ReLoRA"):
        attempt(LoraConfig(target_modules=["q_proj"], use_dora=True))
    lora = LoraConfig(target_modules=["q_proj"])
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "save_steps": 4}
    with pytest.raises(ValueError, match=r"`load_best_model_at_end` \(=True\) must be False for ReLoRA"):
        attempt(lora, eval_steps=4, **best)
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 4}
    with pytest.raises(
        ValueError, match=r"`lr_scheduler_type` \(=.*\) must be a function of the step, such as linear"
    ):
        attempt(lora, **plateau)


@changed_base
def test_refuses_to_resume(tmp_path):
    """A checkpoint after a restart has no base weights to resume with; one before it is resumed."""
    model = get_peft_model(BACKBONES["llama"].build(), CONFIGS["lora"]())
    trained(tmp_path, model, ReLoRACallback(4, 1), max_steps=6, save_strategy="steps", save_steps=3)
    for step, fails in ((3, False), (6, True)):
        model = get_peft_model(BACKBONES["llama"].build(), CONFIGS["lora"]())
        callback = ReLoRACallback(4, 1)
        made = Trainer(model, arguments(tmp_path, max_steps=8, save_strategy="no"), train_dataset=rows(),
                       callbacks=[callback])  # fmt: skip
        if fails:
            with pytest.raises(ValueError, match=r"`resume_from_checkpoint` \(=6\) must be before the first restart"):
                made.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        else:
            made.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
            assert callback.restarts == [4]
