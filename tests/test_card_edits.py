"""A card that is written again, against what its author did to it in between."""

import re
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard, ModelCardData

from hf_peft_ext.hub_cards import Result, TrainingRecord, write_card
from hf_peft_ext.hub_cards.merge import COMMENT, Version, digest, merge, split

from .cards import full_record, saved

OWN = "Ask me before you use it for anything serious."


@pytest.fixture
def folder(tmp_path):
    """An adapter with its card."""
    saved(tmp_path, "unipelt")
    replace(full_record(), gates={}, history=[]).save(tmp_path)  # figures take time
    write_card(tmp_path)
    return tmp_path


def edit(folder, *changes):
    """What an author does in an editor."""
    text = (folder / "README.md").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    (folder / "README.md").write_text(text)
    return text


def trained_again(folder, accuracy=0.9):
    """The same run with other numbers."""
    record = TrainingRecord.load(folder)
    record.results = [Result("accuracy", accuracy, dataset="nyu-mll/glue", split="validation")]
    record.save(folder)
    return write_card(folder).read_text()


def without(comment):
    return COMMENT.sub("", comment)


# The text


@pytest.mark.parametrize(
    "place",
    [
        "# UniPELT adapter",
        "## Use",
        "```python",
        "| metric |",
        "## Method",
        "| bottleneck |",
        "- Trainer",
        "```bibtex",
    ],
)
def test_a_paragraph_anywhere_stays_where_it_is(folder, place):
    """In front of any line, twice over, while the results are renewed."""
    edit(folder, (place, f"\n\n{OWN}\n\n{place}"))
    for accuracy in (0.9, 0.95):
        text = trained_again(folder, accuracy)
        assert text.count(OWN) == 1
        assert text.index(OWN) < text.index(place)
        assert f"\n\n{OWN}\n\n{place}" in text


def test_a_changed_paragraph_stays_changed(folder):
    edit(folder, ("A [peft](https://github.com/huggingface/peft) adapter", "My best adapter"))
    for _ in range(2):
        text = trained_again(folder)
        assert text.count("My best adapter: 3,507 parameters") == 1
        assert "A [peft]" not in text
        assert "| `accuracy` | `nyu-mll/glue` | `validation` | 0.9 |" in text


def test_a_deleted_part_stays_away(folder):
    edit(folder, ("Classes, in order: `refund`, `lost card`, `other`.\n\n", ""), ("## Citation\n\n", ""))
    for _ in range(2):
        text = trained_again(folder)
        assert "Classes, in order" not in text
        assert "## Citation" not in text


def test_parts_that_are_moved_are_renewed_where_they_are(folder):
    table = re.search(r"## Results\n\n(?:\|.*\n)+\n", edit(folder))[0]
    edit(folder, (table, ""), ("## Use\n", f"{table}## Use\n"))
    text = trained_again(folder)
    assert text.index("| 0.9 |") < text.index("## Use")
    assert text.count("## Results") == 1


def test_what_is_measured_later_is_put_in_its_place(tmp_path):
    """Behind what precedes it in a card that is written at once, and gone when it is measured no more."""
    saved(tmp_path, "unipelt")
    before = write_card(tmp_path).read_text()
    full_record().save(tmp_path)
    later = write_card(tmp_path).read_text()
    (tmp_path / "README.md").unlink()
    assert without(write_card(tmp_path).read_text()).split("---\n", 2)[2] == without(later).split("---\n", 2)[2]
    (tmp_path / "training_record.json").unlink()
    after = write_card(tmp_path).read_text()
    assert without(after).split() == without(before).split()


def test_results_that_come_back_are_shown_again(folder):
    """Only what the author deletes stays away."""
    record = TrainingRecord.load(folder)
    record.results = []
    record.save(folder)
    assert "## Results" not in write_card(folder).read_text()
    assert "| 0.9 |" in trained_again(folder)


def test_windows_line_endings(folder):
    """An editor that turns every line's ending has edited nothing."""
    path = folder / "README.md"
    text = path.read_text()
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert write_card(folder).read_bytes() == text.encode()


def test_fences_are_whole(folder):
    """An author's code block keeps its blank lines and whatever looks like a part of the card."""
    block = "~~~~\n# Title\n\n\n```\n---\n\n~~~\nend\n~~~~"
    edit(folder, ("## Use", f"{block}\n\n## Use"))
    assert f"\n\n{block}\n\n## Use" in trained_again(folder)


# Metadata


def test_metadata_of_the_author_stays(folder):
    """A licence changed, a key added, a tag added and one taken away; the rest is renewed."""
    edit(
        folder,
        ("license: apache-2.0", "license: mit\nco2_eq_emissions:\n  emissions: 3"),
        ("- support\n", "- mine\n"),
        ("pipeline_tag: text-classification\n", ""),
    )
    for accuracy in (0.9, 0.95):
        data = ModelCard(trained_again(folder, accuracy)).data.to_dict()
        assert (data["license"], data["co2_eq_emissions"]) == ("mit", {"emissions": 3})
        assert set(data["tags"]) >= {"mine", "peft", "hf_peft_ext"}
        assert "support" not in data["tags"]
        assert "pipeline_tag" not in data
        assert data["model-index"][0]["results"][0]["metrics"][0]["value"] == accuracy
        assert data["metrics"] == ["accuracy"]


@pytest.mark.parametrize("left", ["", "tags: []\n", "tags:\n- transformers\n"])
def test_tags_that_were_taken_away_stay_away(folder, left):
    """All of them, or all but one that peft itself writes too."""
    block = re.search(r"tags:\n(- .*\n)+", edit(folder))
    edit(folder, (block[0], left))
    for accuracy in (0.9, 0.95):
        tags = ModelCard(trained_again(folder, accuracy)).data.tags
        assert tags == (["transformers"] if "transformers" in left else None)


def test_wrong_metadata_of_the_author_is_an_error(folder):
    text = edit(folder, ("license: apache-2.0", "license: Apache"))
    with pytest.raises(ValueError, match=r"`license` \(='Apache'\)"):
        write_card(folder)
    assert (folder / "README.md").read_text() == text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("license: apache-2.0", "license: [", r"The metadata of the card \(README.md\) is not valid YAML"),
        (
            "unless you change it: {",
            "unless you change it: ",
            r"The last comment of the card \(README.md\) was changed",
        ),
        ("  results:", "  resolts:", "Invalid `model_index`"),
    ],
)
def test_what_cannot_be_read_is_an_error(folder, old, new, message):
    text = edit(folder, (old, new))
    with pytest.raises(ValueError, match=message):
        write_card(folder)
    assert (folder / "README.md").read_text() == text


# Files


def test_files_of_the_author_stay(folder):
    """A recipe and a figure that were changed are left alone; the other figure is drawn anew."""
    full_record().save(folder)
    write_card(folder)
    (folder / "recipe.yaml").write_text("mine: true  # with a comment\n")
    (folder / "figures" / "gates.png").write_bytes(b"drawn by hand")
    (folder / "figures" / "losses.png").unlink()
    for _ in range(2):
        trained_again(folder)
        assert (folder / "recipe.yaml").read_text() == "mine: true  # with a comment\n"
        assert (folder / "figures" / "gates.png").read_bytes() == b"drawn by hand"
        assert (folder / "figures" / "losses.png").exists()


def test_files_that_no_card_has_written_are_the_author_s(tmp_path):
    """A recipe and a figure that lay there before the first card; the other figure is drawn."""
    saved(tmp_path, "unipelt")
    full_record().save(tmp_path)
    (tmp_path / "figures").mkdir()
    (tmp_path / "recipe.yaml").write_text("mine: true  # with a comment\n")
    (tmp_path / "figures" / "gates.png").write_bytes(b"drawn by hand")
    for _ in range(2):
        trained_again(tmp_path)
        assert (tmp_path / "recipe.yaml").read_text() == "mine: true  # with a comment\n"
        assert (tmp_path / "figures" / "gates.png").read_bytes() == b"drawn by hand"
        assert (tmp_path / "figures" / "losses.png").exists()
    TrainingRecord().save(tmp_path)
    write_card(tmp_path)
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["gates.png"]


def test_a_card_names_no_other_files(folder):
    """Its comment can be a stranger's: files that it names besides are not touched."""
    other = folder.parent / "other.txt"
    other.write_text("mine")
    forged = f'"generated":{{"file:../other.txt":"{digest(b"mine".hex())}",'
    edit(folder, ('"generated":{', forged))
    write_card(folder)
    assert other.read_text() == "mine"


# Cards that others wrote


def test_blank_template_is_replaced(tmp_path):
    """What peft leaves when it saves is nobody's text."""
    saved(tmp_path, "lora")
    assert "[More Information Needed]" in (tmp_path / "README.md").read_text()
    fresh = write_card(tmp_path).read_text()
    (tmp_path / "README.md").unlink()
    assert write_card(tmp_path).read_text() == fresh


def test_a_template_that_was_filled_in_is_kept(tmp_path):
    saved(tmp_path, "lora")
    edit(tmp_path, ("Use the code below", "Use my code below"))
    text = write_card(tmp_path).read_text()
    assert text.index("## Bias, Risks") < text.index("Use my code below") < text.index("from peft import PeftModel")


def test_a_card_by_hand_is_kept_in_front(tmp_path):
    """With its title and its metadata; what is generated follows, once."""
    saved(tmp_path, "unipelt")
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\n---\n# Mine\n\n{OWN}\n")
    for _ in range(2):
        card = ModelCard(write_card(tmp_path).read_text())
        assert card.text.startswith(f"\n# Mine\n\n{OWN}\n\nA [peft]")
        assert card.text.count("\n# ") == card.text.count("## Use") == 1
        assert (card.data.license, card.data.library_name) == ("mit", "peft")


def test_a_card_without_its_comment(folder):
    """Nothing is doubled that still stands as it would be written."""
    path = folder / "README.md"
    path.write_text(without(path.read_text()))
    text = write_card(folder).read_text()
    assert text.count("## Method") == text.count("| metric |") == 1


@pytest.mark.parametrize("name", ["unipelt", "lora"])
def test_saving_again_over_a_card(tmp_path, name):
    """peft writes its own metadata over what is there; the author's text stays, and so does what we wrote."""
    model = saved(tmp_path, name)
    first = write_card(tmp_path, model).read_text()
    edit(tmp_path, ("## Use", f"{OWN}\n\n## Use"))
    model.save_pretrained(tmp_path, save_embedding_layers=False)  # or it asks the Hub for the base model
    text = write_card(tmp_path).read_text()
    assert without(text) == without(first).replace("## Use", f"{OWN}\n\n## Use", 1)


# Two cards of one adapter


def test_edits_on_the_hub_and_here_are_both_kept(folder):
    """Both started from the same card; what each added, changed or deleted since holds in the end, and later too."""
    there = edit(folder)
    there = there.replace("## Use", f"{OWN}\n\n## Use").replace("license: apache-2.0", "license: mit")
    there = there.replace("Classes, in order: `refund`, `lost card`, `other`.\n\n", "")
    edit(folder, ("## Method", "Here.\n\n## Method"), ("- support\n", "- here\n"))
    for published in (there, None, None):
        record = TrainingRecord.load(folder)
        record.results = [Result("accuracy", 0.9)]
        record.save(folder)
        text = write_card(folder, published=published).read_text()
        assert f"\n\n{OWN}\n\n## Use" in text
        assert "\n\nHere.\n\n## Method" in text
        assert "Classes, in order" not in text
        assert "| `accuracy` | 0.9 |" in text
        data = ModelCard(text).data
        assert data.license == "mit"
        assert "here" in data.tags
        assert "support" not in data.tags


def test_edits_that_were_pushed_can_be_edited_on_both_sides(folder):
    """An author's paragraph that both sides have is changed on the Hub, another is deleted here."""
    edit(folder, ("## Use", "One.\n\nTwo.\n\n## Use"))
    there = write_card(folder).read_text().replace("One.", "One, on the Hub.")
    edit(folder, ("Two.\n\n", ""))
    text = write_card(folder, published=there).read_text()
    assert "\n\nOne, on the Hub.\n\n## Use" in text
    assert "One.\n" not in text
    assert "Two." not in text


def test_a_folder_that_knows_nothing_of_the_hub_deletes_nothing(folder, tmp_path_factory):
    """Saved into a new folder and pushed: the card on the Hub keeps what its author wrote."""
    edit(folder, ("## Use", f"{OWN}\n\n## Use"), ("license: apache-2.0", "license: mit"))
    there = write_card(folder).read_text()
    fresh = tmp_path_factory.mktemp("unipelt")
    saved(fresh, "unipelt")
    text = write_card(fresh, published=there).read_text()
    assert f"\n\n{OWN}\n\n## Use" in text
    assert "license: mit" in text
    assert "## Results" not in text  # what was generated is generated anew, from this folder


def test_a_first_card_on_the_hub(folder):
    """The Hub's own first README, with the licence that was chosen there."""
    text = write_card(folder, published="---\nlicense: mit\n---\n").read_text()
    assert "license: mit" in text
    assert text.count("## Use") == 1


# The merge itself


def test_merge():
    """Item by item: untouched, changed, added and deleted, on either side."""
    before = {name: Version.of({}, {name: text}).generated[name] for name, text in zip("abcd", "ABCD", strict=True)}
    current = {"a": "A", "b": "B!", "x": "X", "d": "D"}  # b changed, c deleted, x added
    new = {"n": "N", "a": "A2", "b": "B2", "c": "C2", "m": "M"}  # d gone, n and m new
    assert merge(current, before, new) == {"n": "N", "a": "A2", "b": "B!", "m": "M", "x": "X"}


def test_split_and_template():
    """huggingface_hub's own template, part by part, is whole again."""
    text = ModelCard.from_template(ModelCardData()).text
    assert "\n\n".join(split(text)).split() == text.split()
    assert split("a\n\n```\n\nb\n```\nc\n\n\n d") == ["a", "```\n\nb\n```\nc", " d"]
