"""The entries of the catalogue: what cannot be computed of a method, read from methods.yaml."""

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from hf_peft_ext.registry import REGISTERED
from hf_peft_ext.tuners.ia3.config import TFewConfig
from hf_peft_ext.validation.suggestions import did_you_mean

METHOD_FAMILIES = ("additive", "selective", "reparameterised")
TFEW = "TFEW"  # becomes an IA3 config once the model is known


@dataclass(frozen=True)
class Entry:
    """A method, as methods.yaml has it.

    Args:
        name: its name in the catalogue.
        title: its common name.
        family: some of `METHOD_FAMILIES`.
        adds: what is trained.
        paper: an arXiv identifier or an address; "" if there is none.
        type: its PEFT type, in upper case.
        config: fields of the config that its defaults lack, or that make the method out of the type.
        aliases: further names.
        refused: why it is not available; "" if it is.
    """

    name: str
    title: str
    family: tuple[str, ...]
    adds: str
    paper: str
    type: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    refused: str = ""

    @property
    def url(self) -> str:
        """The address of the paper; "" if there is none."""
        return f"https://arxiv.org/abs/{self.paper}" if re.fullmatch(r"\d{4}\.\d{5}", self.paper) else self.paper

    @property
    def source(self) -> str:
        """Where the method is from: "hf_peft_ext", "peft" or "refused"."""
        if self.refused:
            return "refused"
        return "hf_peft_ext" if self.type == TFEW or PeftType[self.type] in REGISTERED else "peft"

    def peft_config(self, **fields: Any) -> PeftConfig:
        """The config of the method with its defaults.

        Args:
            fields: further fields of the config.
        """
        config_cls: Any = TFewConfig if self.type == TFEW else PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[self.type]]
        return config_cls(**(self.config | fields))


@cache
def read_entries() -> dict[str, Entry]:
    """All entries by name; those of types that the installed peft lacks are left out."""
    written = yaml.safe_load(Path(__file__).with_name("methods.yaml").read_text("utf-8"))
    entries: dict[str, Entry] = {}
    for name, values in written.items():
        values |= {key: tuple(values[key]) for key in ("family", "aliases") if key in values}
        entries[name] = Entry(name=name, **({"type": name.upper()} | values))
    return {name: e for name, e in entries.items() if e.refused or e.type == TFEW or e.type in PeftType.__members__}


def available() -> list[Entry]:
    """The entries that are not refused."""
    return [entry for entry in read_entries().values() if not entry.refused]


def entry_named(name: str) -> Entry:
    """The entry of a name, a title or an alias; case, spaces and punctuation do not matter.

    Raises:
        ValueError: there is none.
    """
    entries = read_entries()
    by_key = {plain(alias): entry for entry in entries.values() for alias in (*entry.aliases, entry.title, entry.name)}
    if plain(name) not in by_key:
        hint = did_you_mean(name.lower(), entries) or "; `hf-peft-ext methods` lists them."
        raise ValueError(f"`name` (={name!r}) must be a method of the catalogue{hint}")
    return by_key[plain(name)]


def plain(name: str) -> str:
    """A name without case, spaces and punctuation."""
    return re.sub(r"[^a-z0-9³]", "", name.lower())
