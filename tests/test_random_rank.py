"""Random ranks: the parameters of LoRA, within limits, by seed; a stock adapter that loads and merges."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from hf_peft_ext import load_adapter, random_rank_pattern

from .backbones import BACKBONES, output
from .methods import randomise


def lora(backbone, **patterns):
    return get_peft_model(BACKBONES[backbone].build(), LoraConfig(target_modules=TARGETS[backbone], **patterns))


TARGETS = {"bert": ["query", "value"], "t5": ["q", "v"], "llama": ["q_proj", "v_proj"]}


@pytest.mark.parametrize("backbone", TARGETS)
def test_parameters_and_scaling_are_those_of_lora(backbone):
    """As many parameters as rank 4 everywhere, to one rank of the smallest module; alpha / rank is the same."""
    base = BACKBONES[backbone].build()
    patterns = random_rank_pattern(base, r=4, seed=1)
    model, uniform = lora(backbone, **patterns), lora(backbone, r=4, lora_alpha=8)
    count, budget = (m.get_nb_trainable_parameters()[0] for m in (model, uniform))
    assert budget - 64 < count <= budget
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    ranks = [layer.r["default"] for layer in layers]
    assert len(ranks) == len(patterns["rank_pattern"])
    assert len(set(ranks)) > 1
    assert set(ranks) <= set(range(1, 8))
    assert {layer.scaling["default"] for layer in layers} == {2.0}


def test_by_seed():
    base = BACKBONES["bert"].build()
    first, again, other = (random_rank_pattern(base, r=4, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


def test_mean_over_seeds_is_the_rank():
    base = BACKBONES["bert"].build()
    ranks = [random_rank_pattern(base, r=4, seed=seed)["rank_pattern"]["^encoder.layer.0.attention.self.query"]
             for seed in range(200)]  # fmt: skip
    assert 3.5 < sum(ranks) / 200 < 4.5
    assert {*ranks} == set(range(1, 8))


def test_other_widths_keep_the_budget():
    """FFN leaves are wider; ranks are paid by their widths."""
    base = BACKBONES["llama"].build()
    patterns = random_rank_pattern(base, r=4, target_modules=r".*(q_proj|down_proj)")
    sizes = {"q_proj": 64, "down_proj": 96}
    spent = sum(sizes[path.rpartition(".")[2]] * rank for path, rank in patterns["rank_pattern"].items())
    assert 4 * 2 * (64 + 96) - 64 < spent <= 4 * 2 * (64 + 96)


def test_a_stock_adapter(tmp_path):
    """Saved, it is a LORA adapter that peft and `load_adapter` load to the same outputs, and it merges."""
    patterns = random_rank_pattern(BACKBONES["llama"].build(), r=3)
    model = lora("llama", **patterns).eval()
    randomise(model)
    inputs = BACKBONES["llama"].inputs()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = output(model, inputs)
        for load in (PeftModel.from_pretrained, load_adapter):
            again = load(BACKBONES["llama"].build(), tmp_path).eval()
            assert torch.equal(output(again, inputs), expected)
        torch.testing.assert_close(output(model.merge_and_unload(), inputs), expected, rtol=1e-4, atol=1e-4)


def test_values_are_checked():
    base = BACKBONES["bert"].build()
    with pytest.raises(ValueError, match=r"`r` \(=0\) must be a positive whole number"):
        random_rank_pattern(base, r=0)
    with pytest.raises(ValueError, match=r"`max_rank` \(=3\) must be a whole number of at least `r` \(=4\)"):
        random_rank_pattern(base, r=4, max_rank=3)
    with pytest.raises(ValueError, match=r"`target_modules` \(=\['nothing'\]\) matches no linear leaf"):
        random_rank_pattern(base, target_modules=["nothing"])
