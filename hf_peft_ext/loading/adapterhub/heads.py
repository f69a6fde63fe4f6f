"""Converts the prediction head beside a checkpoint into modules that the adapter saves whole (`modules_to_save`)."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping

from hf_peft_ext.loading.adapterhub.head_forms import (
    HEAD_AUTO_CLASSES,
    OF_LABELS,
    OF_LANGUAGE,
    HeadForm,
    UnsupportedHead,
    backbone_names,
    head_form,
    is_of_kind,
)
from hf_peft_ext.loading.adapterhub.saved_head import HEAD_CONFIG, SavedHead, read_head, read_head_weights
from hf_peft_ext.loading.adapterhub.settings import Settings
from hf_peft_ext.validation.checks import check

TASK_TYPES = {
    "classification": "SEQ_CLS",
    "multilabel_classification": "SEQ_CLS",
    "tagging": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS",
}


@dataclass
class ImportedHead:
    """A head as peft keeps it.

    Args:
        modules: paths of the modules that the adapter saves whole.
        state: their tensors, by peft's names.
        task_type: peft's; None for none.
        config: fields of the model's config: labels, and the type of the loss.
    """

    modules: list[str] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)
    task_type: str | None = None
    config: dict[str, Any] = field(default_factory=dict)

    def set_config(self, config: Any) -> None:
        """Set the fields of a model's config."""
        for key, value in self.config.items():
            setattr(config, key, value)


def import_head(path: Path, model: nn.Module, methods: list[Settings], with_head: bool) -> ImportedHead:
    """The head beside an adapter, empty if there is none.

    One that the model cannot compute is left out with a warning.

    Args:
        path: the folder of the adapter.
        model: the base model, which does not change.
        methods: of the adapter.
        with_head: whether to import it.

    Raises:
        ValueError: the model's head has another number of labels, or a tensor has another shape.
    """
    head = read_head(path) if with_head else None
    if head is None:
        return ImportedHead()
    try:
        kind, state = converted_head(head, path, model, methods)
        modules, tensors = peft_state(state, model)
    except UnsupportedHead as reason:
        left_out = f"The prediction head beside the adapter ({path / HEAD_CONFIG}) is not imported: {reason}."
        warnings.warn(left_out, stacklevel=3)
        return ImportedHead()
    config = {key: value for key, value in head.base_kwargs().items() if key != "num_labels"}
    if head.kind == "multilabel_classification" or head.settings.get("multilabel"):
        config["problem_type"] = "multi_label_classification"
    return ImportedHead(modules, tensors, TASK_TYPES.get(kind), config)


def converted_head(
    head: SavedHead, path: Path, model: nn.Module, methods: list[Settings]
) -> tuple[str, dict[str, Tensor]]:
    """The type of a head, and its tensors by their names in the model.

    Raises:
        UnsupportedHead: the model has no equal head, or an adapter's own copy of it.
        ValueError: the model's head has another number of labels, or a tensor has another shape.
    """
    if any(isinstance(module, ModulesToSaveWrapper) for module in model.modules()):
        raise UnsupportedHead("an adapter of the model has a head of its own; import it with `with_head=False`")
    kind = head.kind or next((kind for kind in HEAD_AUTO_CLASSES if is_of_kind(model, kind)), "")
    if not head.settings and head.model_class != type(model).__name__:
        load = f"load the base as {head.model_class}{head.call()}"
        raise UnsupportedHead(f"it belongs to {head.model_class}, the model is {type(model).__name__}; {load}")
    if head.settings:
        check_kind(head, model, methods)
        form = head_form(model, kind, head.settings)
        state = flexible_state(form, head, read_head_weights(path), model)
    else:
        state = static_state(read_head_weights(path), model)
    config: Any = model.config
    own, rule = getattr(config, "num_labels", None), f"must be {head.num_labels}, as the saved head has"
    if kind in OF_LABELS and head.num_labels is not None:
        hint = f"; load the base with from_pretrained{head.call()}, or import without the head (`with_head=False`)"
        check("num_labels", own, own == head.num_labels, rule + hint)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name in state}
    for name, tensor in state.items():
        shape = tuple(tensor.shape)
        rule = f"must be {shapes.get(name)}, as in the model, or import without the head (`with_head=False`)"
        check(f"shape of {name}", shape, shape == shapes.get(name), rule)
    return kind, state


def check_kind(head: SavedHead, model: nn.Module, methods: list[Settings]) -> None:
    """Refuse a flexible head of another type than the model's.

    Raises:
        UnsupportedHead: the model has another head, or the library applies the inverse of a coupling in front of it.
    """
    kind = head.kind or ""
    if kind not in HEAD_AUTO_CLASSES:
        raise UnsupportedHead(f"transformers has no head of type {kind!r}")
    if not is_of_kind(model, kind):
        load = f"load the base with {HEAD_AUTO_CLASSES[kind].__name__}.from_pretrained{head.call()}"
        raise UnsupportedHead(f"its type is {kind!r}, which {type(model).__name__} does not have; {load}")
    if kind in OF_LANGUAGE and any(method.get("inv_adapter") for method in methods):
        raise UnsupportedHead("the inverse of the invertible adapter precedes its last layer")


def flexible_state(form: HeadForm, head: SavedHead, tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a flexible head by their names in the model.

    Raises:
        UnsupportedHead: layers, activation or biases differ.
    """
    layers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        *_, index, part = name.split(".")
        layers.setdefault(int(index), {})[part] = tensor
    own, kind = type(model).__name__, head.kind
    if len(layers) != len(form.layers):
        count = f"{len(layers)} layer{'s' if len(layers) != 1 else ''} with weights"
        rest = f"the head of {own} has {len(form.layers)} ({', '.join(form.layers)})"
        raise UnsupportedHead(f"it has {count}, {rest}")
    activation = head.settings.get("activation_function") if len(layers) > 1 else None
    if activation != form.activation:
        raise UnsupportedHead(f"its activation is {activation}, that of {own} is {form.activation}")
    state: dict[str, Tensor] = {}
    for path, (_, layer) in zip(form.layers, sorted(layers.items()), strict=True):
        module = model.get_submodule(path)
        bias = layer.get("bias")
        if module.bias is None and bias is not None and bias.any():
            raise UnsupportedHead(f"it has a bias where {path} of {own} has none")
        state[f"{path}.weight"] = layer["weight"]
        if module.bias is not None:
            state[f"{path}.bias"] = layer["weight"].new_zeros(len(layer["weight"])) if bias is None else bias
    config: Any = model.config
    if kind == "question_answering" and config.model_type in ("t5", "mt5") and config.tie_word_embeddings:
        state["qa_outputs.weight"] = state["qa_outputs.weight"] * config.d_model**-0.5  # the library scales its input
    return state


def static_state(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a head of transformers by their names in the model. T5's heads are saved with the whole model."""
    renamings, state = get_model_conversion_mapping(model, add_legacy=False), {}  # type: ignore[arg-type]
    for name, tensor in tensors.items():
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        if name.partition(".")[0] not in backbone_names(model):
            state[name] = tensor
    return state


def peft_state(state: dict[str, Tensor], model: Any) -> tuple[list[str], dict[str, Tensor]]:
    """The modules that an adapter must save to have these tensors, and the tensors of these modules by peft's names.

    In a head over the vocabulary they are the single layers that differ from the base's, which is often tied to the
    embeddings; else they are the whole head.

    Raises:
        UnsupportedHead: a tensor that differs belongs to no module of the head.
    """
    own: dict[str, nn.Parameter] = model.state_dict(keep_vars=True)  # tied tensors are one object
    if model.get_output_embeddings() is None:
        depths = {name: 1 + name.startswith(f"{model.base_model_prefix}.") for name in state}
        modules = list(dict.fromkeys(".".join(name.split(".")[: depths[name]]) for name in state))
    else:
        names = {id(tensor): name for name, tensor in own.items()}  # the innermost of tied names
        changed = [name for name, tensor in state.items() if not torch.equal(tensor.to(own[name]), own[name])]
        modules = sorted({names[id(own[name])].rpartition(".")[0] for name in changed})
    if "" in modules:
        raise UnsupportedHead(f"it changes a tensor of {type(model).__name__} itself")
    saved = {id(own[name]): tensor for name, tensor in state.items()}
    inside = tuple(f"{module}." for module in modules)
    tensors = {name: saved.get(id(one), one.detach()) for name, one in own.items() if name.startswith(inside)}
    return modules, {f"base_model.model.{name}": tensor.clone() for name, tensor in tensors.items()}
