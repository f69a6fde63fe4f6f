"""Compacter's bottleneck: both matrices are sums of Kronecker products of small matrices."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_peft_ext.sublayers.bottleneck import Bottleneck


class PHMRule(nn.Module):
    """A_1, ..., A_n: (n, n), the left factors of the Kronecker products.

    Args:
        n: their number and width.
        std: standard deviation at the start.
    """

    gate = None

    def __init__(self, n: int, std: float):
        super().__init__()
        self.factors = nn.Parameter(torch.empty(n, n, n))
        nn.init.normal_(self.factors, std=std)


class PHMLinear(nn.Module):
    """W x + b,  W = sum_i A_i (x) (s_i t_i),  A_i: (n, n), s_i: (d_out / n, rank), t_i: (rank, d_in / n).

    Karimi Mahabadi et al. 2021 (https://arxiv.org/abs/2106.04647), with (x) the Kronecker product.

    Args:
        d_in: width of x, a multiple of n.
        d_out: width of the output, a multiple of n.
        rank: rank of the right factors.
        rule: the A_i.
        shared: whether another module holds the rule. Then it is no child of this one. So the rule is one parameter
            with one name, and all code that trains, saves, loads, copies or moves parameters treats it once. Tied
            parameters would be in the state dict once a layer, and loading by assignment would untie them.
    """

    def __init__(self, d_in: int, d_out: int, rank: int, rule: PHMRule, shared: bool):
        super().__init__()
        n = len(rule.factors)
        self.s = nn.Parameter(torch.empty(n, d_out // n, rank))
        self.t = nn.Parameter(torch.empty(n, rank, d_in // n))
        self.bias = nn.Parameter(torch.zeros(d_out))
        self._shared_rule = (rule,) if shared else ()  # in a tuple: not a child
        if not shared:
            self.rule = rule
        for factor in (*self.s.data, *self.t.data):
            nn.init.xavier_uniform_(factor)

    @property
    def weight(self) -> Tensor:  # shape: (d_out, d_in)
        """W."""
        rule = self._shared_rule[0] if self._shared_rule else self.rule
        a = rule.factors.to(self.s)  # layers may be on several devices
        w = torch.einsum("iab,ipk,ikq->apbq", a, self.s, self.t)  # (n, d_out / n, n, d_in / n)
        return w.flatten(2, 3).flatten(0, 1)


class PHMBottleneck(Bottleneck):
    """A bottleneck whose W_down and W_up are Kronecker sums (`PHMLinear`).

    Compacter, Karimi Mahabadi et al. 2021 (https://arxiv.org/abs/2106.04647).

    Args:
        d: width of x and of the output, a multiple of n.
        r: width of the bottleneck, a multiple of n.
        phm_dim: n.
        phm_rank: rank of the right factors.
        rule: the A_i that all layers share; None for own ones of each matrix.
        init: "lora": the t_i of W_up are zero, so that f = 0 at the start, and the A_i have the standard deviation
            1 / n: they scale the gradient of the t_i. A number is their standard deviation, and nothing is zero.
        options: the other arguments of `Bottleneck`.
    """

    def __init__(
        self,
        d: int,
        r: int = 24,
        phm_dim: int = 4,
        phm_rank: int = 1,
        rule: PHMRule | None = None,
        init: float | Literal["lora"] = "lora",
        **options: Any,
    ):
        super().__init__(d, r, **options)
        std = rule_std(phm_dim, init)
        self.down, self.up = (
            PHMLinear(d_in, d_out, phm_rank, rule or PHMRule(phm_dim, std), shared=rule is not None)
            for d_in, d_out in ((d, r), (r, d))
        )
        if init == "lora":
            nn.init.zeros_(self.up.t)


def rule_std(n: int, init: float | Literal["lora"]) -> float:
    """Standard deviation of the A_i at the start, see `PHMBottleneck`."""
    return 1 / n if init == "lora" else init
