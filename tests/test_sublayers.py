"""Each sub-layer against the naive formula, values and gradients; the fused sum against the plain one."""

import pytest
import torch
import torch.nn.functional as F

from hf_peft_ext.sublayers import (
    Bias,
    Bottleneck,
    Coupling,
    Gate,
    LowRank,
    NormedBottleneck,
    Prefix,
    ProjectedPrefix,
    Projection,
    SoftPrompt,
)

BATCH, LENGTH, D = 3, 5, 6
VISIBLE = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1]]).bool()


def filled(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def gate_of(gate, x, visible):
    """sigmoid(w x + b) for each token; for "mean", averaged over the tokens that are not padding, one by one."""
    g = torch.sigmoid((x * gate.weight[0]).sum(-1, keepdim=True) + gate.bias)
    if gate.pooling == "token":
        return g
    masked = visible is not None and gate.pooling == "mean"
    rows = [g[i][visible[i]].mean() if masked else g[i].mean() for i in range(len(g))]
    return torch.stack(rows)[:, None, None]


def assert_same(module, naive, *inputs):
    """Equal outputs, and equal gradients of inputs and parameters."""
    inputs = [t.clone().requires_grad_() if t.is_floating_point() else t for t in inputs]
    wanted = [t for t in inputs if t.requires_grad] + list(module.parameters())
    results = []
    for function in (module, naive):
        out = function(*inputs)
        weight = torch.linspace(-1, 1, out.numel()).view_as(out)
        results.append((out, torch.autograd.grad((out * weight).sum(), wanted, allow_unused=True)))
    torch.testing.assert_close(results[0][0], results[1][0])
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", [None, "mean", "mean_padded", "token"])
@pytest.mark.parametrize("visible", [None, VISIBLE], ids=["dense", "padded"])
def test_low_rank(pooling, visible):
    module = filled(LowRank(D, 4, r=2, alpha=3, gate=Gate(D, pooling) if pooling else None))

    def naive(x):
        delta = 3 / 2 * torch.einsum("or,ri,bti->bto", module.B, module.A, x)
        return delta if pooling is None else gate_of(module.gate, x, visible) * delta

    assert_same(lambda_module(module, visible), naive, torch.randn(BATCH, LENGTH, D))


@pytest.mark.parametrize("pooling", [None, "mean", "mean_padded", "token"])
@pytest.mark.parametrize("scaling", [1.0, 4.0, "learned"])
def test_bottleneck(pooling, scaling):
    module = filled(Bottleneck(D, r=3, scaling=scaling, gate=Gate(D, pooling) if pooling else None))
    s = module.scaling

    def naive(x):
        f = s * (torch.relu(x @ module.down.weight.T + module.down.bias) @ module.up.weight.T + module.up.bias)
        return f if pooling is None else gate_of(module.gate, x, VISIBLE) * f

    assert_same(lambda_module(module, VISIBLE), naive, torch.randn(BATCH, LENGTH, D))


@pytest.mark.parametrize("pooling", [None, "mean", "mean_padded", "token"])
@pytest.mark.parametrize("visible", [None, VISIBLE], ids=["dense", "padded"])
@pytest.mark.parametrize(
    "make",
    [
        lambda gate: LowRank(D, D, r=2, alpha=3, gate=gate),
        *(lambda gate, s=s: Bottleneck(D, r=3, scaling=s, gate=gate) for s in (1.0, 4.0, "learned")),
    ],
    ids=["low_rank", "bottleneck", "scaled", "learned"],
)
def test_add_is_the_sum_with_the_formula(make, pooling, visible):
    """The fused `add` is y + forward(x), with the same gradients, in float32 and where y has another type."""
    module = filled(make(Gate(D, pooling) if pooling else None))
    y, x = torch.randn(2, BATCH, LENGTH, D)

    class Added(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, y, x):
            return module.add(y, x, visible)

    assert_same(Added(), lambda y, x: y + module(x, visible), y, x)
    low = module.add(y.bfloat16(), x, visible)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), y.bfloat16().float() + module(x, visible), rtol=2e-2, atol=2e-2)


def lambda_module(module, visible):
    """The module, called with the padding."""

    class Called(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x):
            return self.inner(x, visible)

    return Called()


@pytest.mark.parametrize(
    "module",
    [
        LowRank(D, D, r=2),
        LowRank(D, D, r=2, gate=Gate(D)),
        Bottleneck(D, r=3),
        Bottleneck(D, r=3, gate=Gate(D, "token")),
        Bias(D),
    ],
    ids=lambda m: type(m).__name__,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_add_is_the_sum(module, dtype):
    """add(y, x) = y + forward(x), in the type of y."""
    filled(module)
    x, y = torch.randn(BATCH, LENGTH, D), torch.randn(BATCH, LENGTH, D).to(dtype)
    total = module.add(y, x, VISIBLE)
    assert total.dtype == dtype
    torch.testing.assert_close(total, y + module(x, VISIBLE).to(dtype), rtol=1e-2 if dtype != torch.float32 else 1e-5,
                               atol=1e-5)  # fmt: skip


def test_low_rank_in_a_fused_projection():
    """With `rows`, only these rows of the base output change, by B A x."""
    rows = torch.tensor([1, 4, 5])
    module = filled(LowRank(D, 3, r=2, alpha=2, rows=rows, width=7))
    x = torch.randn(BATCH, LENGTH, D)
    delta = module(x)
    torch.testing.assert_close(delta[..., rows], x @ module.A.T @ module.B.T)
    others = [i for i in range(7) if i not in rows]
    assert not delta[..., others].any()
    torch.testing.assert_close(F.linear(x, module.delta_weight()), delta)


def test_dropout_is_before_the_low_rank_and_not_before_its_gate():
    module = filled(LowRank(D, D, r=2, dropout=0.5, gate=Gate(D, "token")))
    x = torch.randn(BATCH, LENGTH, D)
    seen = []
    module.gate.register_forward_hook(lambda gate, args, g: seen.append(g))
    training = module.train()(x)
    module.eval()(x)
    torch.testing.assert_close(seen[0], seen[1])
    assert not torch.equal(training, module(x))


def test_prefix_gates():
    """A mean gate scales keys and values; a token gate adds log g to the scores."""
    x = torch.randn(BATCH, LENGTH, D)
    prefix = filled(Prefix(2, 3, 4, 5, "joint", gate=Gate(D, "mean")))
    g = gate_of(prefix.gate, x, VISIBLE)[:, None]
    keys, values, log_g = prefix(x, VISIBLE)
    torch.testing.assert_close(keys, g * prefix.P_K)
    torch.testing.assert_close(values, g * prefix.P_V)
    assert log_g is None

    prefix = filled(Prefix(2, 3, 4, 5, "joint", gate=Gate(D, "token")))
    keys, values, log_g = prefix(x, VISIBLE)
    torch.testing.assert_close(keys[0], prefix.P_K)
    torch.testing.assert_close(values[0], prefix.P_V)
    torch.testing.assert_close(log_g, gate_of(prefix.gate, x, None).log()[:, None])
    with torch.no_grad():
        prefix.gate.bias.fill_(-1000)
    log_g = prefix(x)[2]
    assert log_g.isfinite().all()  # as a score it hides the prefix, and has a gradient
    assert log_g.max() < -80


def test_a_mean_gate_reads_the_end_of_a_mask_that_is_longer():
    """Behind a cache the mask covers earlier tokens too; the tokens of x are the last. A row of padding gets 0."""
    gate, x = filled(Gate(D, "mean")), torch.randn(BATCH, LENGTH, D)
    mask = torch.cat([torch.tensor([[0, 1], [1, 1], [1, 0]]).bool(), VISIBLE], dim=1)
    score = F.linear(x, gate.weight)
    torch.testing.assert_close(gate(score, mask), gate_of(gate, x, VISIBLE))
    empty = VISIBLE.clone()
    empty[1] = False
    assert gate(score, empty)[1].item() == 0
    torch.testing.assert_close(gate(score, empty)[[0, 2]], gate_of(gate, x, VISIBLE)[[0, 2]])


def test_projected_prefix_folds_to_the_same_vectors():
    """[P_K, P_V] = W_2 tanh(W_1 E), entry by entry; folding keeps it."""
    projection = filled(Projection(3, D, 7))
    module = filled(ProjectedPrefix(2, 3, 4, 5, projection, form="joint"))
    code = torch.tanh(projection.embedding.weight @ projection.hidden.weight.T + projection.hidden.bias)
    wide = code @ module.last.weight.T + module.last.bias
    keys, values = module.vectors()
    for head in range(2):
        for token in range(3):
            start = head * 9
            torch.testing.assert_close(keys[head, token], wide[token, start : start + 4])
            torch.testing.assert_close(values[head, token], wide[token, start + 4 : start + 9])
    plain = module.to_plain()
    assert not plain.shift_positions
    gate = Gate(D)
    options = {"form": "joint", "gate": gate, "shift_positions": True}
    other = ProjectedPrefix(2, 3, 4, 5, Projection(3, D, 7), **options).double().eval().to_plain()
    assert other.form == "joint"
    assert other.shift_positions
    assert other.gate is gate
    assert not other.training
    assert other.requires_grad_(False).vectors()[0].dtype == torch.float64
    assert all(p.requires_grad for p in plain.parameters())
    assert not any(p.requires_grad for p in module.requires_grad_(False).to_plain().parameters())
    assert isinstance(plain, Prefix)
    assert not isinstance(plain, ProjectedPrefix)
    torch.testing.assert_close(plain.P_K, keys)
    torch.testing.assert_close(plain.P_V, values)


def test_a_fixed_gate_is_constant():
    gate = filled(Gate(D, "token"))
    assert not gate.is_constant
    gate.fix(0.3)
    assert gate.is_constant
    x = torch.randn(BATCH, LENGTH, D)
    torch.testing.assert_close(gate(F.linear(x, gate.weight)), torch.full((BATCH, LENGTH, 1), 0.3))


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_gates_can_be_fixed_at_their_ends(value):
    """The bias stays finite, so that the gate can be saved, and trained again."""
    gate = filled(Gate(D))
    gate.fix(value)
    assert gate.bias.isfinite().all()
    assert gate(torch.zeros(BATCH, LENGTH, 1)).flatten().tolist() == pytest.approx([value] * BATCH, abs=1e-5)


def test_initial_values():
    """Gates, prefixes and bottlenecks begin with small normal weights in the papers; here they begin as nothing."""
    d, r = 400, 300
    normal = {
        "gate": (Gate(d).weight, 0.02),
        "keys": (Prefix(4, 50, d, 30, "joint").vectors()[0], 0.02),
        "values": (Prefix(4, 50, 30, d, "joint").vectors()[1], 0.02),
        "separate keys": (Prefix(4, 50, d, 30).vectors()[0], 1.0),
        "down": (Bottleneck(d, r, init=0.02).down.weight, 0.02),
        "up": (Bottleneck(d, r, init=0.5).up.weight, 0.5),
    }
    for name, (tensor, std) in normal.items():
        assert tensor.std().item() == pytest.approx(std, rel=0.15), name
        assert abs(tensor.mean().item()) < 0.1 * std, name
    lora, projected = Bottleneck(d, r), ProjectedPrefix(4, 50, d, 30, Projection(50, d, 7))
    assert not Prefix(4, 50, d, 30).vectors()[1].any()
    assert not projected.vectors()[1].any()
    assert projected.vectors()[0].any()
    assert not lora.up.weight.any()
    assert 0.95 < lora.down.weight.abs().max().item() * d**0.5 <= 1  # Kaiming uniform with a = sqrt(5): 1 / sqrt(d)
    for module in (Bottleneck(d, r, init=0.02), lora):
        assert not module.down.bias.any()
        assert not module.up.bias.any()
    assert Gate(d).bias.item() == 2
    assert Gate(d, init=-0.5).bias.item() == -0.5
    assert not Bias(d).b.any()
    assert not Prefix(2, 3, 4, 5).shift_positions
    assert Bottleneck(d, r, scaling="learned").scaling.item() == 1


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_a_fixed_gate_scales_the_delta_weight(value):
    """delta_weight with a constant gate is the sub-layer; with another gate there is none."""
    module = filled(LowRank(D, 4, r=2, alpha=3, gate=Gate(D, "token")))
    with pytest.raises(ValueError, match="`gate` depends on the input, so no weight equals this sub-layer"):
        module.delta_weight()
    module.gate.fix(value)
    x = torch.randn(BATCH, LENGTH, D)
    torch.testing.assert_close(F.linear(x, module.delta_weight()), module(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [LowRank, Bottleneck], ids=lambda make: make.__name__)
@pytest.mark.parametrize("gated", [False, True])
def test_add_under_autocast(make, gated):
    """Products in bf16, the sum in the type of y: add(y, x) = y + forward(x) still."""
    gate = Gate(D, "token") if gated else None
    module = filled(LowRank(D, D, r=2, gate=gate) if make is LowRank else Bottleneck(D, r=3, gate=gate))
    x, y = torch.randn(BATCH, LENGTH, D), torch.randn(BATCH, LENGTH, D)
    with torch.autocast("cpu", torch.bfloat16):
        total, change = module.add(y, x), module(x)
    assert total.dtype == torch.float32
    assert change.dtype == torch.bfloat16 or gated  # a gate's own product is in the type of its weight
    torch.testing.assert_close(total, y + change.float(), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("gated", [False, True])
def test_dropout_in_add(gated):
    """While it trains, `add` drops what `forward` drops; in evaluation nothing is dropped."""
    gate = Gate(D, "token") if gated else None
    for module in (LowRank(D, D, r=2, dropout=0.5, gate=gate), Bottleneck(D, r=3, dropout=0.5, gate=gate)):
        filled(module)
        x, y = torch.randn(BATCH, LENGTH, D), torch.zeros(BATCH, LENGTH, D)
        found = []
        for call in (module, lambda x, module=module, y=y: module.add(y, x)):
            torch.manual_seed(3)
            found.append(call(x))
        torch.testing.assert_close(*found)
        plain = module.eval()(x)
        assert not torch.allclose(found[0], plain)
        torch.testing.assert_close(module.add(y, x), plain)


@pytest.mark.parametrize("pooling", [None, "mean", "token"])
def test_separate_prefix(pooling):
    """g softmax(q P_K^T / sqrt(d_k)) P_V, head by head; query heads share the key head of their group."""
    gate = None if pooling is None else Gate(D, pooling)
    prefix = filled(Prefix(2, 3, 4, 5, gate=gate))
    x, q = torch.randn(BATCH, LENGTH, D), torch.randn(BATCH, LENGTH, 2 * 2 * 4)
    ours = prefix.attend(q, x, VISIBLE)
    assert ours.shape == (BATCH, LENGTH, 2 * 2 * 5)
    g = torch.ones(BATCH, LENGTH, 1) if gate is None else gate_of(gate, x, VISIBLE).expand(BATCH, LENGTH, 1)
    for head in range(4):
        share = torch.softmax(q[..., 4 * head : 4 * head + 4] @ prefix.P_K[head // 2].T / 2, dim=-1)
        expected = g * (share @ prefix.P_V[head // 2])
        torch.testing.assert_close(ours[..., 5 * head : 5 * head + 5], expected)


@pytest.mark.parametrize("d", [6, 7])
def test_coupling(d):
    """The identity at the start; with any weights it is NICE's formula, and `inverse` undoes it."""
    x, module = torch.randn(2, 3, d), Coupling(d)
    assert torch.equal(module(x), x)
    filled(module)
    x_1, x_2 = x[..., : d // 2], x[..., d // 2 :]
    y_1 = x_1 + module.first(x_2)
    y = torch.cat([y_1, x_2 + module.second(y_1)], -1)
    torch.testing.assert_close(module.add(x, x), y)
    torch.testing.assert_close(module.inverse(y), x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("position", ["first", "second"])
def test_soft_prompt(position):
    """P is in front of every row, or behind its first token; it starts between -0.5 and 0.5."""
    x, module = torch.randn(2, 4, D), SoftPrompt(3, D, position)
    assert module.P.abs().max() <= 0.5
    first = 1 if position == "second" else 0
    for row, result in zip(x, module.add(x, x), strict=True):
        assert torch.equal(result, torch.stack([*row[:first], *module.P, *row[first:]]))


@pytest.mark.parametrize("norm", ["before", "after", "both"])
def test_bottleneck_with_norms(norm):
    """Zero at the start; then the formula, with a gate on x itself."""
    x = torch.randn(2, LENGTH, D)
    module = NormedBottleneck(D, r=4, norm=norm, gate=Gate(D, "mean_padded"))
    assert not module(x).any()
    filled(module)

    def naive(x):
        code = module.norm_before(x) if norm != "after" else x
        z = torch.relu(code @ module.down.weight.T + module.down.bias)
        out = gate_of(module.gate, x, None) * (z @ module.up.weight.T + module.up.bias)
        return module.norm_after(out) if norm != "before" else out

    assert_same(module, naive, x)
    torch.testing.assert_close(module.add(x, x), x + naive(x))
