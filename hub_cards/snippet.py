"""The code on a card that loads the adapter."""

import json
from collections.abc import Sequence
from typing import Any

import transformers

from hf_peft_ext.hub_cards.markdown import single_line
from hf_peft_ext.hub_cards.saved_adapter import SavedAdapter

# task type of peft -> the Auto class of transformers, and the task on the Hub where the type leaves no choice
TASK_CLASSES = {
    "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token-classification"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "question-answering"),
    "CAUSAL_LM": ("AutoModelForCausalLM", "text-generation"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", None),
    "FEATURE_EXTRACTION": ("AutoModel", "feature-extraction"),
}
# Ending of a model class -> the task on the Hub. transformers' TASK_MAPPING lacks multiple choice, and has
# text2text-generation, which is no task of the Hub.
ENDINGS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForImageClassification": "image-classification",
    "ForAudioClassification": "audio-classification",
    "ForCTC": "automatic-speech-recognition",
}
CLASSIFY = """
inputs = tokenizer("A text to classify.", return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
print(model.config.id2label[logits.argmax(-1).item()])"""
GENERATE = """
inputs = tokenizer("A text to go on from:", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=50)
print(tokenizer.decode(output[0], skip_special_tokens=True))"""
RANK = """
classifier = RankClassifier(model, tokenizer, choices=["one answer", "another"])
print(classifier.predict(["A prompt that asks for one of them:"]))"""
EMBED = """
print(model.encode(["A text to embed."]).shape)"""
EMBEDDING_FILE = "config_sentence_transformers.json"  # in the folder of a SentenceTransformer
USES = {"SEQ_CLS": CLASSIFY, "CAUSAL_LM": GENERATE, "SEQ_2_SEQ_LM": GENERATE}
MEAN_POOLING = "MeanPoolingForSequenceClassification"  # of this package
MAX_LABELS = 20  # names of classes in the code


def ranks_choices(adapter: SavedAdapter, task: str | None) -> bool:
    """Whether a language model is used as a classifier, by ranking answer choices."""
    return task == "text-classification" and adapter.config.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM")


def is_embedding(adapter: SavedAdapter) -> bool:
    """Whether the adapter was saved with a SentenceTransformer."""
    return (adapter.folder / EMBEDDING_FILE).is_file()


def auto_class(adapter: SavedAdapter) -> str | None:
    """The class that loads the base model: by the task type, else the base model's class.

    None for models of other libraries.
    """
    if is_embedding(adapter):
        return "SentenceTransformer"
    if adapter.config.task_type == "SEQ_CLS" and adapter.reads_mean:
        return MEAN_POOLING
    if adapter.config.task_type in TASK_CLASSES:
        return TASK_CLASSES[adapter.config.task_type][0]
    cls = base_class(adapter)
    return cls.__name__ if cls else None


def base_class(adapter: SavedAdapter) -> Any:
    """The base model's class, if it is one of transformers'. The name is untrusted: nothing is imported."""
    cls = getattr(transformers, str((adapter.config.auto_mapping or {}).get("base_model_class")), None)
    return cls if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel) else None


def pipeline_tag(adapter: SavedAdapter) -> str | None:
    """The task on the Hub; None if the config allows several."""
    if is_embedding(adapter):
        return "sentence-similarity"
    if adapter.config.task_type in TASK_CLASSES:
        return TASK_CLASSES[adapter.config.task_type][1]
    cls = base_class(adapter)
    endings = [tag for ending, tag in ENDINGS.items() if cls is not None and cls.__name__.endswith(ending)]
    return next(iter(endings), None)


def snippet(
    adapter: SavedAdapter,
    base_model: str | None,
    *,
    revision: str | None = None,
    labels: Sequence[str] = (),
    repo_id: str | None = None,
    subfolder: str | None = None,
    ranks: bool = False,
) -> str:
    """Python that loads the base model and the adapter, and uses them if the task is known.

    Args:
        adapter: the saved adapter.
        base_model: the base model's id on the Hub; None for a placeholder.
        revision: its commit.
        labels: names of the classes, in order.
        repo_id: the adapter's repository on the Hub; its folder's name by default.
        subfolder: the adapter's folder in the repository; None for the repository itself.
        ranks: whether the model classifies by ranking answer choices.
    """
    cls, use = auto_class(adapter), RANK if ranks else USES.get(adapter.config.task_type, "")
    embeds = is_embedding(adapter)
    load = "hf_peft_ext.load_adapter" if adapter.is_ours else "PeftModel.from_pretrained"
    lines = [*imports(adapter, cls, use), "", f"adapter = {string_literal(repo_id or adapter.folder.resolve().name)}"]
    if cls:
        arguments = [f"revision={string_literal(revision)}"] if base_model and revision else []
        if adapter.config.task_type in ("SEQ_CLS", "TOKEN_CLS") or cls.endswith("Classification"):
            arguments += class_arguments(labels, adapter.number_of_labels())
        lines += [f"base = {string_literal(base_model or 'path/to/the/base/model')}"]
        lines += [call(f"model = {cls}{'' if embeds else '.from_pretrained'}", ["base", *arguments])]
    else:
        lines += ["model = ...  # the base model, as it was before training"]
    place = f", subfolder={string_literal(subfolder)}" if subfolder else ""
    inner = "model[0].model" if embeds else "model"  # the transformers model
    lines += [f"{inner} = {load}({inner}, adapter{place})"]
    if embeds:
        lines += [EMBED]
    elif use:
        saved = (adapter.folder / "tokenizer_config.json").is_file()
        lines += [f"tokenizer = AutoTokenizer.from_pretrained({f'adapter{place}' if saved else 'base'})", use]
    return "\n".join(lines)


def imports(adapter: SavedAdapter, cls: str | None, use: str) -> list[str]:
    """The import lines that the code needs."""
    ours = "import hf_peft_ext  # comes first: it makes the method known to peft"
    names = sorted(name for name in (cls, "AutoTokenizer" if use else None) if name and name != MEAN_POOLING)
    lines = {
        ours: adapter.is_ours,
        "import torch": "torch." in use,
        "from hf_peft_ext import RankClassifier": "RankClassifier(" in use,
        f"from hf_peft_ext import {MEAN_POOLING}": cls == MEAN_POOLING,
        "from peft import PeftModel": not adapter.is_ours,
        f"from {'sentence_' * is_embedding(adapter)}transformers import {', '.join(names)}": bool(names),
    }
    return [line for line, needed in lines.items() if needed]


def call(function: str, arguments: Sequence[str]) -> str:
    """A call on one line, or with an argument a line if it is over 100 characters."""
    line = f"{function}({', '.join(arguments)})"
    return line if len(line) <= 100 else "\n    ".join([f"{function}(", *(f"{a}," for a in arguments)]) + "\n)"


def class_arguments(labels: Sequence[str], count: int | None) -> list[str]:
    """The argument for the size of the base model's head, if the number of classes is known."""
    if labels and len(labels) <= MAX_LABELS:
        return ["id2label={" + ", ".join(f"{i}: {string_literal(label)}" for i, label in enumerate(labels)) + "}"]
    count = len(labels) or count
    return [f"num_labels={count}"] if count else []


def string_literal(text: str) -> str:
    """A string literal of Python, on one line. JSON's is one, since plain text has no lone surrogates."""
    return json.dumps(single_line(text), ensure_ascii=False)
