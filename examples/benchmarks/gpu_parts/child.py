"""One process of `gpu.py`: measures rows of a part, one after the other, and writes each to a file as a line of JSON.

It ends early where the next row would be measured on a device that an error has left unusable, or beside memory that
is still held; `gpu.py` then starts another for the rows that are left.
"""

import json
import platform
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from tables import Row

from .part import Part, Setting
from .table_of_parts import PARTS

HELD = 2**28  # bytes that may stay allocated between rows: workspaces of kernels


def attempt(part: Part, job: str, name: str, setting: Setting) -> Row:
    """The row; of an error its last line."""
    try:
        return part.measure(job, name, setting)
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[-1]
        return {"error": f"{type(error).__name__}: {line[:300]}"}


def usable(setting: Setting) -> bool:
    """Whether the device computes, and holds no more than at the start."""
    if not setting.on_gpu:
        return True
    try:
        setting.settle()
        (torch.ones(8, device="cuda") + 1).sum().item()
    except RuntimeError:
        return False
    return torch.cuda.memory_allocated() < HELD


def about(setting: Setting) -> str:
    device = torch.cuda.get_device_name() if setting.on_gpu else f"CPU ({platform.machine()}), smoke"
    return f"{device}, torch {torch.__version__}, transformers {transformers.__version__}"


def main() -> None:
    task: dict[str, Any] = json.loads(sys.argv[1])
    warnings.simplefilter("ignore", FutureWarning)  # 2026-11: transformers and peft among themselves
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    setting = Setting(task["device"], task["smoke"], Path(task["folder"]))
    if setting.smoke:
        torch.set_num_threads(1)
    with open(task["file"], "a", encoding="utf-8") as stream:
        stream.write(json.dumps({"about": about(setting)}) + "\n")
        for name in task["rows"]:
            if time.time() > task["until"]:
                break
            start = time.perf_counter()
            row = attempt(PARTS[task["part"]], task["job"], name, setting)
            seconds = time.perf_counter() - start
            stream.write(json.dumps({"name": name, "row": row, "seconds": seconds}) + "\n")
            stream.flush()
            if not usable(setting):
                break
            torch._dynamo.reset()


if __name__ == "__main__":
    main()
