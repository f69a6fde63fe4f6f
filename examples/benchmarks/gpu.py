"""All measurements that need a GPU, with random weights: at most 12 minutes on one H100 or H200.

    tests      the tests marked `gpu`
    prefix     prefixes against references in higher precision
    kernels    which attention kernels work with each method: sdpa's, flash, flex
    nf4        NF4 with double quantisation: each method trains, evaluates, trains, saves and reloads
    memory     peak of a step at the shape of Llama-7B: LoRA, QLoRA, UniPELT, ladder, stages of plug-in transfer, full
    speed      forward pass and training step in bf16 at the shapes of BERT-base, Qwen2-0.5B and Llama-7B
    precisions each method on a base model of Llama-7B's shape in float32, bf16, 8 bits and NF4
    compiled   the same with torch.compile, fewer layers

Each row is measured in a separate process. After a failure the row holds the last line of the error, and the other
rows continue. Each table is written to results/gpu/ as Markdown and CSV when its part is finished. The last table has
the duration of each part. Nothing is downloaded.

    python examples/benchmarks/gpu.py
    python examples/benchmarks/gpu.py --parts memory nf4 --minutes 5
    python examples/benchmarks/gpu.py --smoke           # tiny, on the CPU, to see that it runs
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from gpu_parts.part import NO_CUDA, Part
from gpu_parts.table_of_parts import PARTS
from rich.console import Console
from tables import Row, markdown, write
from transformers import HfArgumentParser

HERE = Path(__file__).parent
OUT_OF_TIME, STOPPED = "skipped: out of time", "stopped: out of time"
GRACE = 15  # seconds before the end after which no row is begun


@dataclass
class Arguments:
    """Options of the command."""

    parts: list[str] = field(default_factory=lambda: list(PARTS), metadata={"help": ", ".join(PARTS)})
    minutes: float = field(default=12.0, metadata={"help": "Time limit; running parts are stopped."})
    smoke: bool = field(default=False, metadata={"help": "Tiny models on the CPU, to test the script."})
    output: Path = field(default=HERE / "results" / "gpu", metadata={"help": "Folder for the tables."})

    def __post_init__(self) -> None:
        if unknown := [part for part in self.parts if part not in PARTS]:
            raise SystemExit(f"`parts` (={unknown}) must be among: {', '.join(PARTS)}.")


class Run:
    """One run of the script.

    Args:
        args: the command's.
        folder: for files that processes share; removed at the end.
    """

    def __init__(self, args: Arguments, folder: Path):
        self.args, self.folder = args, folder
        self.device = "cpu" if args.smoke else "cuda"
        self.end = time.time() + 60 * args.minutes
        self.about, self.console = "", Console()

    def part(self, name: str) -> list[Row]:
        """All rows of a part; written after each process."""
        part, rows = PARTS[name], []
        title = f"{part.title} (smoke)" if self.args.smoke else part.title
        for job, names in (part.smoke if self.args.smoke and part.smoke else part.jobs).items():
            rows += self.job(name, part, job, list(names))
            part.finish(rows)
            write(self.args.output, name, title, rows, " ".join([f"{self.about}.", part.note]).strip())
        print(markdown(title, rows))
        return rows

    def job(self, name: str, part: Part, job: str, names: list[str]) -> list[Row]:
        """The rows of one process, and of those that take its place after an error."""
        found: dict[str, Row] = {}
        if self.device == "cuda" and not torch.cuda.is_available():
            found = {key: {"error": NO_CUDA} for key in names}
        while (left := [key for key in names if key not in found]) and time.time() < self.end - GRACE:
            got, ended = self.process(name, job, left)
            if not got and time.time() >= self.end - GRACE:
                ended = STOPPED
            found |= got or {left[0]: {"error": ended}}
        first, second = part.keys
        return [{first: job, second: key, **found.get(key, {"error": OUT_OF_TIME})} for key in names]

    def process(self, name: str, job: str, names: list[str]) -> tuple[dict[str, Row], str]:
        """What one process measured, and how it ended."""
        file, log = self.folder / "rows.jsonl", self.folder / "log.txt"
        file.write_text("", encoding="utf-8")
        task = {"part": name, "job": job, "rows": names, "device": self.device, "smoke": self.args.smoke}
        shared = self.folder / name
        shared.mkdir(exist_ok=True)
        task |= {"file": str(file), "folder": str(shared), "until": self.end - GRACE}
        paths = [str(HERE), str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "gpu_parts.child", json.dumps(task)]
        with log.open("w", encoding="utf-8") as stream, self.console.status(f"{name}: {job}"):
            child = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment, start_new_session=True)
            ended = self.waited(child)
        rows: dict[str, Row] = {}
        for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            self.about = line.get("about", self.about)
            if "row" in line:
                rows[line["name"]] = line["row"]
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return rows, ended or (lines or ["no error was printed"])[-1][:300]

    def waited(self, child: "subprocess.Popen[bytes]") -> str:
        """Wait for a process until the time is over; why it was stopped, if it was."""
        try:
            code = child.wait(timeout=max(1.0, self.end - time.time()))
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # with pytest, if that is what it runs
            child.wait()
            return STOPPED
        return f"ended by {signal.Signals(-code).name}" if code < 0 else ""


def main() -> None:
    args: Arguments = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]  # pyright: ignore[reportArgumentType]
    seconds: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        run = Run(args, Path(folder))
        for name in args.parts:
            start = time.time()
            rows = run.part(name)
            errors = sum("error" in row for row in rows)
            seconds.append({"part": name, "seconds": time.time() - start, "rows": len(rows), "without result": errors})
        seconds.append({"part": "all", "seconds": sum(row["seconds"] for row in seconds)})
    print(markdown("Seconds", seconds))
    write(args.output, "seconds", "Seconds", seconds, f"{run.about}.")


if __name__ == "__main__":
    main()
