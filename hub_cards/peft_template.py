"""What peft itself leaves in a card when it saves: nobody's edits, so nothing of it is kept."""

import re
from collections.abc import Iterable
from functools import cache

from huggingface_hub import ModelCard, ModelCardData

from hf_peft_ext.hub_cards.merge import Version
from hf_peft_ext.hub_cards.saved_adapter import SavedAdapter

TAG = re.compile(r"transformers|lora|base_model:adapter:.*")
LINES = ("### Framework versions", "- PEFT ", "## Training procedure", "The following `bitsandbytes` quantization")


def without_stock(version: Version, adapter: SavedAdapter) -> Version:
    """A card without peft's blank template and without the metadata that peft writes over what was there."""
    if blank(version.blocks.values()):
        version.blocks = {}
        version.forget("library_name")
    if not adapter.is_ours and tagged(version.metadata.get("tags"), adapter):
        version.forget("tags")
    if version.metadata.get("base_model") in ("", adapter.config.base_model_name_or_path):
        version.forget("base_model")
    return version


def tagged(tags: object, adapter: SavedAdapter) -> bool:
    """Whether the tags are those that peft writes, in place of all others; an author may have taken away any."""
    found = tags if isinstance(tags, list) else []
    always = "lora" if adapter.method == "lora" else "base_model:adapter:"
    stock = all(TAG.fullmatch(str(tag)) for tag in found)  # a card of this package has the tag "peft"
    return stock and any(str(tag).startswith(always) for tag in found)


def blank(blocks: Iterable[str]) -> bool:
    """Whether a text is the template as peft saves it, with nothing filled in."""
    return all(line in template() or line.startswith(LINES) for block in blocks for line in block.split("\n"))


@cache
def template() -> frozenset[str]:
    return frozenset(ModelCard.from_template(ModelCardData()).text.split("\n"))
