"""Names modules as `IA3Config` does: by the shortest endings of their paths that no other module has."""

from collections.abc import Iterable, Sequence

from peft.tuners.tuners_utils import _find_minimal_target_modules


def module_names(outputs: Sequence[str], inputs: Sequence[str], others: Iterable[str]) -> tuple[set[str], set[str]]:
    """The `target_modules` and `feedforward_modules` that select these modules and no others.

    Args:
        outputs: paths of the modules that are scaled at their output.
        inputs: paths of the modules that are scaled at their input; they are in no other group.
        others: the paths of the model's other modules.
    """
    targets = _find_minimal_target_modules([*outputs, *inputs], {*others})
    feedforward = _find_minimal_target_modules({*inputs}, {*others, *outputs}) if inputs else set()
    # peft compares `feedforward_modules` letter by letter: "proj" is an ending of "k_proj" too
    if any(path.endswith(tuple(feedforward)) for path in outputs):
        feedforward = set(inputs)
    return targets, feedforward
