"""The card of an adapter: README.md, written from the adapter's files and from its training record."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftConfig, PeftModel

from .record import TrainingRecord


class AdapterCard(ModelCard):
    """The card of a saved adapter."""


def write_card(folder: str | Path, model: PeftModel | None = None, *, repo_id: str | None = None) -> Path:
    """Write README.md, figures/*.png and recipe.yaml into an adapter's folder, keeping what its author has edited.

    Args:
        folder: a saved adapter, with or without a training record.
        model: the model that was saved, for what the files do not tell.
        repo_id: the repository on the Hub that the card is for; its loading snippet names it.

    Returns:
        The path of the card.
    """
    folder = Path(folder)
    config = PeftConfig.from_pretrained(str(folder))
    record = TrainingRecord.load(folder) or TrainingRecord()
    data = ModelCardData(library_name="peft", license=record.license, language=record.language or None)
    card = AdapterCard(f"---\n{data.to_yaml()}\n---\n\n# {config.peft_type} adapter\n")
    path = folder / "README.md"
    card.save(path)
    return path
