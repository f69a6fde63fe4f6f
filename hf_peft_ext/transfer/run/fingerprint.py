"""What the run in a folder was given, so that a call with other rows or other models does not go on with it."""

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
from hf_peft_ext.transfer.map.adapter_tensors import parts_of
from hf_peft_ext.transfer.run.task import Row
from hf_peft_ext.validation.checks import check

SETTINGS = "settings.json"
SAMPLED = 1000  # rows of an embedding that a model is known by


def remember(folder: Path, given: dict[str, Any]) -> None:
    """Write down what a run is given, or compare it with what the run that is there was given.

    Raises:
        ValueError: they differ, and that run has made something already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    made = [file for file in folder.iterdir() if file != path and not file.name.startswith("partial-")]
    if made and path.exists():
        present = json.loads(path.read_text(encoding="utf-8"))
        other = sorted(name for name in given if given[name] != present.get(name))
        check("folder", str(folder), not other, f"holds a run that was given another {', '.join(other)}")
    path.write_text(json.dumps(given, indent=1) + "\n", encoding="utf-8")


def of_rows(rows: Sequence[Row], names: Iterable[str]) -> str:
    """What tells rows from others: these fields of theirs, in their order."""
    fields = list(names)
    return digest(json.dumps([[row.get(name) for name in fields] for row in rows], default=plain).encode())


def of_config(small: nn.Module, config: PeftConfig | None) -> str:
    """What tells the adapter that a small model is given from others; nothing where it has one."""
    given = {} if config is None or isinstance(small, PeftModel) else config.to_dict()
    facts = {name: value for name, value in given.items() if name != "peft_version"}
    return digest(json.dumps(facts, default=plain, sort_keys=True).encode())


def of_model(model: nn.Module) -> str:
    """What tells a model from others: its adapter, and rows from all over its token embedding."""
    embedding: Any = innermost(bare(model).get_input_embeddings())
    tensors = [embedding.weight[:: max(1, len(embedding.weight) // SAMPLED)]]
    if isinstance(model, PeftModel):
        tensors += [part.value for part in parts_of(model)]
    return digest(*map(bytes_of, tensors))


def digest(*facts: bytes) -> str:
    found = hashlib.blake2b(digest_size=8)
    for fact in facts:
        found.update(fact)
    return found.hexdigest()


def plain(value: Any) -> Any:
    """As JSON takes it: a set in order, numbers out of a tensor or an array."""
    return sorted(value) if isinstance(value, set) else value.tolist() if hasattr(value, "tolist") else str(value)
