"""What makes a Trainer a trainer of adapters; for transformers' own and for other people's."""

import inspect
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import TrainingArguments, set_seed

from hf_peft_ext.trainers.checkpoint import AdapterCheckpoints
from hf_peft_ext.trainers.loss_scaling import LossScale
from hf_peft_ext.trainers.loss_terms import LossTerms
from hf_peft_ext.trainers.pushing import AdapterPushes


class AdapterTrainerMixin(AdapterPushes, LossTerms, LossScale):
    """Makes any Trainer class one of adapters: `class MyTrainer(AdapterTrainerMixin, TheirTrainer)`.

    Args:
        model: a `PeftModel`, or a base model if there is a `peft_config`.
        args: as the other class takes it.
        peft_config: the adapter to put on `model` (or on what `model_init` returns).

    Raises:
        TypeError: there is no adapter to train, or `peft_config` is no config.
        ValueError: there are two.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *more: Any,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ):
        if not isinstance(peft_config, PeftConfig | None):
            kind = type(peft_config).__name__
            raise TypeError(f"`peft_config` (={kind}) must be a PeftConfig, such as UniPELTConfig(...).")
        self._peft_config = peft_config
        theirs = inspect.signature(super(AdapterCheckpoints, self).__init__).parameters
        if peft_config is not None and "peft_config" in theirs:
            kwargs["peft_config"] = peft_config  # TRL's trainers wrap the model in their own way
        elif model is not None:
            model = self._with_adapter(model, args)
        super().__init__(model, args, *more, **kwargs)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        return self._with_adapter(super().call_model_init(trial), self.args)

    def _with_adapter(self, model: nn.Module, args: TrainingArguments | None) -> PeftModel:
        config = self._peft_config
        if isinstance(model, PeftModel):
            if config is not None:
                raise ValueError("`peft_config` must be None where `model` has an adapter already.")
            return model
        if config is None:
            kind = type(model).__name__
            raise TypeError(f"`model` (={kind}) must be a PeftModel, or `peft_config` say which adapter to put on it.")
        if args is not None:
            set_seed(args.seed)  # adapters start at random, and Trainer sets the seed too late
            if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
                checkpointing = bool(args.gradient_checkpointing)
                model = prepare_model_for_kbit_training(model, checkpointing, args.gradient_checkpointing_kwargs)
        return get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
