"""The files beside a card: figures and recipe.yaml, renewed unless they are the author's."""

from collections.abc import Mapping
from pathlib import Path

import yaml

from hf_peft_ext.hub_cards import figures
from hf_peft_ext.hub_cards.card_edits import CardEdits, item_digest, read_text
from hf_peft_ext.hub_cards.redact import shared_recipe

CARD, RECIPE = "README.md", "recipe.yaml"
CARD_FILES = (figures.GATES, figures.LOSSES, RECIPE)


def write_files(folder: Path, contents: Mapping[str, bytes], written: Mapping[str, str]) -> dict[str, str]:
    """Write the files beside a card, except its author's; remove those that are not generated any more.

    Args:
        folder: of the adapter.
        contents: name -> generated content.
        written: name -> digest as written last; a file with another digest, or with none, is the author's.

    Returns:
        name -> digest, for the next renewal.
    """
    kept: dict[str, str] = {}
    for name in CARD_FILES:  # by name: `written` comes from the card, which can be untrusted
        path, new = folder / name, contents.get(name)
        exists = path.exists()
        if exists and written.get(name) not in file_digests(path) and path.read_bytes() != new:
            kept |= {name: written[name]} if name in written else {}
        elif new is not None:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(new)
            kept[name] = item_digest(new.hex())
        elif exists:
            path.unlink()
    return kept


def is_as_written(path: Path) -> bool:
    """Whether a file beside a card is as the card's last renewal wrote it, so that replacing it loses no work.

    False if the card is missing or cannot be read.
    """
    try:
        written = CardEdits.read(read_text(path.parent / CARD)).files
    except (FileNotFoundError, ValueError):
        return False
    return written.get(path.name) in file_digests(path)


def file_digests(path: Path) -> set[str]:
    """The digests of a generated file: of its content, and of a recipe without its local paths.

    A card writes the recipe without local paths; then `hf-peft-ext train` writes the one that repeats the run. A
    recipe with comments or another layout is its author's.
    """
    content = path.read_bytes()
    accepted = {item_digest(content.hex())}
    if path.name == RECIPE:
        try:
            recipe = yaml.safe_load(content)
        except (yaml.YAMLError, UnicodeDecodeError):
            return accepted
        if yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).encode() == content:
            accepted.add(item_digest(shared_recipe(recipe).hex()))
    return accepted
