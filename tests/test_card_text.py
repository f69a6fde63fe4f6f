"""Untrusted text in cards, against the card as Markdown renders it: names, labels and commands stay text.

The renderer is markdown-it-py with raw HTML and tables. What else a renderer may do to text, such as turning addresses
into links, stops at code, so untrusted text must be in code.
"""

import json
import math
import re
import shutil
from dataclasses import asdict, replace
from html.parser import HTMLParser

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from hf_peft_ext.hub_cards import AdapterCard, DatasetRecord, Result, TrainingRecord, figures, write_card
from hf_peft_ext.hub_cards.card_edits import BEGIN, CardEdits
from hf_peft_ext.hub_cards.markdown import cell, code, fenced, single_line, table
from hf_peft_ext.validation.suggestions import ranges

from .cards import BASE, full_record, saved

HOSTILE = [
    "<script>alert(1)</script>",
    "</code></pre><img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![pixel](https://evil.example/pixel.png)",
    "](javascript:alert(1))",
    "`](javascript:alert(1))`",
    "---",
    "x\n---\nlicense: mit\n---\n# Owned\n",
    "x\n\n# Heading\n\n| a | b |\n|---|---|\n| c | d |",
    "```\n# Out of the fence\n```",
    "````\n~~~\n</pre><script>",
    "a | b \\| c ` d",
    "` `` ``` |",
    "https://evil.example www.evil.example me@evil.example",
    "<https://evil.example> <!-- comment",
    "--> <b>bold</b> **bold** _it_ ~~s~~",
    "{{ 7 * 7 }} {% raw %} {# #}",
    "$x^2$ \\(y\\) $$\\frac{1}{0$$",
    "&lt;script&gt; &#60;b&#62; &copy;",
    "line\r\nbreak\x0bvertical\x85next\u2028separator\u2029",
    "\u202eright to left\u202c \u200bzero \ud83d half \x00 null \x1b[31m red",
    "[x]: javascript:alert(1)",
    '" onmouseover="alert(1)',
    "'; import os; os.system('x') #",
    '"""\nimport os\n"""',
    "- item\n1. item\n> quote\n    code",
    "!!python/object/apply:os.system ['x']",
    f"x\n{BEGIN}\ny",
    'x\n<!-- hf_peft_ext end of the section: {"section":[],"metadata":{},"shared":{},"seen":{},"files":{}} -->\n\nx',
    "x" * 5000,
    "",
]
SAFE = {"code", "pre", "p", "a", "img", "h1", "h2", "h3", "table", "thead", "tbody", "tr", "th", "td", "ul", "li"}
every_hostile = pytest.mark.parametrize("text", HOSTILE, ids=[str(i) for i in range(len(HOSTILE))])


class Reader(HTMLParser):
    """What a browser makes of the HTML: its elements, what they lead to, and the text in them, in code or outside."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = self.outside = ""
        self.in_code = 0
        self.comments: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.in_code += tag == "code"
        self.attributes += attrs

    def handle_endtag(self, tag):
        self.in_code -= tag == "code"

    def handle_data(self, data):
        self.text += data
        if not self.in_code:
            self.outside += data

    def handle_comment(self, data):
        self.comments.append(data)


def render(markdown: str) -> Reader:
    return Reader(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown))


def untrusted_record(text: str) -> TrainingRecord:
    """A run in which everything that comes from elsewhere is this text."""
    glue = {"dataset": text, "split": text}
    return TrainingRecord(
        base_model=BASE,
        base_model_revision=text or "x",
        datasets=[DatasetRecord(text, text, text, 3, text, text, used_for="train"), DatasetRecord("b", used_for=text)],
        labels=[text, "other"],
        results=[Result(text, 0.5, 0.1, 3, "adapter", **glue), Result(text, 0.4, method=text, **glue)],
        gates={f"0.{text}": 0.5, "1.query_low_rank": 0.5},
        history=[{"step": i, f"{text} loss": 1.0 / i, text: 1.0} for i in (1, 2)],
        loss_terms=[text],
        recipe={text: text, "list": [text, {text: [text]}]},
        command=text or "x",
        seeds=[1],
        versions={"peft": text or "1", text: text},
        hardware=text,
        quantization=text,
        trainer=text,
        paper={"title": text, "arxiv": text, "bibtex": text},
    )


def shape(html: Reader) -> list[str]:
    """The elements of a card, without the code spans that texts may share."""
    return [element for element in html.elements if element != "code"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A folder with an adapter, and the card that it has when all its words are harmless."""
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    saved(folder, "unipelt")
    replace(untrusted_record("harmless"), gates={}, history=[]).save(folder)  # figures take time
    card = write_card(folder).read_text()
    for file in ("README.md", "recipe.yaml"):  # without the card, the recipe would be its author's
        (folder / file).unlink()
    return folder, card


def written(adapter, folder, record: TrainingRecord) -> str:
    """The card of the same adapter with another record."""
    shutil.copytree(adapter[0], folder)
    record.save(folder)
    return write_card(folder).read_text()


@every_hostile
def test_card(adapter, tmp_path, text):
    """Outside code the card is that with a harmless word, and so are its links and metadata; its code is Python."""
    record = replace(untrusted_record(text), gates={}, history=[])
    cards = [adapter[1], written(adapter, tmp_path / "adapter", record)]
    harmless, card = (render(ModelCard(card).text) for card in cards)
    assert set(card.elements) <= SAFE
    if text:  # without a name a card has fewer parts
        assert card.outside == harmless.outside
        assert shape(card) == shape(harmless)
        assert card.attributes == harmless.attributes
    assert not any(value and "javascript" in value for _, value in card.attributes)
    assert [comment[:19] for comment in card.comments] == [" hf_peft_ext writes", " hf_peft_ext end of"]
    metadata = [ModelCard(card).data.to_dict() for card in cards]
    for data in metadata:
        data.pop("metrics", None)  # a harmless word can be the name of one
    assert metadata[0] == metadata[1]
    compile(re.findall(r"^(```+)python\n(.*?)\n\1$", cards[1], re.DOTALL | re.MULTILINE)[0][1], "snippet", "exec")
    assert single_line(text) in card.text


@pytest.mark.parametrize("text", [text for text in HOSTILE if re.search(r"\$|\n|\d\.|\x00|x{9}|^$", text)])
def test_figures(text):
    """Names in figures are drawn as they are, or with `?` where fonts may lack them; formulas are none."""
    drawn = figures.draw_figures(untrusted_record(text))
    assert all(png.startswith(b"\x89PNG") for png in drawn.values())
    assert figures.GATES in drawn
    assert len(figures.label(text)) <= 40


@every_hostile
def test_card_is_written_again(adapter, tmp_path, text):
    """Nothing in it is taken for an author's edit, or for a part of the card."""
    card = written(adapter, tmp_path / "adapter", replace(untrusted_record(text), gates={}, history=[]))
    assert write_card(tmp_path / "adapter").read_text() == card
    assert CardEdits.read(card).items == {}


@every_hostile
def test_settings(adapter, tmp_path, text):
    """What is in recipe.yaml and in the card's fence is what was run; arguments without a recipe are fenced, too."""
    settings = {text: [text]}
    card = written(adapter, tmp_path / "adapter", TrainingRecord(recipe=settings))
    safe = text.encode("utf-8", "replace").decode()  # half a character is none
    recipe = (tmp_path / "adapter" / "recipe.yaml").read_text()
    assert yaml.safe_load(recipe) in (settings, {safe: [safe]})
    other = AdapterCard.from_adapter(adapter[0], TrainingRecord(hyperparameters=settings)).content
    for found in (card, other):
        html = render(ModelCard(found).text)
        assert set(html.elements) <= SAFE
        assert html.elements.count("pre") == 4
        (shown,) = [token.content for token in MarkdownIt().parse(found) if token.info == "yaml"]
        ((key, value),) = yaml.safe_load(shown).items()
        assert single_line(key) == single_line(value[0]) == single_line(text)


@every_hostile
def test_untrusted_config(adapter, tmp_path, text):
    """The adapter's own files can hold anything, too."""
    shutil.copytree(adapter[0], tmp_path / "a")
    (tmp_path / "a" / "training_record.json").unlink()
    path = tmp_path / "a" / "adapter_config.json"
    config = json.loads(path.read_text())
    config |= {"base_model_name_or_path": text, "revision": text, "peft_version": text, "task_type": None}
    config["auto_mapping"] = {"base_model_class": text or "os", "parent_library": text}
    path.write_text(json.dumps(config))
    html = render(ModelCard(write_card(tmp_path / "a").read_text()).text)
    assert set(html.elements) <= SAFE
    assert not any(value and ("javascript" in value or "evil" in value) for _, value in html.attributes)


@pytest.mark.parametrize("name", ["<b>", "](javascript:x)", "a|b", "`"])
def test_names_of_folders_and_modules(tmp_path, name):
    """A folder's name goes into the snippet, a module's into the table."""
    saved(tmp_path / name, "lora")
    card = write_card(tmp_path / name).read_text()
    assert f"adapter = {json.dumps(name)}" in card
    assert set(render(ModelCard(card).text).elements) <= SAFE


def test_hostile_metadata_is_refused(tmp_path):
    """Where the Hub reads a text as an id, a text that is none is an error, not a link."""
    saved(tmp_path, "bitfit")
    for text in HOSTILE:
        for record in (TrainingRecord(license=text or "-"), TrainingRecord(language=[text]),
                       TrainingRecord(pipeline_tag=text or "-"),
                       TrainingRecord(datasets=[DatasetRecord(text, on_hub=True)])):  # fmt: skip
            with pytest.raises(ValueError, match=r"`(license|language|pipeline_tag|datasets)` \(="):
                AdapterCard.from_adapter(tmp_path, record)


@every_hostile
def test_tags(adapter, text):
    """A tag is a word on one line, whatever is in it: text in the metadata, and an error where it is none."""
    if single_line(text) != text or not text:
        with pytest.raises(ValueError, match=r"`tags` \(="):
            AdapterCard.from_adapter(adapter[0], TrainingRecord(tags=[text]))
        return
    card = AdapterCard.from_adapter(adapter[0], TrainingRecord(tags=[text]))
    assert text in ModelCard(card.content).data.tags
    assert ModelCard(card.content).text == card.text


# The pieces

texts = st.text(st.characters(exclude_categories=()), max_size=60)


@settings(deadline=None, max_examples=300)
@given(texts)
@example("a\\|b")
@example("``a`")
def test_code(text):
    """A paragraph and a cell show the text, as one code span."""
    for html in (render(f"before {code(text)} after"), render(table(["one", "two"], [[cell(text), "end"]]))):
        assert html.elements.count("code") == 1
        assert set(html.elements) <= SAFE
        assert single_line(text) in html.text
    assert render(table(["one", "two"], [[cell(text), "end"]])).elements.count("td") == 2


@settings(deadline=None, max_examples=300)
@given(texts)
@example("```\n```")
@example("~~~\n\n</code>")
def test_fenced(text):
    html = render(f"before\n\n{fenced(text, 'yaml')}\n\nafter")
    assert html.elements == ["p", "pre", "code", "p"]


@given(texts)
def test_plain(text):
    """One line that can be written to a file and read again."""
    line = single_line(text)
    assert line == line.strip() == single_line(line)
    assert len(line.splitlines()) <= 1
    assert line.encode().decode() == line


def test_ranges():
    assert ranges([3, 0, 1, 2, 7, 5, 6]) == "0 to 3, 5 to 7"
    assert ranges([4]) == "4"


SCRIPT = "3 <script>alert(1)</script>"
RESULT = {"metric": "accuracy", "value": 0.5, "spread": 0.1}
# an untrusted training_record.json -> the error
WRONG = {
    json.dumps({"results": [RESULT, {**RESULT, "runs": SCRIPT}]}): r"`results\[1\].runs` \(='3 <script>.*of type int",
    json.dumps({"results": [{**RESULT, "value": "0.5"}]}): r"`results\[0\].value` \(='0.5'\) .* of type float",
    json.dumps({"results": [{"metric": "f1"}]}): r"`results\[0\]` \(=\['value'\]\) must be there",
    json.dumps({"results": RESULT}): r"`results` \(={'metric.* of type list",
    json.dumps({"results": [0.5]}): r"`results\[0\]` \(=0.5\) must hold one JSON object",
    json.dumps({"datasets": [{"name": "a", "rows": SCRIPT}]}): r"`datasets\[0\].rows` .* of type int \| None",
    json.dumps(
        {"datasets": [{"name": "a", "url": "b"}]}
    ): r"`datasets\[0\]` \(=\['url'\]\) has fields that are not among",
    json.dumps({"trainable_parameters": SCRIPT}): "`trainable_parameters` .* of type int",
    json.dumps({"train_time": True}): r"`train_time` \(=True\) .* of type float",
    json.dumps({"gates": {"0.x": "1"}}): "`gates` .* of type dict",
    json.dumps({"history": [{"step": 1, "loss": SCRIPT}]}): "`history` .* of type list",
    json.dumps({"seeds": ["1"]}): "`seeds` .* of type list",
    json.dumps({"labels": "abc"}): "`labels` .* of type list",
    json.dumps({"url": 1}): r"`training_record.json` \(=\['url'\]\) has fields that are not among base_model, ",
    "[]": r"`training_record.json` \(=\[\]\) must hold one JSON object",
    "{": r"training_record.json is not JSON: Expecting",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_record_of_other_types_is_refused(adapter, tmp_path, text):
    """The error names the field; no card is written."""
    shutil.copytree(adapter[0], tmp_path / "a")
    (tmp_path / "a" / "training_record.json").write_text(text)
    for read in (TrainingRecord.load, write_card):
        with pytest.raises(ValueError, match=WRONG[text]):
            read(tmp_path / "a")
    assert not (tmp_path / "a" / "README.md").exists()


def test_a_record_is_read_as_it_was_written(tmp_path):
    """With whole numbers where others may stand, and what is no number where a run diverged."""
    record = replace(full_record(), train_time=245, gates={"0.x": 1}, results=[Result("loss", math.nan, 0)])
    record.save(tmp_path)
    assert TrainingRecord.load(tmp_path) == record


@pytest.mark.parametrize(
    "record",
    [
        TrainingRecord(results=[Result("accuracy", 0.5, 0.1, runs=SCRIPT)]),
        TrainingRecord(results=[Result("accuracy", SCRIPT)]),
        TrainingRecord(results=[Result("accuracy", 0.5, SCRIPT)]),
        TrainingRecord(trainable_parameters=SCRIPT),
        TrainingRecord(trainable_parameters=3, total_parameters=SCRIPT),
        TrainingRecord(peak_memory=SCRIPT),
        TrainingRecord(step_time=SCRIPT),
        TrainingRecord(train_time=SCRIPT),
    ],
    ids=lambda record: next(name for name, value in asdict(record).items() if value),
)
def test_numbers_are_numbers(adapter, record):
    """A record that was never read from a file puts no markup into a card either."""
    with pytest.raises((TypeError, ValueError)):
        AdapterCard.from_adapter(adapter[0], record)


def test_rows_that_are_no_number_are_text(adapter):
    card = AdapterCard.from_adapter(adapter[0], TrainingRecord(datasets=[DatasetRecord("a", rows=SCRIPT)]))
    assert set(render(card.text).elements) <= SAFE


def test_the_untrusted_record_is_whole():
    """Every text of the record is hostile in these tests: a field that is added has to be added there."""
    numbers = {"trainable_parameters", "total_parameters", "peak_memory", "step_time", "train_time"}
    elsewhere = {"license", "language", "tags", "hyperparameters"}  # in tests of their own
    record = asdict(untrusted_record("hostile"))
    missing = {name for name, value in asdict(full_record()).items() if value and not record[name]}
    assert missing == numbers | elsewhere
