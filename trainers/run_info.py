"""Reads facts of a run for its record: data, settings, versions, hardware. Nothing is guessed."""

import dataclasses
import json
import platform
import re
import shlex
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
from hf_peft_ext.hub_cards.redact import is_secret, without_places, without_secrets

PACKAGES = (
    "hf_peft_ext",
    "peft",
    "transformers",
    "torch",
    "accelerate",
    "datasets",
    "tokenizers",
    "trl",
    "sentence_transformers",
    "bitsandbytes",
)
# Settings of folders and reports, which do not change the adapter.
PLACES = re.compile(r"output_dir|logging_dir|run_name|resume_from_checkpoint|disable_tqdm|report_to|log_level.*|"
                    r"push_to_hub|hub_.*|project|trackio.*|local_rank")  # fmt: skip


def dataset_record(data: Any, name: str | None = None) -> DatasetRecord | None:
    """Metadata of a dataset; None if there is none.

    Args:
        data: a `datasets.Dataset`, or other data that Trainer takes.
        name: for data without a name of their own.
    """
    if data is None:
        return None
    rows = len(data) if hasattr(data, "__len__") else None
    info = getattr(data, "info", None)
    repo_id, revision = hub_source(data)
    own = getattr(info, "dataset_name", None)
    if own in ("json", "csv", "text", "parquet", "arrow", "generator", "pandas"):  # the reader's name
        own = None
    config = getattr(info, "config_name", None) if repo_id or own else None
    record = DatasetRecord(
        name=repo_id or own or name or "local data",
        config=None if config == "default" else config,
        split=str(data.split) if getattr(data, "split", None) else None,
        rows=rows,
        revision=revision,
        fingerprint=getattr(data, "_fingerprint", None),
        on_hub=repo_id is not None,
    )
    return None if rows is None and record.fingerprint is None and record.name == "local data" else record


def hub_source(data: Any) -> tuple[str | None, str | None]:
    """Hub id and commit of a dataset, from its URLs or its cache files; None for local data."""
    for url in getattr(getattr(data, "info", None), "download_checksums", None) or {}:
        if match := re.match(r"hf://datasets/([^/@]+/[^/@]+)@([0-9a-f]{40})/", url):
            return match[1], match[2]
    for file in getattr(data, "cache_files", None) or []:
        if match := re.search(r"/([^/]+)___([^/]+)/.*/([0-9a-f]{40})/", Path(file["filename"]).as_posix()):
            namespace, lowered, revision = match.groups()
            return hub_id(namespace, lowered, revision), revision
    return None, None


def hub_id(namespace: str, lowered: str, revision: str) -> str | None:
    """The id with the Hub's spelling, from the Hub's cache; the cache of `datasets` has it in snake case.

    Args:
        namespace: the owner.
        lowered: the name in snake case.
        revision: the commit.
    """
    from datasets.naming import camelcase_to_snakecase

    for folder in Path(HF_HUB_CACHE).glob(f"datasets--{namespace}--*/snapshots/{revision}"):
        name = folder.parts[-3].removeprefix(f"datasets--{namespace}--")
        if camelcase_to_snakecase(name) == lowered:
            return f"{namespace}/{name}"
    return None


def hyperparameters(args: TrainingArguments) -> dict[str, Any]:
    """The settings that differ from their defaults, or from those of transformers; without folders and secrets."""
    usual, stock = defaults(args), {f.name: default(f) for f in dataclasses.fields(TrainingArguments)}
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        hidden = is_secret(field.name) or PLACES.fullmatch(field.name)
        own = default(field) != stock.get(field.name, default(field))  # such as the learning rate of a paper's recipe
        if field.init and (own or value != usual[field.name]) and not hidden:
            changed[field.name] = value.value if isinstance(value, Enum) else value
    return without_secrets(json.loads(json.dumps(changed, default=str)), args.hub_token)


def defaults(args: TrainingArguments) -> dict[str, Any]:
    """The default settings of the class of `args`, after its `__post_init__`."""
    usual = object.__new__(type(args))
    # or it would set up the devices again, during training; sentence-transformers' arguments read the last two
    vars(usual).update(_setup_devices=torch.device("cpu"), distributed_state=None, _n_gpu=0)
    with warnings.catch_warnings(), patch_environment(accelerate_use_deepspeed="false"):  # and DeepSpeed
        warnings.simplefilter("ignore")  # `args` have given the same warnings
        try:
            usual.__init__(output_dir=args.output_dir, use_cpu=True)  # or some defaults would need a GPU
        except (TypeError, ValueError):  # a class with required settings
            return {f.name: default(f) for f in dataclasses.fields(args)}
    usual.use_cpu, usual.dataloader_pin_memory = False, not args.use_cpu  # `use_cpu` turns pinned memory off
    return {f.name: getattr(usual, f.name) for f in dataclasses.fields(args)}


def default(field: dataclasses.Field[Any]) -> Any:
    """The default value of a dataclass field."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that are loaded."""
    return {name: version(name) for name in PACKAGES if name in sys.modules} | {"python": platform.python_version()}


def hardware(processes: int, device: torch.device) -> str:
    """Processor or GPU, and the number of processes."""
    if device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"{processes} x {processor()}, {threads} {'thread' if threads == 1 else 'threads'}"


def processor() -> str:
    """The processor's name."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def peak_bytes(device: torch.device) -> int | None:
    """Peak bytes: of the GPU since training began, else of the process; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def command_line(*tokens: str | None) -> str | None:
    """The command that started this process, without secrets and absolute paths; None in a notebook or a console.

    Args:
        tokens: secret texts.
    """
    if hasattr(sys, "ps1") or "ipykernel" in sys.modules:
        return None
    kept: list[str] = []
    hide_next = False
    for argument in sys.argv[1:]:
        name, equals, _ = argument.partition("=")
        if not hide_next and not (equals and is_secret(name)) and not is_secret(argument):
            kept.append(argument)
        hide_next = argument.startswith("-") and not equals and is_secret(argument)
    return without_secrets(shlex.join(without_places([*program(), *kept])), *tokens)


def program() -> list[str]:
    """The name of the script that was started, or `python -m` and the module."""
    script, spec = sys.argv[0], getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or spec.origin != script:  # another origin: a debugger's module that runs the script
        return [Path(script).name]
    return ["python", "-m", spec.name.removesuffix(".__main__")]
