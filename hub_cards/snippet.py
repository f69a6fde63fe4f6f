"""The code that loads an adapter, as its card shows it."""

import json
from collections.abc import Sequence
from typing import Any

import transformers

from hf_peft_ext.hub_cards.markdown import plain
from hf_peft_ext.hub_cards.saved_adapter import SavedAdapter

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
RANK = """
classifier = RankClassifier(model, tokenizer, choices=["one answer", "another"])
print(classifier.predict(["A prompt that asks for one of them:"]))"""
USES = {"SEQ_CLS": CLASSIFY, "CAUSAL_LM": GENERATE, "SEQ_2_SEQ_LM": GENERATE}
MANY = 20  # more names of classes would bury the code


def ranks_choices(adapter: SavedAdapter, task: str | None) -> bool:
    """Whether a model that writes text is used to classify, by the choice that it finds most probable."""
    return task == "text-classification" and adapter.config.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM")


def auto_class(adapter: SavedAdapter) -> str | None:
    """The class of transformers that loads the base model: by the task type, else the class that was adapted.

    None for models that are not of transformers.
    """
    if adapter.config.task_type in TASKS:
        return TASKS[adapter.config.task_type][0]
    found = base_class(adapter)
    return found.__name__ if found else None


def base_class(adapter: SavedAdapter) -> Any:
    """The class that was adapted, if it is one of transformers'. The name is a stranger's: nothing is imported."""
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
    subfolder: str | None = None,
    ranks: bool = False,
) -> str:
    """Python that loads the base model and the adapter, and uses them where the task says how.

    Args:
        adapter: what is loaded.
        base_model: the base model's id on the Hub; a place for it is left open where it has none.
        revision: its commit.
        labels: names of the classes, in order.
        repo_id: where the adapter is on the Hub; its folder's name by default.
        subfolder: the folder of the repository in which it lies; None for the repository itself.
        ranks: whether it is used by ranking answer choices.
    """
    cls, use = auto_class(adapter), RANK if ranks else USES.get(adapter.config.task_type, "")
    load = "hf_peft_ext.load_adapter" if adapter.is_ours else "PeftModel.from_pretrained"
    lines = [*imports(adapter, cls, use), "", f"adapter = {literal(repo_id or adapter.folder.resolve().name)}"]
    if cls:
        arguments = [f"revision={literal(revision)}"] if base_model and revision else []
        if adapter.config.task_type in ("SEQ_CLS", "TOKEN_CLS") or cls.endswith("Classification"):
            arguments += classes(labels, adapter.labels())
        lines += [f"base = {literal(base_model or 'path/to/the/base/model')}"]
        lines += [call(f"model = {cls}.from_pretrained", ["base", *arguments])]
    else:
        lines += ["model = ...  # the base model, as it was before training"]
    place = f", subfolder={literal(subfolder)}" if subfolder else ""
    lines += [f"model = {load}(model, adapter{place})"]
    if use:
        saved = (adapter.folder / "tokenizer_config.json").is_file()
        lines += [f"tokenizer = AutoTokenizer.from_pretrained({f'adapter{place}' if saved else 'base'})", use]
    return "\n".join(lines)


def imports(adapter: SavedAdapter, cls: str | None, use: str) -> list[str]:
    ours = "import hf_peft_ext  # comes first: it makes the method known to peft"
    names = sorted(name for name in (cls, "AutoTokenizer" if use else None) if name)
    lines = {
        ours: adapter.is_ours,
        "import torch": "torch." in use,
        "from hf_peft_ext import RankClassifier": "RankClassifier(" in use,
        "from peft import PeftModel": not adapter.is_ours,
        f"from transformers import {', '.join(names)}": bool(names),
    }
    return [line for line, needed in lines.items() if needed]


def call(function: str, arguments: Sequence[str]) -> str:
    """A call on one line, or with one argument a line where that would be long."""
    line = f"{function}({', '.join(arguments)})"
    return line if len(line) <= 100 else "\n    ".join([f"{function}(", *(f"{a}," for a in arguments)]) + "\n)"


def classes(labels: Sequence[str], count: int | None) -> list[str]:
    """The argument that gives the base model a head of the right size."""
    if labels and len(labels) <= MANY:
        return ["id2label={" + ", ".join(f"{i}: {literal(label)}" for i, label in enumerate(labels)) + "}"]
    count = len(labels) or count
    return [f"num_labels={count}"] if count else []


def literal(text: str) -> str:
    """A string in Python, on one line; JSON's is one, since plain text holds no half characters."""
    return json.dumps(plain(text), ensure_ascii=False)
