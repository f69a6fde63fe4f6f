"""Memory of GPUs by name."""

from hf_peft_ext.validation.checks import check
from hf_peft_ext.validation.suggestions import did_you_mean

# GiB that torch sees on a card, rounded down.
CARDS = {
    "T4": 14,
    "V100-16GB": 15,
    "V100-32GB": 31,
    "A10": 22,
    "L4": 22,
    "RTX-3090": 23,
    "RTX-4090": 23,
    "RTX-5090": 31,
    "A100-40GB": 39,
    "L40S": 44,
    "A6000": 47,
    "A100-80GB": 79,
    "H100": 79,
    "H200": 139,
    "B200": 178,
}


def card_bytes(card: str | int) -> int:
    """Bytes of a card.

    Args:
        card: a name of `CARDS`, a size such as "24GiB", or a number of bytes.

    Raises:
        ValueError: there is no such card, or it has no memory.
    """
    if isinstance(card, str):
        by_name = {name.lower(): size for name, size in CARDS.items()}
        name = card.strip().lower().replace(" ", "-")
        if name in by_name:
            return by_name[name] * 2**30
        number = name.removesuffix("gib").strip("-")
        if name.endswith("gib") and number.replace(".", "", 1).isdigit() and float(number) > 0:
            return int(float(number) * 2**30)
        hint = did_you_mean(card.strip(), CARDS) or "."
        raise ValueError(f"`card` (={card!r}) must be one of {', '.join(CARDS)}, a size such as 24GiB, or bytes{hint}")
    check("card", card, type(card) is int and card > 0, "must be a positive number of bytes")
    return card
