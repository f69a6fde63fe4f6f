"""The code that loads an adapter, as its card shows it."""

import json
import re
from collections.abc import Sequence
from typing import Any

import transformers
from peft import PeftModel

from .adapter import SavedAdapter
from .text import plain

# task type of peft -> the Auto class of transformers, and the task on the Hub where the type leaves no choice
TASKS = {
    "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token-classification"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "question-answering"),
    "CAUSAL_LM": ("AutoModelForCausalLM", "text-generation"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", None),
    "FEATURE_EXTRACTION": ("AutoModel", "feature-extraction"),
}
# ending of a model class -> the task on the Hub
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
USES = {"SEQ_CLS": CLASSIFY, "CAUSAL_LM": GENERATE, "SEQ_2_SEQ_LM": GENERATE}
MANY = 20  # more names of classes would bury the code


def auto_class(adapter: SavedAdapter) -> str:
    """The class of transformers that loads the base model: by the task type, else the class that was adapted."""
    if adapter.config.task_type in TASKS:
        return TASKS[adapter.config.task_type][0]
    found = base_class(adapter)
    return "AutoModel" if found is None else found.__name__


def base_class(adapter: SavedAdapter) -> Any:
    """The class that was adapted, if it is one of transformers'; the config is a stranger's, so nothing is imported."""
    found = getattr(transformers, str((adapter.config.auto_mapping or {}).get("base_model_class")), None)
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def pipeline_tag(adapter: SavedAdapter) -> str | None:
    """The task on the Hub, where the config leaves no doubt."""
    if adapter.config.task_type in TASKS:
        return TASKS[adapter.config.task_type][1]
    found = base_class(adapter)
    endings = [tag for ending, tag in ENDINGS.items() if found is not None and found.__name__.endswith(ending)]
    return next(iter(endings), None)


def snippet(
    adapter: SavedAdapter,
    base_model: str | None,
    *,
    revision: str | None = None,
    labels: Sequence[str] = (),
    repo_id: str | None = None,
) -> str:
    """Python that loads the base model and the adapter, and uses them where the task says how.

    Args:
        adapter: what is loaded.
        base_model: the base model's id on the Hub; a place for it is left open where it has none.
        revision: its commit.
        labels: names of the classes, in order.
        repo_id: where the adapter is on the Hub; its folder's name by default.
    """
    cls, use = auto_class(adapter), USES.get(adapter.config.task_type, "")
    arguments = ["base"]
    if base_model and revision:
        arguments.append(f"revision={literal(revision)}")
    if adapter.config.task_type in ("SEQ_CLS", "TOKEN_CLS") or cls.endswith("Classification"):
        arguments += classes(labels, adapter.labels())
    tokenizer = "adapter" if (adapter.folder / "tokenizer_config.json").is_file() else "base"
    lines = ["import hf_peft_ext  # first: it makes peft know the method"] if adapter.is_ours else []
    lines += ["import torch"] if "torch." in use else []
    lines += [f"from peft import {PeftModel.__name__}", f"from transformers import {cls}, AutoTokenizer", ""]
    if "Auto" not in cls:
        lines[-2] = f"from transformers import AutoTokenizer, {cls}"
    lines += [f"base = {literal(base_model or 'path/to/the/base/model')}"]
    lines += [f"adapter = {literal(repo_id or adapter.folder.resolve().name)}"]
    lines += [f"model = {cls}.from_pretrained({', '.join(arguments)})"]
    lines += [f"model = {PeftModel.__name__}.from_pretrained(model, adapter)"]
    if use:
        lines += [f"tokenizer = AutoTokenizer.from_pretrained({tokenizer})", use]
    else:
        lines = [re.sub(r"AutoTokenizer, |, AutoTokenizer", "", line) for line in lines]
    return "\n".join(lines)


def classes(labels: Sequence[str], count: int | None) -> list[str]:
    """The argument that gives the base model a head of the right size."""
    if labels and len(labels) <= MANY:
        return ["id2label={" + ", ".join(f"{i}: {literal(label)}" for i, label in enumerate(labels)) + "}"]
    count = len(labels) or count
    return [f"num_labels={count}"] if count else []


def literal(text: str) -> str:
    """A string in Python, on one line: JSON's is one where it holds no lone half of a character, and plain text does not."""
    return json.dumps(plain(text), ensure_ascii=False)
