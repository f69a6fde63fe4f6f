"""Sizes of pruned models from configs alone, against pruned copies, counts by hand, and the plug-in paper's sizes."""

import pytest
from transformers import AutoConfig

from hf_peft_ext.pruning import pruned_config, pruned_copy, pruned_sizes

from .test_benchmarks import rows, run
from .test_pruning import build, every_family


@every_family
@pytest.mark.parametrize(("r", "reduce"), [(5, "width"), (16, "parameters")])
def test_sizes_from_the_config_are_those_of_the_copy(name, r, reduce):
    model = build(name)
    pruned = pruned_copy(model, r, reduce).model
    found = pruned_sizes(model.config, r, reduce, type(model))
    assert found.parameters == pruned.num_parameters()
    assert found.config.to_dict() == pruned.config.to_dict()
    names = "embed_tokens embed_positions embed_in embed_out _embed wte wpe shared lm_head.weight".split()
    words = [p.numel() for n, p in pruned.named_parameters() if any(name in n for name in names) and "norm" not in n]
    assert found.embeddings == sum(words)


def test_sizes_of_models_too_large_for_this_machine():
    """Nothing is built: T5-11B's pruned copy is counted by hand."""
    config = AutoConfig.for_model("t5", d_model=1024, d_kv=128, d_ff=65536, num_heads=128, num_layers=24)
    found = pruned_sizes(config, 16, "parameters")
    attention, ffn, norm = 4 * 256 * 32 * 128, 2 * 256 * 16384, 256
    blocks = 24 * (attention + ffn + 2 * norm) + 24 * (2 * attention + ffn + 3 * norm) + 2 * norm + 2 * 32 * 32
    assert found.parameters == blocks + 32128 * 256
    assert found.embeddings == 32128 * 256


@pytest.mark.parametrize(
    ("heads", "kv_heads", "r", "expected"),
    [
        (9, 3, 2, (4, 2)),
        (9, 3, 4, (2, 1)),
        (9, 3, 16, (1, 1)),
        (32, 8, 4, (8, 2)),
        (32, 8, 16, (2, 1)),
        (8, 8, 3, (3, 3)),
    ],
)
def test_grouped_heads_are_rounded_together(heads, kv_heads, r, expected):
    config = AutoConfig.for_model("llama", hidden_size=72 * heads, num_attention_heads=heads, head_dim=64,
                                  num_key_value_heads=kv_heads, intermediate_size=100)  # fmt: skip
    pruned = pruned_config(config, r)
    assert (pruned.num_attention_heads, pruned.num_key_value_heads) == expected
    assert pruned.head_dim == 64
    assert pruned.hidden_size % pruned.num_attention_heads == 0


@pytest.mark.slow
def test_the_benchmark_prints_both_readings(capsys):
    """The paper's bridges have 1 / 16 of the parameters: "parameters" comes near, "width" does not."""
    run("bridge_sizes")
    printed = capsys.readouterr().out
    assert set(rows(printed)) == {"GPT-2 XL", "T5-3B", "T5-11B", ""}
    sizes = {line.split("│")[2].strip(): [cell.strip() for cell in line.split("│")[3:-1]]
             for line in printed.splitlines() if line.startswith("│")}  # fmt: skip
    assert sizes["parameters"] == ["256", "32", "16384", "712.9", "704.7", "688", "1.04"]  # T5-11B, the last
    assert sizes["width"] == ["64", "8", "4096", "46.1", "44.0", "688", "0.07"]
    assert "T5-3B: the paper's 185M is 2800M / 15.14." in printed
    assert 'The reading "parameters" comes near: off by a factor of 1.05' in printed


def test_key_heads_must_divide_heads():
    """A small Qwen2 config that does not name them has 32."""
    config = AutoConfig.for_model("qwen2", hidden_size=32, num_attention_heads=4, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"`num_key_value_heads` \(=32\) must divide `num_attention_heads` \(=4\)"):
        pruned_config(config, 2)
