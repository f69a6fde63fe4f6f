"""The memory estimate: against torch's own tracker, against measured steps, against bitsandbytes' formula; its
parts, what fits a card, the command, and the errors. The lecture's figures, as the lecture computes them.
"""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed._tools.mem_tracker import MemTracker
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from typer.testing import CliRunner

from hf_peft_ext import LadderConfig, UniPELTConfig
from hf_peft_ext.budget import compare_memory, estimate_memory
from hf_peft_ext.budget.memory.cards import card_bytes
from hf_peft_ext.budget.memory.fit import largest_fitting
from hf_peft_ext.cli import app
from hf_peft_ext.compare.measures import peak_of, silent_stderr, tensor_bytes

from .backbones import BACKBONES
from .methods import METHODS, VARIANTS

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
GIB = 2**30


def config(model_type="llama", **changes):
    return AutoConfig.for_model(model_type, **{"vocab_size": 300, "pad_token_id": 0, **SIZES, **changes})


def lora():
    return LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def real_peak(adapter, dtype=torch.float32, checkpointing=False, batch=4, length=64):
    """Bytes at the peak of two real steps of a Llama."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(), dtype=dtype)
    model = model if adapter is None else get_peft_model(model, adapter)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return peak_of_steps(model, batch, length)


def peak_of_steps(model, batch, length):
    """Bytes at the peak of two real steps."""
    ids = torch.randint(300, (batch, length))
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], fused=True)
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with silent_stderr():
        profiler.start()
    for _ in range(2):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with silent_stderr():
        profiler.stop()
    return tensor_bytes(model) + peak_of(profiler)


@pytest.mark.parametrize(
    ("adapter", "dtype", "checkpointing"),
    [
        (None, "float32", False),
        (None, "bfloat16", False),
        (lora, "float32", False),
        (lora, "float32", True),
        (lambda: UniPELTConfig(task_type="CAUSAL_LM"), "float32", False),
    ],
    ids=["full", "full bf16", "lora", "lora checkpointed", "unipelt"],
)
def test_within_15_percent_of_the_allocator(adapter, dtype, checkpointing):
    """A real step on the CPU, by torch's memory events."""
    make = (lambda: None) if adapter is None else adapter
    peak = real_peak(make(), getattr(torch, dtype), checkpointing)
    options = {"dtype": dtype, "gradient_checkpointing": checkpointing, "device": "cpu"}
    estimate = estimate_memory(config(), make(), batch=4, length=64, **options)
    assert abs(estimate.peak / peak - 1) < 0.15
    assert estimate.peak == sum(estimate.parts.values())


def test_agrees_with_mem_tracker():
    """torch's tracker on the same step with real tensors."""
    model = AutoModelForCausalLM.from_config(config(), dtype=torch.float32).train()
    ids = torch.zeros(2, 32, dtype=torch.long)
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    snapshot = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    estimate = estimate_memory(config(), batch=2, length=32, dtype="float32", optimizer="sgd", device="cpu")
    assert abs(estimate.peak / snapshot["Total"] - 1) < 0.03


def test_parts():
    """Weights, gradients and AdamW's states of full fine-tuning follow from the number of parameters."""
    n = sum(p.numel() for p in AutoModelForCausalLM.from_config(config()).parameters())
    full = estimate_memory(config(), dtype="float32", length=8, device="cpu")
    assert full.trained == n
    assert 0 <= full.weights - 4 * n < 500  # the rotary frequencies
    assert 8 * n <= full.optimizer_states < 8 * n + 200  # and AdamW's counters of steps
    assert full.adapter_weights == full.quantization_constants == full.framework == 0
    adapted = estimate_memory(config(), lora(), dtype="bfloat16", length=8)
    assert adapted.weights == pytest.approx(2 * n, rel=0.02)  # blocks of 512 bytes
    assert adapted.trained == 2 * 2 * 8 * (64 + 64)
    assert adapted.adapter_weights == 4 * adapted.trained  # peft keeps adapters in float32
    assert adapted.framework > 0
    assert adapted.allocated == adapted.peak - adapted.framework
    assert "optimizer states" in full.table()
    assert "peak" in full.table()


def test_logits_of_a_large_vocabulary():
    """Logits, float32 copies and their gradients: at least two of batch x length x vocabulary in float32."""
    wide = estimate_memory(config(vocab_size=20_000), lora(), batch=2, length=64, dtype="bfloat16")
    assert wide.logits_and_loss > 2 * 4 * 2 * 64 * 20_000
    assert wide.logits_and_loss > wide.activations


def test_attention_kernels():
    """Eager and math keep all scores, flash and efficient none."""
    peaks = {
        name: estimate_memory(config(), lora(), length=256, dtype="bfloat16", attention=name).activations
        for name in ("eager", "math", "flash", "efficient", "sdpa")
    }
    scores = 2 * 4 * 256 * 256 * 2  # layers, heads, length squared, bytes
    assert peaks["sdpa"] == peaks["flash"]
    assert abs(peaks["efficient"] / peaks["flash"] - 1) < 0.1
    assert min(peaks["eager"], peaks["math"]) > peaks["flash"] + scores


def test_checkpointing_needs_less():
    plain = estimate_memory(config(num_hidden_layers=6), lora(), length=128)
    checkpointed = estimate_memory(config(num_hidden_layers=6), lora(), length=128, gradient_checkpointing=True)
    assert checkpointed.activations < plain.activations / 3
    assert checkpointed.weights == plain.weights


@pytest.mark.parametrize("method", [pytest.param(m, marks=[pytest.mark.slow] * (m in VARIANTS)) for m in METHODS])
def test_every_method(method):
    """Each of our configs is estimated."""
    estimate = estimate_memory(config(), METHODS[method](task_type="CAUSAL_LM"), length=16)
    assert estimate.adapter_weights > 0
    assert estimate.activations > 0


@pytest.mark.parametrize("family", ["bert", "t5", "gpt2", "bart", "qwen2", "modernbert"])
@pytest.mark.parametrize("adapter", [None, UniPELTConfig, LadderConfig])
def test_families(family, adapter):
    """Families are read from their configs."""
    made = AutoConfig.for_model(
        BACKBONES[family].model_type,
        **{"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **BACKBONES[family].config},
    )
    if family == "modernbert" and adapter is LadderConfig:
        pytest.skip("takes no ladder")
    assert estimate_memory(made, adapter and adapter(), length=16, target_length=4).peak > 0


def test_autocast_keeps_copies_of_weights():
    """The linear weights once more in 16 bits, although they are frozen: their products need them again."""
    plain = estimate_memory(config(), lora(), length=8, dtype="float32")
    cast = estimate_memory(config(), lora(), length=8, dtype="float32", autocast="bfloat16")
    linear = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    assert cast.weights == plain.weights
    assert cast.activations > plain.activations + linear


@pytest.mark.parametrize(
    ("quantization", "bits"), [("nf4", 4 + 32 / 64), ("nf4-dq", 4 + 8 / 64 + 32 / (64 * 256)), ("int8", 8)]
)
def test_packed_weights(quantization, bits):
    """Bits a weight of the linear leaves, by the QLoRA paper; the difference is 0.373 bits."""
    big = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 1, "vocab_size": 8}
    options = {"length": 8, "dtype": "bfloat16", "autocast": "bfloat16"}
    estimate = estimate_memory(config(**big), lora(), quantization=quantization, **options)
    packed = 4 * 512 * 512 + 3 * 512 * 2048
    rest = 4 * (2 * 8 * 512 + 3 * 512)  # embeddings, head and norms in float32
    found = 8 * (estimate.weights + estimate.quantization_constants - rest) / packed
    rows = 32 * (4 * 512 + 2 * 2048 + 512) / packed if quantization == "int8" else 0
    assert found == pytest.approx(bits + rows, abs=0.08)  # code tables, blocks of 512 bytes
    own = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    if quantization == "nf4":
        assert estimate_memory(config(**big), lora(), quantization=own, **options).peak == estimate.peak


def test_optimizers():
    """Bytes of the states a parameter."""
    sizes = {}
    for name in ("sgd", "adamw_torch", "adamw_torch_fused", "adafactor", "adamw_bnb_8bit", "paged_adamw_32bit"):
        estimate = estimate_memory(config(hidden_size=128), dtype="float32", length=4, optimizer=name)
        sizes[name] = estimate.optimizer_states / estimate.trained
    assert sizes["sgd"] == 0
    for name in ("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit"):
        assert sizes[name] == pytest.approx(8, rel=0.05)
    assert sizes["adafactor"] < 1
    assert 2 < sizes["adamw_bnb_8bit"] < 3


def test_sharding():
    """The parts are divided by the number of devices; the largest block is gathered whole."""
    alone = estimate_memory(config(), length=8)
    zero1, zero3 = (estimate_memory(config(), length=8, devices=4, sharding=name) for name in ("zero1", "fsdp"))
    assert zero1.optimizer_states == -(-alone.optimizer_states // 4)
    assert zero1.weights == alone.weights
    assert zero3.weights == -(-alone.weights // 4)
    assert zero3.activations == alone.activations
    assert zero3.temporaries > alone.temporaries


def test_largest():
    """The estimate of the answer fits, the next one does not."""
    estimate = estimate_memory(config(max_position_embeddings=4096), lora(), length=64)
    card = estimate.framework + 10 * 2**20
    for what in ("batch", "length"):
        n = estimate.largest(what, card)
        assert n > 1
        args = {"length": 64, what: n}
        assert estimate_memory(config(), lora(), **args).peak <= card
        assert estimate_memory(config(), lora(), **{**args, what: n + 1}).peak > card
    assert estimate.largest("length", "H200") == 4096
    assert estimate.largest("batch", 1000) == 0


def test_largest_fitting_of_any_cost():
    for power in (1, 2, 3):
        for limit in (0, 1, 5, 99, 12345):
            largest = max((n for n in range(1, 13000) if 3 + n**power <= limit), default=0)
            assert largest_fitting(lambda n: 3 + n**power, limit, 4) == largest  # noqa: B023
    assert largest_fitting(lambda n: n, 100, 4, 7) == 7


def test_no_length_above_the_largest_is_tried():
    tried = []
    for most in (2, 9, 1000):
        assert largest_fitting(lambda n: tried.append(n) or n**3, most**3 - 1, 4, most) == most - 1
        assert max(tried) == most


def test_models_and_folders(tmp_path):
    """A model on any device, an adapted model, a folder: as the config. Nothing in the model changes."""
    model = AutoModelForCausalLM.from_config(config())
    model.config.save_pretrained(tmp_path)
    before = {name: (p.device, p.requires_grad) for name, p in model.named_parameters()}
    peaks = {estimate_memory(source, lora(), length=8).peak for source in (config(), model, tmp_path, str(tmp_path))}
    assert {name: (p.device, p.requires_grad) for name, p in model.named_parameters()} == before
    assert model.config.use_cache
    peaks.add(estimate_memory(get_peft_model(model, lora()), length=8).peak)
    with torch.device("meta"):
        peaks.add(estimate_memory(AutoModelForCausalLM.from_config(config()), lora(), length=8).peak)
    assert len(peaks) == 1


def test_side_by_side(tmp_path):
    """Methods in one table and one figure."""
    from hf_peft_ext.budget.memory.figure import memory_figure

    estimates = compare_memory(config(), length=32, dtype="bfloat16")
    assert list(estimates) == ["full fine-tuning", "LoRA", "QLoRA", "UniPELT", "ladder", "plug-in, bridge"]
    assert estimates["QLoRA"].weights < estimates["LoRA"].weights
    assert estimates["ladder"].activations < estimates["LoRA"].activations
    memory_figure(estimates, "T4").savefig(tmp_path / "memory.svg")
    assert "optimizer states" in (tmp_path / "memory.svg").read_text() or (tmp_path / "memory.svg").stat().st_size


@pytest.mark.parametrize("family", ["bert", "t5", "gpt2", "qwen2"])
def test_bridge_of_families(family):
    """The bridge trains a pruned copy and needs less than full fine-tuning."""
    made = AutoConfig.for_model(
        BACKBONES[family].model_type,
        **{"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **BACKBONES[family].config},
    )
    full, bridged = compare_memory(made, ["full", "plug_in"], length=16, target_length=4).values()
    assert bridged.trained < full.trained / 2
    assert bridged.weights < full.weights / 2
    assert 0 < bridged.adapter_weights < full.weights / 2
    if family == "qwen2":  # every attempt builds a bridge
        assert 1 < bridged.largest("batch", bridged.framework + 3 * bridged.allocated) < 10


def test_bridge_within_15_percent_of_the_allocator():
    """Real steps in a bridge whose large model has no weights, by torch's memory events."""
    from hf_peft_ext.transfer import Projections, bridge, plug, pruned_copy

    made = config(hidden_size=256, intermediate_size=512, num_attention_heads=8)
    adapter = UniPELTConfig(methods=["lora"], gated=False)
    large = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    small = get_peft_model(pruned_copy(large, 16, "parameters").model, adapter)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    plugged = plug(small, shapes, Projections("slice", trainable=False))
    peak = peak_of_steps(bridge(plugged, pruned_copy(large, 16, "parameters")), batch=4, length=64)
    options = {"batch": 4, "length": 64, "dtype": "float32", "device": "cpu"}
    assert compare_memory(made, ["plug_in"], **options)["plug-in, bridge"].peak == pytest.approx(peak, rel=0.15)


def test_methods_that_a_model_does_not_take():
    """Experts cannot be cut: by default the bridge is left out, by name it is an error."""
    experts = config("mixtral", num_key_value_heads=2, num_local_experts=4)
    assert list(compare_memory(experts, length=8)) == ["full fine-tuning", "LoRA", "QLoRA", "UniPELT", "ladder"]
    with pytest.raises(ValueError, match="cannot be cut"):
        compare_memory(experts, ["plug_in"], length=8)


EXPERTS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "moe_intermediate_size": 32},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {"num_local_experts": 4, "head_dim": 16, "intermediate_size_mlp": 64},
}


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts(family, dtype):
    """Every family runs, in each type, with the loop over experts replaced; more experts a token need more."""
    made = config(family, num_key_value_heads=2, **EXPERTS[family])
    eager = config(family, num_key_value_heads=2, **EXPERTS[family])
    eager._experts_implementation = "eager"
    peaks = [estimate_memory(one, length=32, batch=2, dtype=dtype).peak for one in (made, eager)]
    assert peaks[0] == peaks[1]
    assert eager._experts_implementation == "eager"


def test_experts_within_15_percent_of_the_allocator():
    """Real steps of a tiny Mixtral, whose tokens are routed as they come."""
    made = config("mixtral", num_key_value_heads=2, **EXPERTS["mixtral"])
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    peak = peak_of_steps(model, batch=4, length=64)
    estimate = estimate_memory(made, batch=4, length=64, dtype="float32", device="cpu")
    assert estimate.peak == pytest.approx(peak, rel=0.15)


def test_routing_that_needs_values():
    made = AutoConfig.for_model("jetmoe", vocab_size=300, hidden_size=64, num_hidden_layers=1, kv_channels=16)
    with pytest.raises(
        ValueError, match=r"`model_or_config` \(=JetMoe.*\) must have a forward pass that does not depend"
    ):
        estimate_memory(made, length=8)


def test_command(tmp_path):
    config().save_pretrained(tmp_path / "model")
    arguments = ["memory", str(tmp_path / "model"), "--length", "16", "--methods", "lora,full", "--dtype", "float32"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "full fine-tuning" in result.output
    shown = CliRunner().invoke(app, [*arguments, "--json", "--card", "T4", "--largest", "batch"])
    rows = json.loads(shown.stdout)
    assert rows["LoRA"]["peak"] < rows["full fine-tuning"]["peak"]
    assert rows["LoRA"]["largest_batch"] > 100
    wrong = CliRunner().invoke(app, [*arguments, "--card", "H2000"])
    assert wrong.exit_code == 2
    assert "`card` (='H2000') must be one of" in " ".join(wrong.output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 0}, "`batch` (=0) must be a positive whole number."),
        ({"length": 1.5}, "`length` (=1.5) must be a positive whole number."),
        ({"dtype": "fp8"}, "`dtype` (='fp8') must be one of float32, bfloat16, float16"),
        ({"autocast": "float32"}, "`autocast` (='float32') must be one of bfloat16, float16"),
        ({"optimizer": "adamv_torch"}, "did you mean `adamw_torch`?"),
        ({"attention": "flush"}, "`attention` (='flush') must be one of sdpa, eager, flash, efficient, math"),
        ({"attention": "flash", "dtype": "float32"}, "`attention` (='flash') needs 16 bits"),
        ({"quantization": "int3"}, "`quantization` (='int3') must be one of nf4, nf4-dq, int8"),
        ({"quantization": "nf4"}, "`quantization` (='nf4') must be None for full fine-tuning"),
        ({"sharding": "zero4", "devices": 2}, "`sharding` (='zero4') must be one of zero1, zero2, zero3, fsdp"),
        ({"sharding": "zero3"}, "`sharding` (='zero3') must have `devices` above 1."),
        ({"task_type": "SEQ"}, "`task_type` (='SEQ') must be one of CAUSAL_LM"),
        ({"device": "tpu"}, "`device` (='tpu') must be one of cuda, cpu"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=r"`\w+` \(=") as error:
        estimate_memory(config(), **{"length": 8, **arguments})
    assert message in str(error.value)


def test_errors_of_models():
    with pytest.raises(TypeError, match=r"`model_or_config` \(=int\) must be a config, a transformers model"):
        estimate_memory(3)
    with pytest.raises(ValueError, match=r"`model_or_config` \(='./nowhere'\) must have a config that can be read"):
        estimate_memory("./nowhere")
    with pytest.raises(ValueError, match=r"`model_or_config` \(=LlamaConfig\) must be a config that meta tensors"):
        estimate_memory(config(hidden_act="none"))
    with pytest.raises(ValueError, match=r"`model_or_config` \(=T5Config\) must have a class for `AutoModelForCausal"):
        estimate_memory(AutoConfig.for_model("t5"), task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"`what` .='width'. must be batch or length"):
        estimate_memory(config(), length=8).largest("width", "T4")


@pytest.mark.parametrize(("card", "message"), [("H2000", "did you mean `H200`?"), (0, "positive number of bytes")])
def test_errors_of_cards(card, message):
    with pytest.raises(ValueError, match=r"`card` \(=") as error:
        card_bytes(card)
    assert message in str(error.value)


def test_cards():
    assert card_bytes("h100") == card_bytes("H100") == 79 * GIB
    assert card_bytes("24GiB") == card_bytes("24 GiB") == 24 * GIB
    assert card_bytes(5) == 5


def test_the_lectures_figures():
    """56.28 and 17.19 GB for Llama-2-7B follow from H = 32 heads in place of the width; its appendix has more."""
    n, layers, heads, width, vocab, s = 7e9, 32, 32, 4096, 32_000, 4096
    weights = int(100 * 2 * n / GIB) / 100
    hidden = 2 * layers * (20 * heads * s + 3 * s**2) / GIB
    assert (weights, round(hidden, 2)) == (13.03, 3.16)
    assert round(1 + weights + weights + 2 * weights + hidden, 2) == 56.28
    assert round(1 + weights + 3 * 2 * 0.2e6 / GIB + hidden, 2) == 17.19
    linear = 3 * width * s + 18 * layers * width * s + vocab * s
    assert round(2 * (linear + 3 * layers * heads * s**2) / GIB) == 114
    assert round(2 * linear / GIB) == 18


def test_bitsandbytes_tables_are_kept():
    """An estimate in 4 bits leaves no tables without data in bitsandbytes, which real models would use later."""
    functional = pytest.importorskip("bitsandbytes").functional
    before = dict(functional.name2qmap)
    estimate_memory(config(), lora(), batch=1, length=8, quantization="nf4-dq")
    assert functional.name2qmap == before
