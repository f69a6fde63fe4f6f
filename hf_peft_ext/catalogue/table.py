"""The catalogue as rows: for the terminal, for JSON, and for the documentation."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from transformers import PretrainedConfig

from hf_peft_ext.catalogue.entries import METHOD_FAMILIES, Entry
from hf_peft_ext.catalogue.sizes import MethodSizes, SizesOnModel
from hf_peft_ext.catalogue.traits import Traits, traits_of

LETTERS = {family: family[0].upper() for family in METHOD_FAMILIES}
KEY = (
    "kind: A additive, S selective, R reparameterised. base: the untrained adapter keeps the outputs. merge: into the "
    "weights. LoRA: peft converts it. mix: adapters mix in a batch. grad: gradients pass through the base model. "
    "file, RAM: less than half of the model is stored, is trained. cost: at inference, merged."
)
SHORT_CELL = 10  # characters of a cell
# Column of the table -> attribute of `Traits`.
TRAITS = {
    "base": "starts_at_base",
    "merge": "merges",
    "LoRA": "to_lora",
    "mix": "mixes",
    "grad": "backprop",
    "file": "saves_storage",
    "RAM": "saves_memory",
    "cost": "inference",
}


class Described:
    """A method with its traits and, for a model, its sizes.

    Args:
        entry: the method.
        traits: its traits; None for one that is refused or cannot be measured.
        sizes: its sizes on a model; None without a model.
        error: why it has no traits.
    """

    def __init__(self, entry: Entry, traits: Traits | None, sizes: MethodSizes | None = None, error: str = ""):
        self.entry, self.traits, self.sizes, self.error = entry, traits, sizes, error

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        entry = self.entry
        values: dict[str, Any] = {"name": entry.name, "title": entry.title, "source": entry.source, "type": entry.type}
        values |= {"family": list(entry.family), "adds": entry.adds, "paper": entry.url, "config": entry.config}
        if entry.refused:
            return values | {"type": None, "refused": entry.refused}
        values |= asdict(self.traits) if self.traits else {"error": self.error}
        return values | ({"sizes": asdict(self.sizes)} if self.sizes else {})

    def row(self) -> dict[str, str]:
        """Column -> cell."""
        kind = "".join(LETTERS[family] for family in self.entry.family)
        cells = {"method": self.entry.title, "kind": kind}
        if self.sizes is not None:
            cells |= size_cells(self.sizes)
        for column, attribute in TRAITS.items():
            value = getattr(self.traits, attribute, "")
            cells[column] = {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
        return cells | {"cost": cells["cost"] if len(cells["cost"]) <= SHORT_CELL else "several"}


def describe(entries: Sequence[Entry], config: PretrainedConfig | None = None) -> Iterator[Described]:
    """Methods with their traits, one after the other.

    Args:
        entries: the methods.
        config: a model's config, to compute sizes.

    Raises:
        ValueError: the model cannot be built from its config.
    """
    sizes_on = None if config is None else SizesOnModel(config)
    for entry in entries:
        traits, sizes, error = None, None, ""
        if not entry.refused:
            try:
                traits = traits_of(entry.name)
            except ValueError as reason:
                error = str(reason)
            sizes = None if sizes_on is None else sizes_on.of(entry)
        yield Described(entry, traits, sizes, error)


def size_cells(sizes: MethodSizes) -> dict[str, str]:
    """Column -> cell, of sizes; empty where the method does not fit the model."""
    if sizes.error:
        return {"trained": "", "of model": "", "stored": ""}
    return {"trained": f"{sizes.trained:,}", "of model": f"{sizes.share:.3%}", "stored": f"{sizes.stored:,}"}


def markdown(described: Sequence[Described]) -> str:
    """The table of the documentation."""
    heads = {
        "base": "Starts at the base model",
        "merge": "Merges",
        "LoRA": "Converts to LoRA",
        "mix": "Mixes in a batch",
        "grad": "Gradients through the base model",
        "file": "Small file",
        "RAM": "Few trained",
        "cost": "Added at inference",
    }
    lines = [f"| Method | PEFT type | Kind | What is trained | {' | '.join(heads.values())} | Paper |"]
    lines.append("|---" * (len(heads) + 5) + "|")
    for one in described:
        entry, row = one.entry, one.row()
        row["cost"] = getattr(one.traits, "inference", "")
        cells = [entry.title, f"`{entry.type}`", ", ".join(entry.family), entry.adds, *(row[name] for name in heads)]
        cells.append(f"[{entry.paper if entry.url != entry.paper else 'paper'}]({entry.url})" if entry.url else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
