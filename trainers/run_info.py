"""What can be read off a run: its data, its model, its machine, its settings. Nothing here is guessed."""

import dataclasses
import json
import platform
import re
import sys
import warnings
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import patch_environment
from huggingface_hub.constants import HF_HUB_CACHE
from transformers import TrainingArguments

from hf_peft_ext.hub_cards import DatasetRecord
from hf_peft_ext.trainers.redact import is_secret, without_secrets

PACKAGES = (
    "hf_peft_ext",
    "peft",
    "transformers",
    "torch",
    "accelerate",
    "datasets",
    "tokenizers",
    "trl",
    "bitsandbytes",
)
# Settings that say where things lie or who watches, not how the adapter was trained.
PLACES = re.compile(r"output_dir|logging_dir|run_name|resume_from_checkpoint|disable_tqdm|report_to|log_level.*|"
                    r"push_to_hub|hub_.*|project|trackio.*|local_rank")  # fmt: skip


def dataset_record(data: Any, name: str | None = None) -> DatasetRecord | None:
    """A set of data as far as it tells of itself; None where it says nothing at all.

    Args:
        data: a `datasets.Dataset`, or whatever else Trainer takes.
        name: what the run calls it, for data without a name of their own.
    """
    if data is None:
        return None
    rows = len(data) if hasattr(data, "__len__") else None
    info = getattr(data, "info", None)
    found = hub_source(data)
    own = getattr(info, "dataset_name", None)
    if own in ("json", "csv", "text", "parquet", "arrow", "generator", "pandas"):  # the reader's name
        own = None
    config = getattr(info, "config_name", None) if found[0] or own else None
    record = DatasetRecord(
        name=found[0] or own or name or "local data",
        config=None if config == "default" else config,
        split=str(data.split) if getattr(data, "split", None) else None,
        rows=rows,
        revision=found[1],
        fingerprint=getattr(data, "_fingerprint", None),
        on_hub=found[0] is not None,
    )
    return None if rows is None and record.fingerprint is None and record.name == "local data" else record


def hub_source(data: Any) -> tuple[str | None, str | None]:
    """Hub id and commit of a data set, from where `datasets` keeps it; None for what is not of the Hub."""
    for url in getattr(getattr(data, "info", None), "download_checksums", None) or {}:
        if found := re.match(r"hf://datasets/([^/@]+/[^/@]+)@([0-9a-f]{40})/", url):
            return found[1], found[2]
    for file in getattr(data, "cache_files", None) or []:
        if found := re.search(r"/([^/]+)___([^/]+)/.*/([0-9a-f]{40})/", Path(file["filename"]).as_posix()):
            namespace, lowered, revision = found.groups()
            return hub_id(namespace, lowered, revision), revision
    return None, None


def hub_id(namespace: str, lowered: str, revision: str) -> str | None:
    """The id as it is written on the Hub: `datasets` keeps it in snake case, the Hub's own cache as it is."""
    from datasets.naming import camelcase_to_snakecase

    for folder in Path(HF_HUB_CACHE).glob(f"datasets--{namespace}--*/snapshots/{revision}"):
        name = folder.parts[-3].removeprefix(f"datasets--{namespace}--")
        if camelcase_to_snakecase(name) == lowered:
            return f"{namespace}/{name}"
    return None


def hyperparameters(args: TrainingArguments) -> dict[str, Any]:
    """The settings that differ from their defaults, or whose defaults are not those of transformers' class; without
    places and secrets.
    """
    usual, stock = defaults(args), {f.name: default(f) for f in dataclasses.fields(TrainingArguments)}
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        hidden = is_secret(field.name) or PLACES.fullmatch(field.name)
        own = default(field) != stock.get(field.name, default(field))  # as the rate of a paper's recipe
        if field.init and (own or value != usual[field.name]) and not hidden:
            changed[field.name] = value.value if isinstance(value, Enum) else value
    return without_secrets(json.loads(json.dumps(changed, default=str)), args.hub_token)


def defaults(args: TrainingArguments) -> dict[str, Any]:
    """The settings of that class where none are given, worked out as those of a run are: enums made, gaps filled."""
    made = object.__new__(type(args))
    vars(made)["_setup_devices"] = torch.device("cpu")  # it would set up the devices anew, amid a training
    with warnings.catch_warnings(), patch_environment(accelerate_use_deepspeed="false"):  # and DeepSpeed
        warnings.simplefilter("ignore")  # said already when the run's own were made
        try:
            made.__init__(output_dir=args.output_dir, use_cpu=True)  # that needs no GPU, whatever the defaults ask for
        except (TypeError, ValueError):  # a class whose defaults alone make no settings
            return {f.name: default(f) for f in dataclasses.fields(args)}
    made.use_cpu, made.dataloader_pin_memory = False, not args.use_cpu  # which `use_cpu` turns off
    return {f.name: getattr(made, f.name) for f in dataclasses.fields(args)}


def default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def versions() -> dict[str, str]:
    """The packages that were loaded, and Python."""
    return {name: version(name) for name in PACKAGES if name in sys.modules} | {"python": platform.python_version()}


def hardware(processes: int, device: torch.device) -> str:
    """Processor or GPU, and how many."""
    if device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"{processes} x {processor()}, {threads} {'thread' if threads == 1 else 'threads'}"


def processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def peak_memory(device: torch.device) -> int | None:
    """The most bytes in use at a time: of the GPU since training began, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows has none
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
