"""Removes what peft itself writes into a card when it saves, which is nobody's edit."""

import re
from functools import cache

from huggingface_hub import ModelCard, ModelCardData

from hf_peft_ext.hub_cards.card_edits import META, CardEdits
from hf_peft_ext.hub_cards.saved_adapter import SavedAdapter

TAG = re.compile(r"transformers|lora|base_model:adapter:.*")
LINES = ("### Framework versions", "- PEFT ", "## Training procedure", "The following `bitsandbytes` quantization")


def without_template(edits: CardEdits, adapter: SavedAdapter) -> CardEdits:
    """Edits of a card without peft's blank template and the metadata that peft puts in place of others."""
    items = edits.items
    for name in ("above", "below"):
        if is_template(items.get(name, "")) and items.pop(name, None):
            items.pop(f"{META}library_name", None)
    if not adapter.is_ours and are_peft_tags(items.get(f"{META}tags"), adapter):
        del items[f"{META}tags"]
    if items.get(f"{META}base_model") in ("", adapter.config.base_model_name_or_path):
        items.pop(f"{META}base_model", None)
    return edits


def are_peft_tags(tags: object, adapter: SavedAdapter) -> bool:
    """Whether tags are the ones that peft writes in place of all others."""
    tags = tags if isinstance(tags, list) else []
    always = "lora" if adapter.method == "lora" else "base_model:adapter:"
    stock = all(TAG.fullmatch(str(tag)) for tag in tags)  # a card of this package has the tag "peft"
    return stock and any(str(tag).startswith(always) for tag in tags)


def is_template(text: str) -> bool:
    """Whether a text is the template as peft saves it, with nothing filled in."""
    return all(line in template_lines() or line.startswith(LINES) for line in text.split("\n"))


@cache
def template_lines() -> frozenset[str]:
    """The lines of huggingface_hub's blank card."""
    return frozenset(ModelCard.from_template(ModelCardData()).text.split("\n"))
