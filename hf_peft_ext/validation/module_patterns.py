"""Matches the patterns of a config against module paths, within a time limit, which Python's `re` does not have."""

import re
import time
import warnings
from collections.abc import Iterable

import regex

PATTERN_SECONDS = 0.5  # CPU time for one pattern on all paths of a model; ordinary patterns take milliseconds


def matching(pattern: str | Iterable[str], paths: Iterable[str], until: float | None = None) -> list[str]:
    """The paths that `pattern` matches, by peft's rule for `target_modules`.

    Args:
        pattern: a regular expression for the whole path, or a list of endings.
        paths: paths of modules.
        until: the time to give up, by `time.process_time`, the clock of `regex`; None for half a second from now.

    Raises:
        ValueError: the pattern is not a regular expression, or takes too long.
    """
    if isinstance(pattern, str):
        return fully_matching(pattern, paths, time.process_time() + PATTERN_SECONDS if until is None else until)
    endings = set(pattern)
    return [path for path in paths if any(ending in endings for ending in endings_of(path))]


def fully_matching(pattern: str, paths: Iterable[str], until: float) -> list[str]:
    """The paths that a regular expression matches as a whole. Raises as `matching`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)  # refuses what only `regex` has, such as recursion, which takes memory
        compiled = regex.compile(pattern)
        return [path for path in paths if compiled.fullmatch(path, timeout=max(until - time.process_time(), 1e-6))]
    except TimeoutError as error:
        raise ValueError(f"The pattern {quoted(pattern)} takes too long to match; name the modules.") from error
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"The pattern {quoted(pattern)} is no regular expression: {error}.") from error


def endings_of(path: str) -> list[str]:
    """The path "a.b.c" as "a.b.c", "b.c" and "c"."""
    parts = path.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def quoted(pattern: str) -> str:
    """A pattern for an error, at most 80 characters of it."""
    return repr(pattern if len(pattern) <= 80 else f"{pattern[:80]}...")
