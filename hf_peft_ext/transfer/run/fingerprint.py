"""Digests of a run's inputs, so that a call with other rows or models does not continue the run."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from torch import nn

from hf_peft_ext.model.structure import innermost
from hf_peft_ext.ranking.packing import bare
from hf_peft_ext.transfer.bridges.activations import bytes_of
from hf_peft_ext.transfer.map.adapter_tensors import AdapterTensors
from hf_peft_ext.transfer.run.task import Row
from hf_peft_ext.validation.checks import check

SETTINGS = "settings.json"
SAMPLED = 1000  # rows of an embedding in a model's fingerprint


def record_inputs(folder: Path, inputs: dict[str, Any]) -> None:
    """Write the inputs of a run into its folder, or compare them with those of the run that is there.

    Raises:
        ValueError: they differ, and that run has written an artefact.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    artefacts = [file for file in folder.iterdir() if file != path and not file.name.startswith("partial-")]
    if artefacts and path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        other = sorted(name for name in inputs if inputs[name] != earlier.get(name))
        check("folder", str(folder), not other, f"holds a run with another {', '.join(other)}")
    path.write_text(json.dumps(inputs, indent=1) + "\n", encoding="utf-8")


def rows_fingerprint(rows: Sequence[Row], names: Iterable[str]) -> str:
    """The digest of these fields of rows, in their order."""
    fields = list(names)
    return digest_of(json.dumps([[row.get(name) for name in fields] for row in rows], default=json_value).encode())


def adapter_config_fingerprint(small: nn.Module, config: PeftConfig | None) -> str:
    """The digest of the config for a small model; of an empty one if the model has an adapter."""
    fields = {} if config is None or isinstance(small, PeftModel) else config.to_dict()
    fields = {name: value for name, value in fields.items() if name != "peft_version"}
    return digest_of(json.dumps(fields, default=json_value, sort_keys=True).encode())


def model_fingerprint(model: nn.Module, adapters: AdapterTensors | None = None) -> str:
    """The digest of a model's adapters, and of rows from all over its token embedding."""
    embedding: Any = innermost(bare(model).get_input_embeddings())
    tensors = [embedding.weight[:: max(1, len(embedding.weight) // SAMPLED)]]
    return digest_of(*map(bytes_of, [*tensors, *(tensor.value for tensor in adapters or ())]))


def digest_of(*parts: bytes) -> str:
    """The BLAKE2b digest of bytes, 16 hexadecimal digits."""
    hashed = hashlib.blake2b(digest_size=8)
    for part in parts:
        hashed.update(part)
    return hashed.hexdigest()


def json_value(value: Any) -> Any:
    """A value for JSON: sets sorted, numbers of a tensor or an array."""
    return sorted(value) if isinstance(value, set) else value.tolist() if hasattr(value, "tolist") else str(value)
