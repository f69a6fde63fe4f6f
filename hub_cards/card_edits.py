"""An author's part of a card: everything outside of its generated section, and edits of its metadata.

Two comments enclose the generated section. Each renewal replaces the section and keeps the text above and below it.
The second comment holds digests of what was generated, which show what the author has changed. Digests of the author's
part at the last push show which side has changed it since: this folder or the Hub.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump

from hf_peft_ext.validation.checks import check

BEGIN = "<!-- hf_peft_ext writes this section anew; write above or below it. -->"
COMMENT = re.compile(r"^<!-- hf_peft_ext (?:writes this section .*?|end of the section: (?P<state>.*)) -->\s*", re.M)
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
META = "@"  # in front of a metadata key in the names of items
AS_GENERATED = ...  # the value of an item that the author does not have


@dataclass
class CardEdits:
    """The author's part of a card.

    Args:
        items: the text "above" and "below" the section, and "@key" for metadata that differ from the generated; None
            for metadata that the author deleted.
        shared: digests of the items at the last push.
        seen: digests of the published items before that push.
        files: name -> digest of the files that were written with the card.
        in_section: whether the author has edited the section. Changed paragraphs are in `items` then: titles above,
            others below.
    """

    items: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, list[str]] = field(default_factory=dict)
    seen: dict[str, list[str]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    in_section: bool = False

    @classmethod
    def read(cls, content: str) -> "CardEdits":
        """Read them from README.md.

        Raises:
            ValueError: the front matter is not a YAML mapping, or the comments around the section were changed.
        """
        content = content.replace("\r\n", "\n")
        front = REGEX_YAML_BLOCK.search(content)
        metadata = front_matter(front[2]) if front else {}
        text = content[front.end() :] if front else content
        comments = list(COMMENT.finditer(text))
        if not comments:
            return cls(named_items(text, "", metadata, {}))
        begin, end = comments[0], comments[-1]  # text inside the section cannot end it
        state = read_state(None if begin["state"] else end["state"])
        paragraphs = split(text[begin.end() : end.start()])
        changed = [part for part in paragraphs if item_digest(part) not in state["section"]]
        titles = [part for part in changed if part.startswith("# ")]
        above = spaced(text[: begin.start()], *titles)
        below = spaced(*(part for part in changed if part not in titles), text[end.end() :])
        edited = [item_digest(part) for part in paragraphs] != state["section"]
        items = named_items(above, below, metadata, state["metadata"])
        return cls(items, state["shared"], state["seen"], state["files"], edited)

    def joined(self, published: "CardEdits") -> "CardEdits":
        """These edits and those of the published card.

        An item that one side has not changed since the last push is the other's. Where both have changed a text, the
        changes of both are kept; where both have changed a field of the metadata, the published one.
        """
        items: dict[str, Any] = {}
        for name in {**published.items, **self.items}:
            absent = AS_GENERATED if name.startswith(META) else ""
            here, there = (edits.items.get(name, absent) for edits in (self, published))
            base = self.shared.get(name, [])
            if base != published.shared.get(name, []):  # the last push failed, or another folder was pushed since
                seen = self.seen.get(name, [])
                base = seen if item_digests(name, there) == seen else []
            if item_digests(name, there) == base:
                items[name] = here
            elif item_digests(name, here) == base or name.startswith(META):
                items[name] = there
            else:
                items[name] = join_texts(here, there, base)
        items = {name: item for name, item in items.items() if item is not AS_GENERATED and item != ""}
        seen, shared = ({n: item_digests(n, item) for n, item in one.items()} for one in (published.items, items))
        return CardEdits(items, shared, seen, self.files, self.in_section or published.in_section)

    def metadata(self, generated: Mapping[str, Any]) -> dict[str, Any]:
        """Generated metadata with the author's fields in place of theirs."""
        return {key: value for key, value in {**generated, **self._fields()}.items() if value is not None}

    def _fields(self) -> dict[str, Any]:
        return {name.removeprefix(META): item for name, item in self.items.items() if name.startswith(META)}

    def content(self, metadata: Mapping[str, Any], section: str) -> str:
        """README.md with the author's part, generated metadata and a generated section."""
        above, below = self.items.get("above", ""), self.items.get("below", "")
        if any(part.startswith("# ") for part in split(above)):  # the author's title
            section = section.partition("\n\n")[2]
        deleted = {key: "" for key, value in self._fields().items() if value is None}
        state = {
            "section": [item_digest(part) for part in split(section)],
            "metadata": deleted | {key: item_digest(value) for key, value in metadata.items()},
            "shared": self.shared,
            "seen": self.seen,
            "files": self.files,
        }
        stored = json.dumps(state, separators=(",", ":")).replace(">", "\\u003e")  # nothing inside ends the comment
        front = f"---\n{yaml_dump(self.metadata(metadata), sort_keys=False)}---"
        return spaced(front, above, BEGIN, section, f"<!-- hf_peft_ext end of the section: {stored} -->", below) + "\n"


def named_items(above: str, below: str, metadata: Mapping[str, Any], generated: Mapping[str, str]) -> dict[str, Any]:
    """The items of an author, given the digests of generated metadata."""
    texts = {"above": above.strip("\n"), "below": below.strip("\n")}
    own = {key: value for key, value in metadata.items() if item_digest(value) != generated.get(key)}
    deleted = {key: None for key in {**generated, **metadata} if metadata.get(key) in (None, [])}
    return {n: text for n, text in texts.items() if text} | {META + key: v for key, v in {**own, **deleted}.items()}


def item_digests(name: str, item: Any) -> list[str]:
    """Digests of an item: one for each paragraph of a text, one for a field of the metadata."""
    if item is AS_GENERATED:
        return []
    return [item_digest(item)] if name.startswith(META) else [item_digest(part) for part in split(item)]


def join_texts(here: str, there: str, base: list[str]) -> str:
    """Two versions of a text, without the paragraphs of `base` that one of them has changed or deleted."""
    ours, theirs = split(here), split(there)
    kept = [part for part in theirs if part in ours or item_digest(part) not in base]
    return spaced(*kept, *(part for part in ours if part not in theirs and item_digest(part) not in base))


def spaced(*texts: str) -> str:
    """Texts with a blank line between them; empty ones are left out."""
    return "\n\n".join(text.strip("\n") for text in texts if text.strip("\n"))


def item_digest(item: Any) -> str:
    """Eight hexadecimal digits of the hash of a text, or of a value as JSON."""
    text = item.strip() if isinstance(item, str) else json.dumps(item, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def split(text: str) -> list[str]:
    """The paragraphs of a Markdown text; a fenced block is one of them."""
    parts: list[list[str]] = [[]]
    fence = ""
    for line in text.split("\n"):
        mark = FENCE.match(line)
        if fence and mark and mark[1].startswith(fence) and not line[mark.end() :].strip():
            fence = ""
        elif not fence and mark:
            fence = mark[1]
        if line.strip() or fence:
            parts[-1].append(line)
        elif parts[-1]:
            parts.append([])
    return ["\n".join(lines) for lines in parts if lines]


def read_state(text: str | None) -> dict[str, Any]:
    """The digests in the comment at the end of a section.

    Args:
        text: the JSON in the comment; None if the comment is missing.

    Raises:
        ValueError: the comment is missing or was changed.
    """
    try:
        stored = json.loads(text or "")
        maps = {name: {str(k): str(item) for k, item in stored[name].items()} for name in ("metadata", "files")}
        lists = {name: {str(k): list(map(str, v)) for k, v in stored[name].items()} for name in ("shared", "seen")}
        return {**maps, **lists, "section": list(map(str, stored["section"]))}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        said = "The comments around the generated section of the card (README.md) were changed"
        raise ValueError(f"{said}; restore both, or remove both to keep the whole text as your own.") from error


def read_text(path: Path, name: str = "README.md") -> str:
    """The text of a card.

    Args:
        path: the file.
        name: of the file in errors.

    Raises:
        ValueError: the file is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: {error.reason} at byte {error.start}.") from error


def front_matter(text: str) -> dict[str, Any]:
    """The metadata of a card.

    Raises:
        ValueError: the text is not a YAML mapping with words for keys.
    """
    try:
        metadata = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # an impossible date; brackets without end
        raise ValueError(f"The metadata of the card (README.md) is not valid YAML: {error}") from error
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise ValueError(f"The metadata of the card (README.md) must be a mapping, not {type(metadata).__name__}.")
    for key in metadata:
        check("metadata", key, isinstance(key, str), "must have words for keys; put others into quotes")
    return metadata
