"""LoRA with random ranks, the baseline of methods that choose ranks."""

import random
from collections.abc import Iterable

from torch import nn

from hf_peft_ext.model.calls import own_modules
from hf_peft_ext.model.find_target_modules import find_target_modules
from hf_peft_ext.model.structure import leaf_size
from hf_peft_ext.validation.checks import check, check_count
from hf_peft_ext.validation.module_patterns import matching


def random_rank_pattern(
    model: nn.Module,
    r: int = 8,
    seed: int = 0,
    target_modules: str | Iterable[str] | None = None,
    lora_alpha: float | None = None,
    max_rank: int | None = None,
) -> dict[str, dict[str, int] | dict[str, float]]:
    """Random ranks with the parameters of LoRA at rank r, for `LoraConfig(**random_rank_pattern(model), ...)`.

    Each module draws a rank between 1 and `max_rank`; random modules then gain or lose ranks until the parameters are
    those of rank r in all modules, or up to one rank of the smallest module fewer. lora_alpha / rank is the same in
    all modules. The result is a stock LoRA adapter.

    Args:
        model: the base model; on the meta device is enough.
        r: the rank of the LoRA with as many parameters.
        seed: of the draw.
        target_modules: as in `peft.LoraConfig`; None for queries and values (`find_target_modules`). Pass the same to
            `LoraConfig`.
        lora_alpha: that of rank r; None for 2 r.
        max_rank: the highest rank; None for 2 r - 1.

    Returns:
        `rank_pattern` and `alpha_pattern`, by path.

    Raises:
        ValueError: a value breaks a rule, or no linear leaf matches.
    """
    check_count("r", r)
    highest = 2 * r - 1 if max_rank is None else max_rank
    check(
        "max_rank", max_rank, type(highest) is int and highest >= r, f"must be a whole number of at least `r` (={r})"
    )
    leaves = {path: size for path, module in own_modules(model) if path and (size := leaf_size(module))}
    named = find_target_modules(model) if target_modules is None else target_modules
    paths = matching(named, leaves)
    check("target_modules", target_modules, bool(paths), f"matches no linear leaf of {type(model).__name__}")
    widths = {path: sum(leaves[path]) for path in paths}  # parameters of one rank
    limits = {path: min(highest, *leaves[path]) for path in paths}
    ranks = drawn_ranks(widths, limits, r * sum(widths.values()), random.Random(seed))
    scaling = 2.0 if lora_alpha is None else lora_alpha / r
    return {
        "rank_pattern": {f"^{path}": rank for path, rank in ranks.items()},
        "alpha_pattern": {f"^{path}": scaling * rank for path, rank in ranks.items()},
    }


def drawn_ranks(
    widths: dict[str, int], limits: dict[str, int], budget: int, generator: random.Random
) -> dict[str, int]:
    """Path -> a random rank; as many parameters as possible without exceeding the budget, if the limits allow it.

    Args:
        widths: path -> parameters of one rank.
        limits: path -> highest rank.
        budget: number of parameters.
        generator: draws.
    """
    ranks = {path: generator.randint(1, limits[path]) for path in widths}
    left = budget - sum(widths[path] * rank for path, rank in ranks.items())
    while left < 0 and (larger := [path for path in ranks if ranks[path] > 1]):
        path = generator.choice(larger)
        ranks[path], left = ranks[path] - 1, left + widths[path]
    while smaller := [path for path in ranks if ranks[path] < limits[path] and widths[path] <= left]:
        path = generator.choice(smaller)
        ranks[path], left = ranks[path] + 1, left - widths[path]
    return ranks
