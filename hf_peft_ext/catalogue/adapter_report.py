"""What a saved adapter is, and whether it can be loaded: read from its files, without unpickling."""

import hashlib
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig

from hf_peft_ext.budget.fake_model import model_on_meta
from hf_peft_ext.budget.model_class import HEAD_CLASSES
from hf_peft_ext.hub_cards.record import RECORD_FILE, TrainingRecord
from hf_peft_ext.hub_cards.saved_adapter import ArchitectureRow, SavedAdapter
from hf_peft_ext.loading.config import config_in_file, read_config
from hf_peft_ext.loading.expected_tensors import expected_tensors
from hf_peft_ext.loading.weights import check_header, check_values, check_weights
from hf_peft_ext.model.mean_pooling import MeanPoolingForSequenceClassification
from hf_peft_ext.registry import REGISTERED, extend_peft
from hf_peft_ext.validation.checks import check, is_hub_id
from hf_peft_ext.validation.config_schema import read_json

READ_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, RECORD_FILE)
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@dataclass
class AdapterReport:
    """A report on a saved adapter.

    Args:
        path: its folder or Hub id.
        revision: its commit on the Hub.
        peft_type: its PEFT type.
        base_model: the base model that its config names.
        task_type: its task.
        parameters: the numbers in its file.
        dtypes: types of its tensors.
        placements: the sub-layers, where they are, and their sizes.
        gates: LAYER.SUBLAYER -> mean gate, from the training record.
        settings: fields of the config that differ from their defaults.
        files: name -> SHA-256 of the files that are read.
        pickles: files that are pickles, which are not read.
        stock_peft: whether peft loads it without this package; else the reason.
        safe: whether `load_adapter` accepts it on its base model: "yes", "no: ..." or "not known: ...".
    """

    path: str
    revision: str | None = None
    peft_type: str = ""
    base_model: str | None = None
    task_type: str | None = None
    parameters: int = 0
    dtypes: list[str] = field(default_factory=list)
    placements: list[ArchitectureRow] = field(default_factory=list)
    gates: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    pickles: list[str] = field(default_factory=list)
    stock_peft: str = ""
    safe: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def inspect_adapter(
    path: str | Path, base: str | None = None, revision: str | None = None, token: str | bool | None = None
) -> AdapterReport:
    """Report on a saved adapter. Its weights are read tensor by tensor; no pickle is read and no code is run.

    Args:
        path: a folder, or an id on the Hub.
        base: the base model's Hub id or folder, of which only the config is read; by default the one that the adapter
            names.
        revision: branch, tag or commit on the Hub.
        token: for private repositories, as in `huggingface_hub`.

    Raises:
        ValueError: there is no adapter, or its config is not strict JSON.
        OSError: the repository cannot be read.
    """
    extend_peft()
    folder, commit, names = adapter_files(path, revision, token)
    kind = read_json(folder / CONFIG_NAME).get("peft_type")
    report = AdapterReport(str(path), commit, str(kind))
    report.files = {name: digest(folder / name) for name in READ_FILES if (folder / name).is_file()}
    report.pickles = [name for name in names if name.endswith(PICKLES)]
    report.stock_peft = stock_verdict(report.peft_type, names)
    try:
        config = config_in_file(folder / CONFIG_NAME)
        fill_report(report, config, folder)
    except ValueError as error:
        report.safe = f"no: {error}"
        return report
    report.safe = loading_verdict(report, folder, base or report.base_model)
    return report


def adapter_files(
    path: str | Path, revision: str | None, token: str | bool | None
) -> tuple[Path, str | None, list[str]]:
    """The local folder of an adapter, its commit on the Hub, and the names of all its files.

    Raises:
        ValueError: there is no adapter, or a local folder has a `revision`.
    """
    if Path(path).exists():
        check("revision", revision, revision is None, "must be None: a local folder has no revisions")
        folder, commit = Path(path), None
        names = sorted(file.name for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []
    else:
        check("path", str(path), is_hub_id(str(path)), "is neither a folder nor an id on the Hub")
        folder = Path(snapshot_download(str(path), revision=revision, allow_patterns=list(READ_FILES), token=token))
        commit = folder.name
        names = sorted(HfApi(token=token).list_repo_files(str(path), revision=commit))
    check("path", str(path), (folder / CONFIG_NAME).is_file(), f"has no {CONFIG_NAME}")
    return folder, commit, names


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            sha.update(block)
    return sha.hexdigest()


def stock_verdict(peft_type: str, names: Sequence[str]) -> str:
    """Whether peft loads an adapter without this package.

    Args:
        peft_type: as the config names it.
        names: the adapter's files.
    """
    if peft_type in {member.value for member in REGISTERED}:
        return f"no: {peft_type} is a method of hf_peft_ext, which must be imported first"
    if SAFETENSORS_WEIGHTS_NAME in names:
        return "yes"
    return "yes, by unpickling" if WEIGHTS_NAME in names else f"no: it has no {SAFETENSORS_WEIGHTS_NAME}"


def fill_report(report: AdapterReport, config: PeftConfig, folder: Path) -> None:
    """Fill a report from a config that was checked, the header of the weights, and the training record.

    Raises:
        ValueError: a file is damaged.
    """
    settings = changed_fields(config)
    report.base_model, task = settings.pop("base_model_name_or_path", None), settings.pop("task_type", None)
    report.task_type = task and str(getattr(task, "value", task))
    unused = ("peft_type", "inference_mode", "peft_version", "auto_mapping")
    report.settings = {name: value for name, value in settings.items() if name not in unused}
    record = TrainingRecord.load(folder)
    report.gates = record.gates if record is not None else {}
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    check("path", report.path, weights.is_file(), f"must have {SAFETENSORS_WEIGHTS_NAME}; pickles are not read")
    check_header(weights)
    adapter = SavedAdapter(folder)
    report.placements, report.parameters = adapter.rows(), adapter.parameters
    with safe_open(weights, framework="pt") as file:
        report.dtypes = sorted({file.get_slice(key).get_dtype() for key in file.keys()})


def changed_fields(config: PeftConfig) -> dict[str, Any]:
    """The fields of a config that differ from their defaults."""
    values: dict[str, Any] = {}
    for one in fields(config):
        default = one.default if one.default_factory is MISSING else one.default_factory()
        if getattr(config, one.name) != default:
            values[one.name] = getattr(config, one.name)
    return values


def loading_verdict(report: AdapterReport, folder: Path, base: str | None) -> str:
    """Whether `load_adapter` accepts the adapter on its base model, which is built on the meta device.

    Args:
        report: the report so far.
        folder: the adapter's folder.
        base: Hub id or folder of the base model.
    """
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    try:
        model = base_on_meta(report, folder, base)
    except (OSError, ValueError) as error:
        try:
            with safe_open(weights, framework="pt") as file:
                for key in file.keys():
                    check_values(key, file.get_tensor(key))
        except ValueError as refusal:
            return f"no: {refusal}"
        reason = str(error).strip().splitlines()[0]
        return f"not known: config and values are sound, but the base model's config cannot be read ({reason})"
    try:
        config = read_config(folder / CONFIG_NAME, model)
        check_weights(weights, expected_tensors(model, config, "default"))
    except ValueError as error:
        return f"no: {error}"
    return "yes"


def base_on_meta(report: AdapterReport, folder: Path, base: str | None) -> nn.Module:
    """The base model on the meta device, with as many classes as the adapter's head.

    Raises:
        OSError, ValueError: its config cannot be read, or it cannot be built.
    """
    check("base", base, bool(base), "must name the base model, which the adapter does not")
    saved = SavedAdapter(folder)
    labels = saved.number_of_labels()
    config = AutoConfig.from_pretrained(str(base), **({} if labels is None else {"num_labels": labels}))
    if saved.reads_mean:
        with torch.device("meta"):
            return MeanPoolingForSequenceClassification.from_config(config)
    task = report.task_type if report.task_type in HEAD_CLASSES else None
    return model_on_meta(config, task=task, dtype=torch.float32)
