"""Other libraries' trainers: with ladders, which alone they change, and as trainers of adapters."""

import math

import pytest
import torch
from datasets import Dataset
from peft import inject_adapter_in_model

from hf_peft_ext import LadderConfig, UniPELTConfig, load_adapter
from hf_peft_ext.trainers import AdapterTrainerMixin

from .backbones import BACKBONES
from .methods import randomise
from .test_training import tokenizer
from .tuned_models import adds_adapters

# 2026-11: TRL's own uses of names that transformers changes
trl_warns = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:`gradient_checkpointing_disable` is deprecated:FutureWarning",
)
TEXTS = [" ".join(f"w{(i + j) % 7}" for j in range(5 + i % 6)) for i in range(8)]
PROMPTS, ANSWERS = [text[:8] for text in TEXTS], [text[8:] for text in TEXTS]
SETTINGS = {
    **{"use_cpu": True, "report_to": [], "disable_tqdm": True, "bf16": False, "save_strategy": "no"},
    **{"per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_steps": 2, "logging_steps": 1},
}


def rewards(completions, **_):
    """One for each token that is w1, so that completions of one prompt differ."""
    return [float(completion.count("w1")) + 0.1 * i for i, completion in enumerate(completions)]


TRAINERS = {
    "SFTTrainer": (lambda trl: trl.SFTConfig, {"max_length": 16}, {"text": TEXTS}),
    "AdapterSFTTrainer": (lambda trl: trl.SFTConfig, {"max_length": 16}, {"text": TEXTS}),
    "DPOTrainer": (
        lambda trl: trl.DPOConfig,
        {"max_length": 16},
        {"prompt": PROMPTS, "chosen": ANSWERS, "rejected": ANSWERS[1:] + ANSWERS[:1]},
    ),
    "KTOTrainer": (
        lambda trl: trl.KTOConfig,
        {"max_length": 16},
        {"prompt": PROMPTS, "completion": ANSWERS, "label": [i % 2 == 0 for i in range(8)]},
    ),
    "GRPOTrainer": (
        lambda trl: trl.GRPOConfig,
        {"num_generations": 4, "max_completion_length": 4},
        {"prompt": PROMPTS},
    ),
}


@trl_warns
@pytest.mark.parametrize("name", TRAINERS)
def test_two_steps(name, tmp_path):
    trl = pytest.importorskip("trl")
    config_class, options, columns = TRAINERS[name]
    args = config_class(trl)(output_dir=str(tmp_path), **SETTINGS, **options)
    base = BACKBONES["llama"].build()
    before = {parameter: p.clone() for parameter, p in base.named_parameters()}
    if name == "AdapterSFTTrainer":
        from hf_peft_ext.trainers import AdapterSFTTrainer as trainer_class
    else:
        trainer_class = getattr(trl, name)
    extra = {"reward_funcs": rewards} if name == "GRPOTrainer" else {}
    trainer = trainer_class(
        model=base, args=args, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer(),
        peft_config=LadderConfig(r=4, task_type="CAUSAL_LM"), **extra,
    )  # fmt: skip
    start = {parameter: p.detach().clone() for parameter, p in trainer.model.named_parameters()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(after[f"base_model.model.{parameter}"], p) for parameter, p in before.items())
    changed = {parameter for parameter, p in after.items() if not torch.equal(p, start[parameter])}
    assert changed
    assert all(".ladder.side_of." in parameter for parameter in changed)


@trl_warns
@pytest.mark.parametrize("name", [name for name in TRAINERS if "SFT" not in name])
def test_mixin(name, tmp_path):
    """TRL's trainers as trainers of adapters: `args` is where they have it, and the adapter alone is saved."""
    trl = pytest.importorskip("trl")
    config_class, options, columns = TRAINERS[name]
    trainer_class = type(f"Adapter{name}", (AdapterTrainerMixin, getattr(trl, name)), {})
    args = config_class(trl)(output_dir=str(tmp_path), **SETTINGS, **options)
    second = rewards if name == "GRPOTrainer" else None  # the reward functions, or the reference model
    trainer = trainer_class(
        BACKBONES["llama"].build(), second, args, train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer(), peft_config=UniPELTConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        sublayer_rates={"gate": 1e-3},
    )  # fmt: skip
    assert trainer.args.output_dir == str(tmp_path)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    if name == "DPOTrainer":  # the untrained adapter is the reference
        assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    trainer.save_model()
    assert trainer.record.history[-1]["step"] == 2
    trained, loaded = trainer.peft_model.eval(), load_adapter(BACKBONES["llama"].build(), tmp_path)
    inputs = BACKBONES["llama"].inputs()
    assert torch.equal(loaded.eval()(**inputs).logits, trained(**inputs).logits)


# sentence-transformers


@pytest.fixture
def embedder(tmp_path):
    """A SentenceTransformer on a tiny BERT, with mean pooling."""
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    BACKBONES["bert"].build().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    return st.SentenceTransformer(modules=[Transformer(str(tmp_path)), Pooling(D, "mean")], device="cpu")


D = 32
CONFIGS = {
    "ladder": lambda: LadderConfig(r=4),
    "unipelt": lambda: UniPELTConfig(bottleneck_size=4, num_virtual_tokens=4),
}


def inject(model, config):
    inject_adapter_in_model(config, model.transformers_model)


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize(
    "add",
    [
        pytest.param(lambda model, config: model.add_adapter(config), marks=adds_adapters, id="add_adapter"),
        pytest.param(inject, id="inject"),
    ],
)
def test_sentence_transformer(method, add, embedder):
    """Embeddings follow the adapter's weights; disabled, they are the base model's. It calls `forward` directly."""
    base = embedder.encode(TEXTS)
    add(embedder, CONFIGS[method]())
    randomise(embedder, seed=1)
    first = embedder.encode(TEXTS)
    randomise(embedder, seed=2)
    assert abs(first - base).max() > 1e-2
    assert abs(embedder.encode(TEXTS) - first).max() > 1e-3
    layers = [module for module in embedder.modules() if hasattr(module, "enable_adapters") and module is not embedder
              and hasattr(module, "active_adapters") and hasattr(module, "merged_adapters")]  # fmt: skip
    assert layers
    for layer in layers:
        layer.enable_adapters(False)
    assert (embedder.encode(TEXTS) == base).all()
