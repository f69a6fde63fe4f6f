"""Retention: the loss on general text with the adapter, against the base model's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hf_peft_ext.validation.checks import check

GENERAL_TEXT = (
    "The river rises in the hills to the north and reaches the sea near a small fishing town.",
    "Most of the village was rebuilt after the fire, but the old bridge is still in use.",
    "Water boils at a lower temperature in the mountains because the air pressure is lower there.",
    "She opened the letter, read it twice, and put it back into the drawer without a word.",
    "The committee will meet again on Thursday to discuss the budget for the coming year.",
    "Plants take in carbon dioxide and give off oxygen when they are exposed to light.",
    "To replace the battery, remove the two screws on the back and lift the cover carefully.",
    "The train was late again, so we walked along the platform and talked about the holidays.",
    "In the second half the visitors scored twice within five minutes and won the match.",
    "Heat the oil in a pan, add the onions, and stir until they are soft and golden.",
    "A triangle with sides of three, four and five units has a right angle.",
    "The museum is open every day except Monday, and children under twelve pay nothing.",
)


def read_texts(source: str | Path | Sequence[str] | None) -> list[str]:
    """The texts of an argument: of a file, one on each line; of a list; the sentences of this package for None.

    Raises:
        ValueError: the file does not exist, or there is no text.
    """
    if source is None:
        return list(GENERAL_TEXT)
    if isinstance(source, str | Path):
        check("general_text", str(source), Path(source).is_file(), "must be a file with a text on each line")
        texts = Path(source).read_text(encoding="utf-8").splitlines()
    else:
        texts = list(source)
    texts = [text.strip() for text in texts if text.strip()]
    check("general_text", str(source), bool(texts), "must hold at least one text")
    return texts


@torch.no_grad()
def text_loss(model: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    """The mean loss of a token of the texts, in nats.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        texts: the texts; each is cut to 512 tokens.

    Raises:
        ValueError: no text has two tokens.
    """
    was_training = model.training
    model.eval()
    device, losses, tokens = next(model.parameters()).device, 0.0, 0
    for text in texts:
        batch = tokenizer(text, return_tensors="pt", truncation=True, max_length=512).to(device)
        predicted = batch["input_ids"].shape[1] - 1
        if predicted > 0:
            output = model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["input_ids"]
            )
            losses, tokens = losses + predicted * output.loss.item(), tokens + predicted
    model.train(was_training)
    check("general_text", texts[0], tokens > 0, "must hold texts of at least two tokens")
    return losses / tokens
