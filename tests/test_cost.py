"""FLOPs: the papers' numbers, the counter against counts by hand, caches in bytes, and the command."""

import json

import pytest
import torch
from peft import IA3Config, LoraConfig
from transformers import AutoConfig, BertConfig, GPT2Config, LlamaConfig, T5Config
from typer.testing import CliRunner

from hf_peft_ext import LadderConfig, UniPELTConfig
from hf_peft_ext.budget import Workload, compare_by_count, compare_by_rule, count_flops, kv_cache_bytes, rule_flops
from hf_peft_ext.budget.model_class import head_task
from hf_peft_ext.cli import app

from .backbones import BACKBONES

T_FEW = Workload(shots=41, tokens_per_example=98, query_tokens=103, steps=1000, batch=8)
LLAMA = LlamaConfig(
    hidden_size=128,
    intermediate_size=344,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=500,
)
D, FFN, LAYERS, KV, VOCAB = 128, 344, 3, 32, 500


def llama_by_hand(length: int, layers: int = LAYERS) -> tuple[int, int, int]:
    """FLOPs of the projections, of scores and weighted sums, and of the head; 2 a multiplication and addition."""
    linear = 2 * length * layers * (2 * D * D + 2 * D * KV + 3 * D * FFN)
    return linear, layers * 2 * 2 * length * length * D, 2 * length * D * VOCAB


# the papers' numbers


def test_table_1_of_t_few():
    """Inference 1.1e12 and training 2.7e16 for T-Few, 1.4e15 a query for GPT-3, and 4.5e13 for T5+LM, as printed."""
    tuned = compare_by_rule(
        11e9, T_FEW, encoder_decoder=True, prompted_parameters=175e9, prompted_encoder_decoder=False
    )
    assert f"{tuned.tuned_query:.1e}" == "1.1e+12"
    assert f"{tuned.training:.1e}" == "2.7e+16"
    assert f"{tuned.prompted_query:.1e}" == "1.4e+15"
    assert f"{compare_by_rule(11e9, T_FEW, encoder_decoder=True).prompted_query:.1e}" == "4.5e+13"
    # "about as much as ICL on 20 examples with GPT-3 175B"
    assert tuned.break_even() == 19
    # the rows of 6.7B and 13B leave the query out
    assert f"{rule_flops(6.7e9, 41 * 98):.1e}" == "5.4e+13"
    assert f"{rule_flops(13e9, 41 * 98):.1e}" == "1.0e+14"


def test_the_cache_of_gpt_3():
    """32 examples of 512 tokens, 96 layers, width 12,288, in 32 bits: 144 GiB; measured on 12 of the layers."""
    config = GPT2Config(n_layer=12, n_head=96, n_embd=12288, n_positions=16384)
    assert 8 * kv_cache_bytes(config, 32 * 512, torch.float32) == 144 * 2**30


def test_shared_heads_shrink_the_cache():
    assert kv_cache_bytes(LLAMA, 50) == 2 * LAYERS * KV * 50 * 2


# counts


def test_forward_by_hand():
    linear, attention, head = llama_by_hand(40)
    counted = count_flops(LLAMA, 40, training=False)
    assert counted.forward == pytest.approx(linear + attention + head, rel=0.02)
    assert counted.backward == 0


def test_full_training_by_hand():
    """Every product has two gradients; the embedding's output needs none in the first layer's inputs, but has them."""
    forward = sum(llama_by_hand(40))
    counted = count_flops(LLAMA, 40)
    assert counted.training == pytest.approx(3 * forward, rel=0.02)
    assert counted.trained == counted.parameters


def test_lora_training_by_hand():
    """Frozen weights get no gradients: the base's backward is as its forward, less what lies below the first LoRA."""
    linear, attention, head = llama_by_hand(40)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    counted = count_flops(LLAMA, 40, lora)
    adapter = 2 * 40 * LAYERS * 4 * ((D + D) + (D + KV))
    assert counted.forward == pytest.approx(linear + attention + head + adapter, rel=0.02)
    first_inputs = 2 * 40 * (D * D + 2 * D * KV)  # the first layer's q, k, v projections pass nothing back
    backward = linear - first_inputs + 2 * attention + head + 2 * adapter
    assert counted.backward == pytest.approx(backward, rel=0.02)
    assert counted.trained == LAYERS * 4 * ((D + D) + (D + KV))


def test_adapters_in_order():
    """(IA)3 adds no products; a ladder passes nothing back through the base; UniPELT costs a little more than none."""
    full = count_flops(LLAMA, 40)
    ia3 = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    assert count_flops(LLAMA, 40, ia3).forward == full.forward
    assert count_flops(LLAMA, 40, ia3).backward < 0.6 * full.backward
    unipelt = count_flops(LLAMA, 40, UniPELTConfig(task_type="CAUSAL_LM"))
    assert full.forward < unipelt.forward < 1.3 * full.forward
    ladder = count_flops(LLAMA, 40, LadderConfig(task_type="CAUSAL_LM"))
    assert ladder.backward < 0.6 * count_flops(LLAMA, 40, ia3).backward


def test_cached_tokens_are_read_and_not_computed():
    linear, _, head = llama_by_hand(10)
    counted = count_flops(LLAMA, 10, cached_tokens=90, training=False).forward
    assert counted == pytest.approx(linear + head + LAYERS * 4 * 10 * 100 * D, rel=0.02)


EXPERTS = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS |= {"num_key_value_heads": 2, "vocab_size": 300, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("name", "fields", "width"),
    [
        ("mixtral", {"num_local_experts": 5}, 96),
        ("gpt_oss", {"num_local_experts": 5, "head_dim": 16}, 96),
        ("qwen3_moe", {"num_experts": 5, "moe_intermediate_size": 48, "head_dim": 16}, 48),
        ("granitemoe", {"num_local_experts": 5}, 96),
    ],
)
def test_experts_by_hand(name, fields, width):
    """A token counts for two experts of five; also where the config asks for the loop over experts."""
    config = AutoConfig.for_model(name, **EXPERTS, **fields)
    linear = 2 * 40 * 2 * (2 * 64 * 64 + 2 * 64 * 32 + 64 * 5 + 2 * 3 * 64 * width)
    by_hand = linear + 2 * 4 * 40 * 40 * 64 + 2 * 40 * 64 * 300
    assert count_flops(config, 40, training=False).forward == pytest.approx(by_hand, rel=0.02)
    counted = count_flops(config, 40)
    assert counted.training == pytest.approx(3 * by_hand, rel=0.02)
    config._experts_implementation = "eager"
    assert count_flops(config, 40) == counted


@pytest.mark.parametrize("name", ["bert", "t5", "bart", "gpt2", "gemma2", "qwen2"])
def test_families(name):
    """Every family counts, in all dtypes of its own buffers; doubling the batch doubles the count."""
    config = AutoConfig.for_model(name, **{"vocab_size": 60, **BACKBONES[name].config})
    once, twice = (count_flops(config, 9, batch=batch, target_tokens=3) for batch in (1, 2))
    assert twice.training == pytest.approx(2 * once.training, rel=0.02)
    assert 1.7 * once.forward < once.backward <= 2.01 * once.forward


def test_the_task_follows_the_config():
    """The adapter's task, else the architecture's; an encoder has no head, or one for classification."""
    encoder = BertConfig(architectures=["BertForMaskedLM"])
    assert head_task(encoder, encoder_task="FEATURE_EXTRACTION") == "FEATURE_EXTRACTION"
    assert head_task(encoder) == head_task(BertConfig()) == "SEQ_CLS"
    assert head_task(BertConfig(architectures=["BertLMHeadModel"])) == "CAUSAL_LM"
    assert head_task(LLAMA) == "CAUSAL_LM"
    assert head_task(T5Config()) == "SEQ_2_SEQ_LM"
    assert head_task(LLAMA, LoraConfig(task_type="TOKEN_CLS")) == "TOKEN_CLS"
    assert head_task(LLAMA, LoraConfig(task_type="FEATURE_EXTRACTION")) == "CAUSAL_LM"


# against in-context learning


def test_break_even_by_hand():
    work = Workload(shots=4, tokens_per_example=10, query_tokens=10, steps=5, batch=2, queries=7)
    rule = compare_by_rule(1e6, work)
    assert rule.training == 6e6 * 100
    assert rule.prompted_query == 2e6 * 50
    assert rule.break_even() == 8  # 6e8 / (1e8 - 2e7) = 7.5
    assert rule.break_even_cached() is None  # a cached prompt costs a query what tuning does
    assert rule.totals(7) == {"tuned": 6e8 + 7 * 2e7, "prompted": 7e8, "cached": 8e7 + 7 * 2e7}


def test_counts_exceed_the_rule_by_attention():
    work = Workload(shots=4, tokens_per_example=30, query_tokens=20, steps=5, batch=2)
    count = compare_by_count(LLAMA, work, LoraConfig(r=4, task_type="CAUSAL_LM"))
    assert count.tuned_query < count.cached_query + 1e6
    assert count.cached_query < count.prompted_query
    assert count.prefill + count.cached_query < count.prompted_query
    assert count.break_even() > 0


# bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rule_flops(-1, 3), r"`parameters` \(=-1\) must be a positive number"),
        (lambda: Workload(0, 98), r"`shots` \(=0\) must be a positive whole number"),
        (lambda: count_flops(LLAMA, 0), r"`tokens` \(=0\) must be a positive whole number"),
        (lambda: count_flops(LLAMA, 1, cached_tokens=-1), r"`cached_tokens` \(=-1\) must not be negative"),
        (
            lambda: count_flops(T5Config(), 1, cached_tokens=3),
            r"`cached_tokens` \(=3\) must be 0 for an encoder-decoder",
        ),
        (
            lambda: kv_cache_bytes(BertConfig(num_hidden_layers=1), 3),
            r"`config` \(='bert'\) must be that of a model with",
        ),
        (lambda: count_flops(LLAMA, 3, task="SEQ"), r"`task` \(='SEQ'\) must be one of CAUSAL_LM, SEQ_2_SEQ_LM"),
        (
            lambda: count_flops(T5Config(), 3, task="CAUSAL_LM"),
            r"`config` \(=T5Config\) must have a class for `AutoModelForCausalLM`",
        ),
        (
            lambda: count_flops(AutoConfig.for_model("jetmoe", **EXPERTS, kv_channels=16), 3),
            r"`config` \(='jetmoe'\) must have a forward pass that does not depend on the values of tensors",
        ),
        (
            lambda: count_flops(LLAMA, 3, LoraConfig(target_modules=["nothing"])),
            "nothing",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# the command


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    LLAMA.save_pretrained(folder)
    return str(folder)


def test_the_command(model):
    options = ["cost", "--model", model, "--shots", "8", "--tokens-per-example", "20", "--query-tokens", "12"]
    done = CliRunner().invoke(app, [*options, "--adapter", "LORA:r=4,task_type=CAUSAL_LM"])
    assert done.exit_code == 0, done.output
    for words in ("parameters", "training", "query, prompted", "break-even", "GiB"):
        assert words in done.output


def test_the_command_s_json_and_money(model):
    options = ["cost", "--model", f"{model}/config.json", "--shots", "200", "--tokens-per-example", "20", "--json"]
    done = CliRunner().invoke(app, [*options, "--price-per-gpu-hour", "2", "--flops-per-second", "1e12"])
    report = json.loads(done.stdout)
    assert report["trained"] == report["parameters"]
    assert report["rule"]["money"]["tuned"] == pytest.approx(report["rule"]["totals"]["tuned"] / 1e12 / 3600 * 2)
    assert report["count"]["break_even"] > 0
    assert report["notes"] == ["The prompt's 4,103 tokens exceed the model's 2,048 positions."]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shots", "0"], "`shots` (=0) must be a positive whole number."),
        (["--adapter", "NOPE"], "`adapter` (='NOPE') must be a folder of an adapter or a PEFT type"),
        (["--adapter", "LORA:rank=3"], "`adapter` (='LORA:rank=3') must have settings of LORA"),
        (["--price-per-gpu-hour", "2"], "`flops_per_second` (=None) must be set together with price_per_gpu_hour."),
        (["--price-per-gpu-hour", "-2", "--flops-per-second", "1"], "`price_per_gpu_hour` (=-2.0) must be a number"),
        (["--model", "./nowhere"], "nowhere"),
    ],
)
def test_the_command_s_errors(model, options, message):
    done = CliRunner().invoke(app, ["cost", "--model", model, "--shots", "8", "--tokens-per-example", "20", *options])
    assert done.exit_code in (1, 2)
    assert message in done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)
    assert len(done.output.splitlines()) == 1
