"""The card of an adapter: README.md, written from the adapter's files and from its training record."""

import re
from collections.abc import Mapping
from pathlib import Path

import yaml
from huggingface_hub import ModelCard
from peft import PeftModel

from hf_peft_ext.hub_cards import figures
from hf_peft_ext.hub_cards.markdown import plain
from hf_peft_ext.hub_cards.merge import Version, digest, read_text, split
from hf_peft_ext.hub_cards.metadata import card_data, check_metadata
from hf_peft_ext.hub_cards.peft_template import without_stock
from hf_peft_ext.hub_cards.places import shared_recipe
from hf_peft_ext.hub_cards.record import TrainingRecord
from hf_peft_ext.hub_cards.saved_adapter import SavedAdapter
from hf_peft_ext.hub_cards.sections import values
from hf_peft_ext.hub_cards.told import told_by
from hf_peft_ext.validation.checks import check, is_hub_id

FILE, RECIPE = "README.md", "recipe.yaml"
FILES = (figures.GATES, figures.LOSSES, RECIPE)
BESIDE = "file:"  # in front of the names of files in the comment of a card
NAME = re.compile(r"\A<!-- ([a-z.]+) -->\n")  # in front of each block of the template


class AdapterCard(ModelCard):
    """The card of a saved adapter: what it is, how to load it, how it was made and what it is worth.

    It says what is known and nothing else. Names, labels and commands that come with data stay text in it, whatever
    they look like.
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
        """The card of an adapter's folder as it is generated, without anybody's edits.

        Args:
            folder: a saved adapter.
            record: how it was trained; what the folder holds by default.
            repo_id: the repository on the Hub that the card is for; its loading snippet names it.
            subfolder: where in the repository the adapter lies; None for the repository itself.

        Raises:
            ValueError: the folder holds no adapter, `repo_id` is none, or the record has metadata that the Hub does
                not take.
        """
        rule = "must be an id on the Hub, such as 'name/adapter'"
        check("repo_id", repo_id, repo_id is None or is_hub_id(repo_id), rule)
        adapter = SavedAdapter(folder)
        record = record or TrainingRecord.load(folder) or TrainingRecord()
        data = card_data(adapter, record, repo_id or plain(adapter.folder.resolve().name))
        card = cls.from_template(data, **values(adapter, record, repo_id, subfolder))
        parts = [NAME.split(block) for block in split(card.text)]  # ["", name, block]
        return cls.of(Version.of(card.data.to_dict(), {name: block for _, name, block in parts}))

    @classmethod
    def of(cls, version: Version) -> "AdapterCard":
        return cls(version.content())


def write_card(
    folder: str | Path,
    model: PeftModel | None = None,
    *,
    repo_id: str | None = None,
    subfolder: str | None = None,
    published: str | None = None,
) -> Path:
    """Write README.md, figures and recipe.yaml into an adapter's folder, keeping what its author has edited.

    What is still as it was written last is renewed; what the author has changed, added or deleted stays so:
    paragraphs, tables, entries of the metadata. So do figures and a recipe.yaml that were changed, or that were not
    written here with a card. Delete README.md and those files to have all of it written anew.

    Args:
        folder: a saved adapter, with or without a training record.
        model: the model that was saved; what it tells beyond its files is noted in the record.
        repo_id: the repository on the Hub that the card is for; its loading snippet names it.
        subfolder: where in the repository the adapter lies; None for the repository itself.
        published: the card that is on the Hub now, for the edits that were made there.

    Returns:
        The path of the card.

    Raises:
        ValueError: the folder holds no adapter, or the metadata of the record or of the author are none that the Hub
            takes, or a card cannot be read; the message says so where that is the one on the Hub. Nothing is written
            then.
    """
    folder = Path(folder)
    record = found = TrainingRecord.load(folder) or TrainingRecord()
    if model is not None:
        record = told_by(model, found)
    adapter = SavedAdapter(folder)
    version = Version.read(AdapterCard.from_adapter(folder, record, repo_id=repo_id, subfolder=subfolder).content)
    path = folder / FILE
    if path.exists():
        version = without_stock(Version.read(read_text(path)), adapter).renewed(version)
    if published is None:
        check_card(version)
    else:
        here = version
        try:
            version = without_stock(Version.read(published), adapter).joined(here)
            check_card(version)
        except ValueError as error:
            check_card(here)
            raise on_the_hub(error, "/".join(filter(None, (repo_id, subfolder))) or "this adapter") from error
    if record != found:
        record.save(folder)
    made = figures.draw(record)
    if record.recipe:
        made[RECIPE] = shared_recipe(record.recipe)
    files = write_files(folder, made, file_hashes(version))
    version.generated = {name: hash for name, hash in version.generated.items() if not name.startswith(BESIDE)}
    version.generated |= {BESIDE + name: hash for name, hash in files.items()}
    written = folder / f".{FILE}"  # whole or not at all: half a card would be taken for its author's
    written.write_text(version.content(), encoding="utf-8", newline="\n")
    written.replace(path)
    return path


def on_the_hub(error: ValueError, place: str) -> ValueError:
    return ValueError(f"In the card of {place} on the Hub: {error}")


def check_card(version: Version) -> None:
    """Refuse metadata of an author, their model-index included, that the Hub would refuse."""
    check_metadata(version.metadata)
    AdapterCard.of(version)


def write_files(folder: Path, made: Mapping[str, bytes], before: Mapping[str, str]) -> dict[str, str]:
    """Write the files beside a card, but for its author's; remove those that are made no more.

    Args:
        folder: the adapter's.
        made: name -> content.
        before: name -> hash of the files as they were written last; one that has another hash, or none, is the
            author's.

    Returns:
        The hashes of the files as they are written now.
    """
    hashes: dict[str, str] = {}
    for name in FILES:  # by name: the state stands in the card, which can be a stranger's
        path, new = folder / name, made.get(name)
        there = path.exists()
        if there and before.get(name) not in digests(path) and path.read_bytes() != new:
            hashes |= {name: before[name]} if name in before else {}
        elif new is not None:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(new)
            hashes[name] = digest(new.hex())
        elif there:
            path.unlink()
    return hashes


def file_hashes(version: Version) -> dict[str, str]:
    """Name -> hash of the files beside a card, as they were written with it."""
    found = version.generated.items()
    return {name.removeprefix(BESIDE): hash for name, hash in found if name.startswith(BESIDE)}


def is_as_written(path: Path) -> bool:
    """Whether a file beside a card is as the card's last renewal wrote it, so that replacing it loses nobody's work.

    Not so where a card is missing or cannot be read: then nobody knows.
    """
    try:
        before = file_hashes(Version.read(read_text(path.parent / FILE)))
    except (FileNotFoundError, ValueError):
        return False
    return before.get(path.name) in digests(path)


def digests(path: Path) -> set[str]:
    """The hashes by which a file beside a card is known: of its content, and of a recipe without its local paths.

    A card writes the recipe without them; then `hf-peft-ext train` writes the one that repeats the run. A recipe with
    comments, or laid out in another way, is its author's.
    """
    content = path.read_bytes()
    known = {digest(content.hex())}
    if path.name == RECIPE:
        try:
            recipe = yaml.safe_load(content)
        except (yaml.YAMLError, UnicodeDecodeError):
            return known
        if yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).encode() == content:
            known.add(digest(shared_recipe(recipe).hex()))
    return known
