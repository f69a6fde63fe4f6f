"""The table of a comparison as text, for the terminal and for the page."""

from hf_peft_ext.compare.result import MethodComparison, MethodScores
from hf_peft_ext.hub_cards.markdown import BYTES, SECONDS, in_units

COLUMNS = (
    "method", "score", "against the reference", "p", "verdict", "parameters", "size", "step", "ratio", "memory",
    "retention", "rate", "spent",
)  # fmt: skip


def cells(method: MethodScores, result: MethodComparison) -> list[str]:
    """The cells of a method's row, one for each of `COLUMNS`; what was not measured is empty."""
    against = "" if method.difference is None else f"{method.difference:+.3f}"
    if method.difference_interval is not None:
        low, high = method.difference_interval
        against += f" [{low:+.3f}, {high:+.3f}]"
    own = method.is_fixed_size and "trained" in str(result.settings.get("budget"))
    parameters = "" if method.parameters is None else f"{method.parameters:,}{' (fixed)' if own else ''}"
    return [
        method.title,
        interval_text(method.mean, method.interval),
        against,
        "" if method.p_adjusted is None else f"{method.p_adjusted:.3f}",
        method.verdict,
        parameters,
        "" if method.bytes is None else in_units(method.bytes, BYTES),
        "" if method.step_seconds is None else in_units(method.step_seconds, SECONDS),
        "" if method.step_ratio is None else f"{method.step_ratio:.2f}",
        "" if method.memory is None else in_units(method.memory, BYTES),
        retention_text(method),
        "" if method.learning_rate is None else f"{method.learning_rate:.3g}",
        in_units(method.seconds, SECONDS) if method.seconds else "",
    ]


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
