"""Renews a card and keeps what its author did: edits, additions and deletions, in the text and in the metadata.

A card is a list of named items: the blocks of its text (a heading, a paragraph, a table, a fenced block) and the
entries of its metadata. A comment at its end holds a hash of each as it was last written. An item that still has its
hash was not touched, and is renewed; one that has another is the author's, and stays; one that is gone was deleted,
and stays away. The same merge takes two cards of one adapter together: the one in its folder and the one on the Hub.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump

from hf_peft_ext.validation.checks import check

Items = dict[str, Any]  # name -> block of text, or (key, value) of the metadata; in order

COMMENT = re.compile(r"<!-- hf_peft_ext renews what stands above unless you change it: (.*) -->\s*")
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
META = "@"  # in front of the names of metadata


@dataclass
class Version:
    """A card at some time.

    Args:
        metadata: its front matter.
        blocks: name -> block of its text; a block that was not generated has a name made of its hash.
        generated: name of each item as it was generated, whether or not the author has it still -> hash.
        kept: name of each item of the author's -> hash.
        known: the names of all that this card has ever held; what it holds no more was deleted from it.
    """

    metadata: dict[str, Any]
    blocks: dict[str, str]
    generated: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    known: frozenset[str] = frozenset()

    @classmethod
    def of(cls, metadata: dict[str, Any], blocks: dict[str, str]) -> "Version":
        """A card that has just been generated."""
        version = cls(metadata, blocks)
        version.generated = {name: digest(item) for name, item in version.items.items()}
        return version

    @classmethod
    def read(cls, content: str) -> "Version":
        """A card as it was found.

        Raises:
            ValueError: its front matter is no YAML mapping, or its comment was changed.
        """
        content = content.replace("\r\n", "\n")
        front = REGEX_YAML_BLOCK.search(content)
        metadata = front_matter(front[2]) if front else {}
        text = content[front.end() :] if front else content
        parts = split(text)
        generated, kept = {}, {}
        for comment in filter(None, map(COMMENT.fullmatch, parts)):  # two, where two cards were put together
            stored = state(comment[1])
            generated |= stored["generated"]
            kept |= stored["kept"]
        before = {**generated, **kept}
        blocks = named([part for part in parts if not COMMENT.fullmatch(part)], before)
        return cls(metadata, blocks, generated, kept, frozenset(before))

    def forget(self, key: str) -> None:
        """Take an entry of the metadata for one that was never there."""
        self.metadata.pop(key, None)
        for names in (self.generated, self.kept):
            for name in [name for name in names if name.split(":")[0] == f"{META}{key}"]:
                del names[name]

    @property
    def items(self) -> Items:
        return {**self.blocks, **entries(self.metadata)}

    def renewed(self, new: "Version") -> "Version":
        """This card with what was generated replaced by what is generated now."""
        return self._merged(new, self.generated)

    def joined(self, other: "Version") -> "Version":
        """This card, changed as another has been since they were one.

        What the other never held, it has not deleted.
        """
        shared = {name: hash for name, hash in self.kept.items() if name in other.known}
        return self._merged(other, {**self.generated, **shared})

    def _merged(self, new: "Version", before: Mapping[str, str]) -> "Version":
        headed = not before and any(block.startswith("# ") for block in self.blocks.values())
        items = merge(self.items, before, {n: item for n, item in new.items.items() if not (headed and n == "title")})
        blocks = {name: item for name, item in items.items() if not name.startswith(META)}
        metadata = unentries({name: item for name, item in items.items() if name.startswith(META)})
        now = self.items
        taken = {name: hash for name, hash in self.generated.items() if name not in now or digest(now[name]) != hash}
        generated = {**taken, **new.generated}
        kept = {name: digest(item) for name, item in items.items() if digest(item) != generated.get(name)}
        return Version(metadata, blocks, generated, kept, self.known)

    def content(self) -> str:
        """The file, with the comment that the next renewal reads."""
        stored = json.dumps({"generated": self.generated, "kept": self.kept}, separators=(",", ":"))
        stored = stored.replace(">", "\\u003e")  # nothing inside ends the comment
        comment = f"<!-- hf_peft_ext renews what stands above unless you change it: {stored} -->"
        front = f"---\n{yaml_dump(self.metadata, sort_keys=False)}---"
        return "\n\n".join([front, *self.blocks.values(), comment]) + "\n"


def state(text: str) -> dict[str, dict[str, str]]:
    """What a card's comment holds."""
    try:
        stored = json.loads(text)
        return {name: {str(key): str(hash) for key, hash in stored[name].items()} for name in ("generated", "kept")}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError("The last comment of the card (README.md) was changed; restore or remove it.") from error


def read_text(path: Path, name: str = "README.md") -> str:
    """The text of a card; `name` names it in errors.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: {error.reason} at byte {error.start}.") from error


def front_matter(text: str) -> dict[str, Any]:
    try:
        metadata = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that there is not; brackets without end
        raise ValueError(f"The metadata of the card (README.md) is not valid YAML: {error}") from error
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise ValueError(f"The metadata of the card (README.md) must be a mapping, not {type(metadata).__name__}.")
    for key in metadata:
        check("metadata", key, isinstance(key, str), "must have words for keys; put others into quotes")
    return metadata


def digest(item: Any) -> str:
    text = item.strip() if isinstance(item, str) else json.dumps(item, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def split(text: str) -> list[str]:
    """The parts of a Markdown text between blank lines; a fenced block is one part, whatever it holds."""
    parts: list[list[str]] = [[]]
    fence = ""
    for line in text.split("\n"):
        mark = FENCE.match(line)
        if fence and mark and mark[1].startswith(fence) and not line[mark.end() :].strip():
            fence = ""
        elif not fence and mark:
            fence = mark[1]
        if not fence and COMMENT.fullmatch(line):
            parts += [[line], []]
        elif line.strip() or fence:
            parts[-1].append(line)
        elif parts[-1]:
            parts.append([])
    return ["\n".join(lines) for lines in parts if lines]


def named(found: Iterable[str], before: Mapping[str, str]) -> dict[str, str]:
    """Blocks of a text under the names that they were written with, else under names made of their hashes."""
    names: dict[str, list[str]] = {}
    for name, hash in before.items():
        names.setdefault(hash, []).append(name)
    blocks: dict[str, str] = {}
    for block in found:
        known = names.get(digest(block))
        name = known.pop(0) if known else f"~{digest(block)}"
        while name in blocks:
            name += "~"
        blocks[name] = block
    return blocks


def entries(metadata: Mapping[str, Any]) -> Items:
    """The entries of metadata; lists of words one word an entry, so that both sides may add to them."""
    items: Items = {}
    for key, value in metadata.items():
        if isinstance(value, list) and all(isinstance(word, str) for word in value):
            items.update({f"{META}{key}:{digest(word)}": (key, [word]) for word in value})
        else:
            items[f"{META}{key}"] = (key, value)
    return items


def unentries(items: Items) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for key, value in items.values():
        if key not in metadata:
            metadata[key] = value
        elif isinstance(metadata[key], list) and isinstance(value, list):
            metadata[key] = [*metadata[key], *value]
    return metadata


def merge(current: Items, before: Mapping[str, str], new: Items) -> Items:
    """What is there now, renewed: three versions in one.

    Args:
        current: the items as they were left.
        before: name -> hash of the items as they were written.
        new: the items that take their places.
    """
    merged = {
        name: new.get(name) if before.get(name) == digest(item) else item
        for name, item in current.items()
        if name in new or before.get(name) != digest(item)
    }
    present = {digest(item) for item in current.values()}
    order = list(merged)
    at = 0 if before else len(order)
    for name, item in new.items():
        if name in merged:
            at = 1 + order.index(name)
        elif name not in before and (before or digest(item) not in present):
            merged[name] = item
            order.insert(at, name)
            at += 1
    return {name: merged[name] for name in order}
