"""The tests marked `gpu`, a row for each of their files."""

import re
import subprocess
import sys
import time
from pathlib import Path

from tables import Row

from .part import NO_CUDA, Part, Setting

ROOT = Path(__file__).parents[3]
SECONDS = 240  # for one file; what ran until then counts
OUTCOME = re.compile(r"^(tests/\S+?::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)
REASON = re.compile(r"^(?:FAILED|ERROR) tests/\S+?::(.+?)(?: - (.*))?$", re.MULTILINE)


def files() -> list[str]:
    """The test files that have such tests."""
    names = (path.name for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text("utf-8"))
    return sorted(names, key=lambda name: name != "test_gpu.py")


def measure(_: str, name: str, setting: Setting) -> Row:
    if not setting.on_gpu:
        return {"error": NO_CUDA}
    options = ["-m", "gpu", "-v", "--tb=no", "-rfE", "-p", "no:cacheprovider", "--color=no"]
    start, printed = time.perf_counter(), setting.folder / f"{name}.txt"
    with printed.open("w", encoding="utf-8") as stream:
        try:
            subprocess.run(
                [sys.executable, "-m", "pytest", f"tests/{name}", *options], cwd=ROOT, stdout=stream, timeout=SECONDS
            )
            ended = ""
        except subprocess.TimeoutExpired:
            ended = f"stopped after {SECONDS} s"
    return counted(printed.read_text("utf-8")) | {"seconds": time.perf_counter() - start, "ended": ended}


def counted(text: str) -> Row:
    """What pytest printed: how many tests passed, and why others did not."""
    outcomes = [outcome for _, outcome in OUTCOME.findall(text)]
    counts: Row = {name.lower(): outcomes.count(name) for name in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    if not outcomes:
        raise RuntimeError((text.strip().splitlines() or ["pytest printed nothing"])[-1])
    reasons = [f"{test}: {reason[:120]}" for test, reason in REASON.findall(text)]
    return counts | {"failures": "; ".join(reasons)}


PART = Part("Tests marked gpu", "", ("run by", "file"), {"pytest": files()}, measure)
