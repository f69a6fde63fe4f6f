"""Adds the adapter that a trainer trains to its base model."""

from peft import PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import TrainingArguments, set_seed

from hf_peft_ext.model.sentence_transformer import transformer_module


def add_adapter_to(model: nn.Module, config: PeftConfig | None, args: TrainingArguments | None) -> nn.Module:
    """Add an adapter to a base model, which is prepared first if it is quantized.

    Args:
        model: a base model; a `PeftModel` is returned unchanged. The adapter of a SentenceTransformer is put on the
            transformers model inside.
        config: the adapter.
        args: the seed of the adapter's initial values, and gradient checkpointing; None leaves both.

    Raises:
        TypeError: a base model has no `config`.
        ValueError: a `PeftModel` has a `config` too.
    """
    if (inside := transformer_module(model)) is not None:
        inside.model = add_adapter_to(inside.model, config, args)
        return model
    if isinstance(model, PeftModel):
        if config is not None:
            raise ValueError("`peft_config` must be None where `model` has an adapter already.")
        return model
    if config is None:
        kind = type(model).__name__
        raise TypeError(f"`model` (={kind}) must be a PeftModel, or `peft_config` say which adapter to put on it.")
    if args is not None:
        set_seed(args.seed)  # Trainer sets the seed too late for the adapter's random initial values
        if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
            checkpointing = bool(args.gradient_checkpointing)
            model = prepare_model_for_kbit_training(model, checkpointing, args.gradient_checkpointing_kwargs)
    return get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
