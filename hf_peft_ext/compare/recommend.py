"""The recommendation of a comparison: one sentence, which says so where no method is distinguishable."""

from collections.abc import Sequence

from hf_peft_ext.compare.method_scores import MethodScores


def recommend(
    methods: Sequence[MethodScores], reference: str, score: str, higher_is_better: bool, rows: int
) -> tuple[str | None, str]:
    """The method to take, and a sentence that says why.

    A method is taken in place of the reference only if it is significantly better. A tie is not taken for its higher
    mean: that may be chance.

    Args:
        methods: the results.
        reference: the name of the reference.
        score: name of the score.
        higher_is_better: False if the score is a loss.
        rows: number of training rows.

    Returns:
        The name of the method, None if nothing can be recommended; and the sentence.
    """
    base = next(method for method in methods if method.name == reference)
    others = {verdict: [m for m in methods if m.verdict == verdict] for verdict in ("better", "tie", "worse")}
    if base.mean is None:
        return None, f"{base.title} has no scores, so nothing was compared with it, and there is no recommendation."
    if not any(others.values()):
        return None, f"No method beside {base.title} has scores, so there is no recommendation."
    if others["better"]:
        sign = 1 if higher_is_better else -1
        best = max(others["better"], key=lambda method: sign * (method.mean or 0.0))
        low, high = best.difference_interval or (0.0, 0.0)
        gain = f"{best.difference:+.3f} (95 % interval {low:+.3f} to {high:+.3f}, adjusted p = {best.p_adjusted:.3f})"
        return best.name, (
            f"Take {best.title}: its {score} on the dev rows is {best.mean:.3f}, {base.title}'s is {base.mean:.3f}, "
            f"a difference of {gain} over {len(best.scores)} seeds."
        )
    worse = listing([method.title for method in others["worse"]])
    if not others["tie"]:
        return base.name, f"Every other method is worse than {base.title} with these {rows} rows; take {base.title}."
    start = f"No method is distinguishable from {base.title} with these {rows} rows"
    if worse:
        verb = "is" if len(others["worse"]) == 1 else "are"
        start = f"No method is better than {base.title} with these {rows} rows ({worse} {verb} worse)"
    smaller = [m for m in others["tie"] if (m.parameters or 0) < (base.parameters or 0)]
    if not smaller:
        return base.name, f"{start}; take {base.title}, it is the smallest."
    smallest = min(smaller, key=lambda method: method.parameters or 0)
    reason = f"{smallest.title} is smaller, and whether it is as good cannot be told"
    return base.name, f"{start}; take {base.title} ({reason})."


def listing(names: Sequence[str]) -> str:
    """Names as an enumeration: "a, b and c"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
