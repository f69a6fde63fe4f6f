"""How alike two adapters are: a model and a turned copy of it, whose modules do the same in other channels, against
adapters of other seeds; deltas against those computed from the weights; CKA and the map against naive forms.
"""

import copy
import io

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from rich.console import Console

from hf_peft_ext import BottleneckConfig, LayerPrefixConfig
from hf_peft_ext.model.structure import layer_paths
from hf_peft_ext.transfer import module_similarity
from hf_peft_ext.transfer.residual_deltas import deltas
from hf_peft_ext.transfer.similarity import cka, procrustes

from .backbones import BACKBONES, D, output

LORA = LoraConfig(target_modules=["q_proj", "v_proj"], r=4)


def adapted(config=LORA, name="llama", seed=0, **overrides):
    model = get_peft_model(BACKBONES[name].build(**overrides), copy.deepcopy(config))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if model.base_model.prefix in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def texts(name="llama", batch=16):
    return [BACKBONES[name].inputs(batch, length=12)]


def turned(model):
    """The same function in other channels: the residual stream of the model turned by an orthogonal matrix."""
    twin = copy.deepcopy(model)
    torch.manual_seed(5)
    turn = torch.linalg.qr(torch.randn(D, D))[0]
    with torch.no_grad():
        for block in (twin.base_model.model.model, *twin.base_model.model.model.layers):
            for name, norm in block.named_children():
                if "norm" in name:
                    norm.weight.fill_(1.0)  # else turning is no symmetry
        for name, weight in twin.named_parameters():
            if any(part in name for part in ("o_proj.base_layer", "down_proj", "o_proj.weight")):
                weight.copy_(turn @ weight)
            elif weight.ndim == 2 and weight.shape[1] == D and "lora_B" not in name:
                weight.copy_(weight @ turn.T)
    return twin, turn


def test_the_same_modules_in_other_channels_are_alike():
    """Cosine and CKA of 1 with a turned copy, though no weight is equal; by chance much less."""
    model = adapted()
    twin, _ = turned(model)
    inputs = texts()
    torch.testing.assert_close(output(twin, inputs[0]), output(model, inputs[0]), rtol=1e-3, atol=1e-3)
    found = module_similarity(model, twin, inputs)
    assert found.rows == int(inputs[0]["attention_mask"].sum())
    assert [(layer.layer_a, layer.layer_b) for layer in found.layers] == [(0, 0), (1, 1)]
    for layer in found.layers:
        assert layer.cosine == pytest.approx(1, abs=1e-3)
        assert layer.cka == pytest.approx(1, abs=1e-3)
        assert max(layer.chance_cosine) < 0.5
    other = module_similarity(model, adapted(seed=1), inputs)
    assert abs(other.cosine - other.chance_cosine) < 0.5
    assert other.cosine < 0.5


def test_deltas_are_what_the_low_rank_branches_add():
    """In the FFN's output leaf alone, a block's delta is the branch on the leaf's input: scaling B A x."""
    model, inputs = adapted(LoraConfig(target_modules=["down_proj"], r=4, lora_alpha=8)), texts()
    leaves = [layer.mlp.down_proj for layer in model.get_base_model().model.layers]
    seen = []
    hooks = [leaf.register_forward_hook(lambda m, x, y: seen.append(x[0])) for leaf in leaves]
    with torch.no_grad():
        model(**inputs[0])
    for hook in hooks:
        hook.remove()
    keep = inputs[0]["attention_mask"].bool()
    for leaf, x, delta in zip(leaves, seen, deltas(model, inputs, by_text=False), strict=True):
        expected = 2 * leaf.lora_B["default"](leaf.lora_A["default"](x))[keep]
        torch.testing.assert_close(delta.float(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("bert", BottleneckConfig(r=4)),
        ("bert", LayerPrefixConfig(num_virtual_tokens=3)),
        ("gpt2", LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)),
        ("t5", LoraConfig(target_modules=["q", "v"])),
        ("llama", LayerPrefixConfig(num_virtual_tokens=3)),
        ("llama", IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    ],
)
def test_every_kind_of_module(name, config):
    """An adapter is like itself, whatever it is made of, and untrained ones are less so."""
    model = adapted(config, name)
    found = module_similarity(model, model, texts(name), draws=2)
    assert len(found.layers) == len(layer_paths(model.get_base_model()))
    assert found.cosine == pytest.approx(1)
    assert found.cka == pytest.approx(1)
    assert found.chance_cosine < 0.97  # untrained prefixes draw all tokens one way


def test_other_widths_and_depths():
    """Layers of the deeper model stand beside those they would be copied from; the wider stream needs no more."""
    small, large = adapted(), adapted(hidden_size=48, num_hidden_layers=5)
    found = module_similarity(small, large, texts(), draws=3)
    assert [(layer.layer_a, layer.layer_b) for layer in found.layers] == [(0, 0), (0, 1), (0, 2), (1, 3), (1, 4)]
    assert all(-1 <= layer.cosine <= 1 and 0 <= layer.cka <= 1 for layer in found.layers)
    assert all(len(layer.chance_cosine) == len(layer.chance_cka) == 3 for layer in found.layers)
    tiled = module_similarity(small, large, texts(), draws=1, order="tiled")
    assert [layer.layer_a for layer in tiled.layers] == [0, 1, 0, 1, 0]


def test_layers_without_a_module_are_left_out():
    model = adapted(LoraConfig(target_modules=["q_proj"], layers_to_transform=[1]))
    found = module_similarity(model, adapted(), texts(), draws=1)
    assert [layer.layer_b for layer in found.layers] == [1]


def test_other_tokens():
    """With texts tokenised twice, a row is a text; the same tokens with more padding change nothing."""
    model, (batch,) = adapted(), texts(batch=80)
    longer = {
        "input_ids": torch.cat([batch["input_ids"], torch.zeros(80, 3, dtype=torch.long)], 1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.zeros(80, 3, dtype=torch.long)], 1),
    }
    found = module_similarity(model, model, [batch], [longer], draws=1)
    assert found.rows == 80
    assert found.cosine == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match=r"`batches_b` \(=8\) must hold as many texts as `batches`, 80"):
        module_similarity(model, model, [batch], [{key: value[:8] for key, value in longer.items()}])


def test_leaves_the_models_as_they_were():
    a, b = adapted().train(), adapted(seed=1)
    b.requires_grad_(False)
    states = [copy.deepcopy(model.state_dict()) for model in (a, b)]
    wanted = [[(p.requires_grad) for p in model.parameters()] for model in (a, b)]
    first = module_similarity(a, b, texts(), draws=2)
    assert module_similarity(a, b, texts(), draws=2) == first  # seeded
    assert module_similarity(a, b, texts(), draws=2, seed=1) != first
    assert a.training
    assert not b.training
    for model, state, trainable in zip((a, b), states, wanted, strict=True):
        assert [p.requires_grad for p in model.parameters()] == trainable
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_cka_against_its_definition():
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with centred linear kernels; blind to rotation and scale."""
    torch.manual_seed(0)
    x, y = torch.randn(20, 5).double() + 1, torch.randn(20, 7).double()
    center = torch.eye(20).double() - 1 / 20
    of_x, of_y = (center @ z @ z.T @ center for z in (x, y))
    assert cka(x, y) == pytest.approx(float((of_x * of_y).sum() / (of_x.norm() * of_y.norm())))
    turn = torch.linalg.qr(torch.randn(5, 5).double())[0]
    assert cka(x, 3 * x @ turn) == pytest.approx(1)


def test_the_map_is_orthogonal_and_fits_best():
    torch.manual_seed(0)
    x = torch.randn(50, 6).double()
    turn = torch.linalg.qr(torch.randn(9, 9).double())[0][:6]
    torch.testing.assert_close(procrustes(x, x @ turn + 2), turn)
    y = torch.randn(50, 9).double()
    best = procrustes(x, y)
    torch.testing.assert_close(best @ best.T, torch.eye(6).double())
    x, y = x - x.mean(0), y - y.mean(0)
    for _ in range(20):
        other = torch.linalg.qr(best.T + 0.1 * torch.randn(9, 6).double())[0].T
        assert (x @ best - y).norm() <= (x @ other - y).norm()


def test_table_and_figure(tmp_path):
    pytest.importorskip("matplotlib")
    found = module_similarity(adapted(), adapted(seed=1), texts(), draws=3)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(found.table())
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.export_text().splitlines()
            if line.startswith("│")]  # fmt: skip
    first = found.layers[0]
    chance = sum(first.chance_cosine) / 3
    assert rows[0][:4] == ["0", "0", f"{first.cosine:.2f}", f"{chance:.2f} ({max(first.chance_cosine):.2f})"]
    assert rows[-1] == ["mean", "", f"{found.cosine:.2f}", f"{found.chance_cosine:.2f}", f"{found.cka:.2f}",
                        f"{found.chance_cka:.2f}"]  # fmt: skip
    found.figure(tmp_path / "similarity.png")
    assert (tmp_path / "similarity.png").read_bytes()[:4] == b"\x89PNG"


def test_errors():
    model = adapted()
    with pytest.raises(TypeError, match="`a` must be a PeftModel, not LlamaForCausalLM"):
        module_similarity(BACKBONES["llama"].build(), model, texts())
    with pytest.raises(ValueError, match=r"`draws` \(=0\) must be a positive whole number"):
        module_similarity(model, model, texts(), draws=0)
    with pytest.raises(ValueError, match=r"`batches` \(=\[\]\) must hold at least one batch"):
        module_similarity(model, model, [])
    with pytest.raises(ValueError, match="must have as many stacks of layers"):
        module_similarity(model, adapted(LoraConfig(target_modules=["q"]), "t5"), texts())
    other = get_peft_model(BACKBONES["llama"].build(), LORA)  # does nothing yet
    with pytest.raises(ValueError, match=r"`a` \(='default'\) and the adapter of `b` act together in no layer"):
        module_similarity(other, model, texts())
