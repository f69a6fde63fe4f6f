"""A card that is written again, against what its author did to it in between."""

import re
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard, ModelCardData

from hf_peft_ext.hub_cards import Result, TrainingRecord, write_card
from hf_peft_ext.hub_cards.card_edits import BEGIN, COMMENT, item_digest, split

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


def without(comments):
    return COMMENT.sub("", comments)


edited = pytest.warns(UserWarning, match=r"The generated section of .*README.md was edited")


# The text


@pytest.mark.parametrize(("above", "below"), [(OWN, ""), ("", OWN), (OWN, f"## Limits\n\n\n{OWN}\n\n    code")])
def test_text_outside_the_section_stays(folder, above, below):
    """Above, below or both, as it is written, twice over, while the results are renewed."""
    edit(folder, (BEGIN, f"{above}\n\n{BEGIN}"))
    (folder / "README.md").write_text(f"{(folder / 'README.md').read_text()}\n{below}\n")
    for accuracy in (0.9, 0.95):
        text = trained_again(folder, accuracy)
        assert f"| {accuracy} |" in text
        assert f"\n\n{above}\n\n{BEGIN}\n\n# UniPELT adapter" in text if above else f"---\n\n{BEGIN}" in text
        assert text.endswith(f" -->\n\n{below}\n" if below else " -->\n")


@pytest.mark.parametrize("place", ["## Use", "```python", "| metric |", "## Method", "```bibtex"])
def test_paragraphs_added_inside_the_section_move_below_it(folder, place):
    """With a warning; the section is whole again, and the next renewal changes nothing."""
    before = edit(folder, (place, f"\n\n{OWN}\n\n{place}"))
    with edited:
        text = write_card(folder).read_text()
    assert before.replace(f"\n\n{OWN}\n\n{place}", place).split(" -->")[0] in text
    assert text.endswith(f" -->\n\n{OWN}\n")
    assert write_card(folder).read_text() == text


def test_changed_paragraphs_and_titles_are_kept(folder):
    """A changed paragraph is kept below what is generated, a title above it and in place of the generated one."""
    edit(folder, ("A [peft](https://github.com/huggingface/peft) adapter", "My best adapter"), ("# UniPELT", "# My"))
    with edited:
        trained_again(folder)
    text = trained_again(folder, 0.95)
    assert text.count("My best adapter: 3,507 parameters") == text.count("A [peft]") == 1
    assert text.index("# My adapter") < text.index("A [peft]") < text.index("My best adapter")
    assert "# UniPELT adapter" not in text
    assert "| `accuracy` | `nyu-mll/glue` | `validation` | 0.95 |" in text


def test_deleted_paragraphs_are_written_again(folder):
    edit(folder, ("Classes, in order: `refund`, `lost card`, `other`.\n\n", ""))
    with edited:
        assert "Classes, in order" in write_card(folder).read_text()


def test_a_section_changes_with_the_record(tmp_path):
    """It is that of a card written at once, and the first one's when the measurements are gone."""
    saved(tmp_path, "unipelt")
    before = write_card(tmp_path).read_text()
    full_record().save(tmp_path)
    later = write_card(tmp_path).read_text()
    (tmp_path / "README.md").unlink()
    assert write_card(tmp_path).read_text() == later
    (tmp_path / "training_record.json").unlink()
    assert without(write_card(tmp_path).read_text()) == without(before)


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
    with edited:
        assert trained_again(folder).endswith(f" -->\n\n{block}\n")


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
            '"section":',
            '"sections":',
            r"The comments around the generated section of the card \(README.md\) were changed",
        ),
        (f"{BEGIN}\n", "", r"The comments around the generated section of the card \(README.md\) were changed"),
        (
            "<!-- hf_peft_ext end of",
            "<!-- end of",
            r"The comments around the generated section .* were changed; restore",
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
    """Its comment can be untrusted: other files that it names are not touched, and odd values do no harm."""
    other = folder.parent / "other.txt"
    other.write_text("mine")
    edit(folder, ('"files":{', f'"files":{{"figures/gates.png":[],"../other.txt":"{item_digest(b"mine".hex())}",'))
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
        assert card.text.startswith(f"\n# Mine\n\n{OWN}\n\n{BEGIN}\n\nA [peft]")
        assert card.text.count("\n# ") == card.text.count("## Use") == 1
        assert (card.data.license, card.data.library_name) == ("mit", "peft")


def test_a_card_without_its_comments(folder):
    """All of its text is the author's then, and is kept above a new section."""
    path = folder / "README.md"
    path.write_text(without(path.read_text()).replace("| 0.8", "| 0.7"))
    own = path.read_text().split("---\n", 2)[2].strip()
    text = write_card(folder).read_text()
    assert f"---\n\n{own}\n\n{BEGIN}\n\nA [peft]" in text


def test_forged_comments(folder):
    """Comments of a section inside the section, as in a command of somebody else's, end nothing."""
    record = TrainingRecord.load(folder)
    forged = (folder / "README.md").read_text().split("\n")[-2]
    record.command = f"run\n{forged}\n\n{BEGIN}\n\nhidden"
    record.save(folder)
    text = write_card(folder).read_text()
    assert text.count(forged) == 1
    assert write_card(folder).read_text() == text
    record.command = None
    record.save(folder)
    assert "hidden" not in write_card(folder).read_text()


@pytest.mark.parametrize("name", ["unipelt", "lora"])
def test_saving_again_over_a_card(tmp_path, name):
    """peft writes its own metadata over what is there; the author's text stays, and so does what we wrote."""
    model = saved(tmp_path, name)
    first = write_card(tmp_path, model).read_text()
    edit(tmp_path, (BEGIN, f"{OWN}\n\n{BEGIN}"))
    model.save_pretrained(tmp_path, save_embedding_layers=False)  # or it asks the Hub for the base model
    assert write_card(tmp_path).read_text() == first.replace(BEGIN, f"{OWN}\n\n{BEGIN}", 1)


# Two cards of one adapter


def test_edits_on_the_hub_and_here_are_both_kept(folder):
    """Both started from the same card; what each added, changed or deleted since holds in the end, and later too."""
    there = edit(folder)
    there = there.replace(BEGIN, f"{OWN}\n\n{BEGIN}").replace("license: apache-2.0", "license: mit")
    edit(folder, (BEGIN, f"Here.\n\n{BEGIN}"), ("- support\n", "- here\n"))
    for published in (there, None, None):
        record = TrainingRecord.load(folder)
        record.results = [Result("accuracy", 0.9)]
        record.save(folder)
        text = write_card(folder, published=published).read_text()
        assert f"---\n\n{OWN}\n\nHere.\n\n{BEGIN}" in text
        assert "| `accuracy` | 0.9 |" in text
        data = ModelCard(text).data
        assert data.license == "mit"
        assert "here" in data.tags
        assert "support" not in data.tags


def pushed(folder):
    """The card of a folder after its first push, here and on the Hub."""
    return write_card(folder, published="").read_text()


def test_the_side_that_changed_a_text_wins(folder):
    """After a push, a text or a field that one side alone has changed is that side's; a deleted one is gone."""
    edit(folder, (BEGIN, f"Above.\n\n{BEGIN}"), ("license: apache-2.0", "license: mit"), ("- en\n", "- de\n"))
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nBelow.\n")
    there = pushed(folder).replace("Above.", "Above, there.").replace("- de\n", "- fr\n")
    edit(folder, ("\nBelow.\n", ""), ("license: mit", "license: bsd"))
    text = write_card(folder, published=there).read_text()
    assert f"---\n\nAbove, there.\n\n{BEGIN}" in text
    assert "Below." not in text
    data = ModelCard(text).data
    assert (data.license, data.language) == ("bsd", ["fr"])


def test_a_text_that_both_sides_changed(folder):
    """A paragraph that both sides had is changed on the Hub, another is deleted here, a third is added here."""
    edit(folder, (BEGIN, f"One.\n\nTwo.\n\n{BEGIN}"))
    there = pushed(folder).replace("One.", "One, there.")
    edit(folder, ("Two.\n\n", "Three.\n\n"))
    text = write_card(folder, published=there).read_text()
    assert f"---\n\nOne, there.\n\nThree.\n\n{BEGIN}" in text


def test_a_push_that_failed_is_tried_again(folder):
    """What was changed here before or after the failure is not doubled by what the Hub still has."""
    edit(folder, (BEGIN, f"One.\n\nTwo.\n\n{BEGIN}"))
    there = pushed(folder)
    for old, new in (("One.", "1."), ("Two.", "2.")):
        edit(folder, (old, new))
        text = write_card(folder, published=there).read_text()
    assert f"---\n\n1.\n\n2.\n\n{BEGIN}" in text


def test_edits_inside_the_section_on_the_hub_are_kept(folder):
    there = edit(folder).replace("## Use", f"{OWN}\n\n## Use")
    with edited:
        assert write_card(folder, published=there).read_text().endswith(f" -->\n\n{OWN}\n")


def test_another_repository_deletes_nothing(folder):
    """A card pushed to one repository keeps its author's text in a push to another, whose card has none."""
    other = edit(folder)
    edit(folder, (BEGIN, f"{OWN}\n\n{BEGIN}"))
    pushed(folder)
    assert OWN in write_card(folder, published=other).read_text()


def test_a_folder_that_knows_nothing_of_the_hub_deletes_nothing(folder, tmp_path_factory):
    """Saved into a new folder and pushed: the card on the Hub keeps what its author wrote."""
    edit(folder, (BEGIN, f"{OWN}\n\n{BEGIN}"), ("license: apache-2.0", "license: mit"))
    there = pushed(folder)
    fresh = tmp_path_factory.mktemp("unipelt")
    saved(fresh, "unipelt")
    text = write_card(fresh, published=there).read_text()
    assert f"\n\n{OWN}\n\n{BEGIN}" in text
    assert "license: mit" in text
    assert "## Results" not in text  # generated anew, from this folder


def test_a_first_card_on_the_hub(folder):
    """The Hub's own first README, with the licence that was chosen there."""
    text = write_card(folder, published="---\nlicense: mit\n---\n").read_text()
    assert "license: mit" in text
    assert text.count("## Use") == 1


def test_split():
    """huggingface_hub's own template, part by part, is whole again; fenced blocks are one part."""
    text = ModelCard.from_template(ModelCardData()).text
    assert "\n\n".join(split(text)).split() == text.split()
    assert split("a\n\n```\n\nb\n```\nc\n\n\n d") == ["a", "```\n\nb\n```\nc", " d"]
