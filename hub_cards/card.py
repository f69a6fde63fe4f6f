"""The card of an adapter: README.md, generated from the adapter's files and its training record."""

import warnings
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft import PeftModel

from hf_peft_ext.hub_cards import figures
from hf_peft_ext.hub_cards.card_edits import CardEdits, read_text
from hf_peft_ext.hub_cards.card_files import CARD, RECIPE, write_files
from hf_peft_ext.hub_cards.markdown import single_line
from hf_peft_ext.hub_cards.metadata import card_data, check_metadata
from hf_peft_ext.hub_cards.peft_template import without_template
from hf_peft_ext.hub_cards.record import TrainingRecord
from hf_peft_ext.hub_cards.redact import shared_recipe
from hf_peft_ext.hub_cards.saved_adapter import SavedAdapter
from hf_peft_ext.hub_cards.sections import values
from hf_peft_ext.validation.checks import check, is_hub_id

EDITED = (
    "The generated section of {} was edited. Changed paragraphs are kept below it (a title above it), and deleted "
    "ones are written again. Write above or below the section."
)


class AdapterCard(ModelCard):
    """The card of a saved adapter: what it is, how to load it, how it was trained and evaluated.

    It contains known facts only. Names, labels and commands from data are escaped, so that nothing in them is markup.
    """

    default_template_path = Path(__file__).parent / "card.md.jinja"

    @classmethod
    def from_adapter(
        cls,
        folder: str | Path,
        record: TrainingRecord | None = None,
        *,
        repo_id: str | None = None,
        subfolder: str | None = None,
    ) -> "AdapterCard":
        """Generate the card of an adapter's folder, without its author's edits.

        Args:
            folder: a saved adapter.
            record: of its training; the folder's by default.
            repo_id: the repository on the Hub that the card is for; its loading snippet names it.
            subfolder: the adapter's folder in the repository; None for the repository itself.

        Raises:
            ValueError: the folder holds no adapter, `repo_id` is invalid, or the Hub would refuse the record's
                metadata.
        """
        record = record or TrainingRecord.load(folder) or TrainingRecord()
        return cls(CardEdits().content(*generate(SavedAdapter(folder), record, repo_id, subfolder)))


def generate(
    adapter: SavedAdapter, record: TrainingRecord, repo_id: str | None = None, subfolder: str | None = None
) -> tuple[dict[str, Any], str]:
    """The metadata and the text of an adapter's card.

    Raises:
        ValueError: `repo_id` is invalid, or the Hub would refuse the record's metadata.
    """
    rule = "must be an id on the Hub, such as 'name/adapter'"
    check("repo_id", repo_id, repo_id is None or is_hub_id(repo_id), rule)
    data = card_data(adapter, record, repo_id or single_line(adapter.folder.resolve().name))
    card = AdapterCard.from_template(data, **values(adapter, record, repo_id, subfolder))
    return card.data.to_dict(), card.text.strip("\n")


def write_card(
    folder: str | Path,
    model: PeftModel | None = None,
    *,
    repo_id: str | None = None,
    subfolder: str | None = None,
    published: str | None = None,
) -> Path:
    """Write README.md, figures and recipe.yaml into an adapter's folder; the author's part of the card stays.

    Generated text is one section between two comments. The text above and below it is the author's, and so are fields
    of the metadata that the author has changed, added or deleted. Paragraphs changed inside the section are moved
    below it, a title above it, with a warning. Figures and a recipe.yaml that were changed, or not written here with
    a card, are the author's too. To have all of them written anew, delete them and README.md.

    Args:
        folder: a saved adapter, with or without a training record.
        model: the model that was saved; class names and quantization are added to the record.
        repo_id: the repository on the Hub that the card is for; its loading snippet names it.
        subfolder: the adapter's folder in the repository; None for the repository itself.
        published: the card that is on the Hub now, whose author's part is kept too.

    Returns:
        The path of the card.

    Raises:
        ValueError: the folder holds no adapter, the Hub would refuse the metadata of the record or the author, or a
            card cannot be read; the message says so if it is the one on the Hub. Nothing is written then.
    """
    folder = Path(folder)
    stored = TrainingRecord.load(folder) or TrainingRecord()
    record = stored if model is None else stored.filled_from(model)
    adapter = SavedAdapter(folder)
    generated = generate(adapter, record, repo_id, subfolder)
    edits = author_part(adapter, published, generated, place="/".join(filter(None, (repo_id, subfolder))))
    if record != stored:
        record.save(folder)
    contents = figures.draw_figures(record) | ({RECIPE: shared_recipe(record.recipe)} if record.recipe else {})
    edits.files = write_files(folder, contents, edits.files)
    written = folder / f".{CARD}"  # then renamed: half a card would be taken for its author's
    written.write_text(edits.content(*generated), encoding="utf-8", newline="\n")
    written.replace(folder / CARD)
    if edits.in_section:
        warnings.warn(EDITED.format(folder / CARD), stacklevel=2)
    return folder / CARD


def author_part(
    adapter: SavedAdapter, published: str | None, generated: tuple[dict[str, Any], str], place: str
) -> CardEdits:
    """The author's part of the card in an adapter's folder and of the published one.

    Args:
        adapter: with or without a card beside it.
        published: the card on the Hub.
        generated: metadata and text.
        place: the adapter on the Hub, for errors; "" if unknown.

    Raises:
        ValueError: a card cannot be read, or the Hub would refuse its metadata.
    """
    path = adapter.folder / CARD
    here = without_template(CardEdits.read(read_text(path)), adapter) if path.exists() else CardEdits()
    if published is None:
        check_card(here, *generated)
        return here
    try:
        edits = here.joined(without_template(CardEdits.read(published), adapter))
        check_card(edits, *generated)
    except ValueError as error:
        check_card(here, *generated)
        raise on_the_hub(error, place or "this adapter") from error
    return edits


def on_the_hub(error: ValueError, place: str) -> ValueError:
    """The error with the adapter on the Hub whose card caused it."""
    return ValueError(f"In the card of {place} on the Hub: {error}")


def check_card(edits: CardEdits, metadata: dict[str, Any], section: str) -> None:
    """Refuse metadata of an author, their model-index included, that the Hub would refuse.

    Raises:
        ValueError: a field is invalid.
    """
    check_metadata(edits.metadata(metadata))
    AdapterCard(edits.content(metadata, section))  # reads the model-index
