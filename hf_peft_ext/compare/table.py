"""The table of a comparison as text, for the terminal and for the page."""

from hf_peft_ext.compare.method_scores import MethodScores
from hf_peft_ext.hub_cards.markdown import BYTES, SECONDS, in_units


def cells(method: MethodScores, has_budget: bool) -> dict[str, str]:
    """Column -> cell of a method's row; what was not measured is empty.

    Args:
        method: the results of the method.
        has_budget: whether methods of fixed size are marked.
    """
    against = "" if method.difference is None else f"{method.difference:+.3f}"
    if method.difference_interval is not None:
        low, high = method.difference_interval
        against += f" [{low:+.3f}, {high:+.3f}]"
    own = " (fixed)" if method.is_fixed_size and has_budget else ""
    return {
        "method": method.title,
        "score": interval_text(method.mean, method.interval),
        "against the reference": against,
        "p": "" if method.p_adjusted is None else f"{method.p_adjusted:.3f}",
        "verdict": method.verdict,
        "parameters": "" if method.parameters is None else f"{method.parameters:,}{own}",
        "size": "" if method.bytes is None else in_units(method.bytes, BYTES),
        "step": "" if method.step_seconds is None else in_units(method.step_seconds, SECONDS),
        "ratio": "" if method.step_ratio is None else f"{method.step_ratio:.2f}",
        "memory": "" if method.memory is None else in_units(method.memory, BYTES),
        "retention": retention_text(method),
        "rate": "" if method.learning_rate is None else f"{method.learning_rate:.3g}",
        "spent": in_units(method.seconds, SECONDS) if method.seconds else "",
    }


def interval_text(mean: float | None, interval: tuple[float, float] | None) -> str:
    """A mean with its 95 % interval: "0.612 [0.566, 0.658]"."""
    if mean is None:
        return ""
    return f"{mean:.3f}" + ("" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]")


def retention_text(method: MethodScores) -> str:
    """The change of the loss on general text: "3.93 → 4.02"."""
    if method.base_loss is None or method.adapter_loss is None:
        return ""
    return f"{method.base_loss:.2f} → {method.adapter_loss:.2f}"
