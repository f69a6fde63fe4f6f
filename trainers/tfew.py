"""T-Few: few-shot training on prompts with answer choices, evaluated by ranking them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, TrainingArguments
from transformers.optimization import Adafactor
from transformers.trainer_utils import EvalLoopOutput

from hf_peft_ext.hub_cards import TrainingRecord
from hf_peft_ext.model.quantization import keep_4bit_trainable
from hf_peft_ext.papers import IA3
from hf_peft_ext.ranking.losses import choice_loss, lm_loss, unlikelihood_loss
from hf_peft_ext.ranking.packing import bare, choice_token_scores, packs
from hf_peft_ext.trainers.callbacks import EpochSetter
from hf_peft_ext.trainers.choice_batches import answers_alone, costs, loss_counts, right, scores, with_scores
from hf_peft_ext.trainers.choice_data import ROW_FIELDS, ChoiceRows, DataCollatorForChoices, check_choice_rows
from hf_peft_ext.trainers.tfew_arguments import TFewTrainingArguments
from hf_peft_ext.trainers.trainer import AdapterTrainer
from hf_peft_ext.validation.checks import check


class TFewTrainer(AdapterTrainer):
    """Trains an adapter to answer prompts by one of their choices, with the losses of T-Few.

    Liu et al. 2022 (https://arxiv.org/abs/2205.05638), section 3.2: loss = lm_loss + choice_loss + unlikelihood_loss.
    Each term is logged. Means are over the whole step: loss and gradient are those of one large batch, for any number
    of accumulated batches and processes.

    Rows of data are mappings with `prompt` (a text), `choices` (a list of texts, of any length) and `answer` (the
    index of the right choice). A row with one choice has the language-modelling loss only.

    Evaluation ranks the choices. `compute_metrics`, the accuracy by default, gets an `EvalPrediction` with

        predictions   (examples, largest number of choices): the scores of the choices, float32; -inf where an example
                      has fewer choices
        label_ids     (examples,): the answers

    `predict` returns the same scores, also for rows without `answer`. The loss of an evaluation is the mean over its
    batches, as in Trainer.

    Args:
        model: a causal or sequence-to-sequence language model, with an adapter, or with `peft_config`.
        args: `TFewTrainingArguments`.
        data_collator: in place of `DataCollatorForChoices`.
        train_dataset, eval_dataset: lists of rows, a `datasets.Dataset`, or other map-style data. Rows may be rendered
            at each access; `set_epoch` of the training data is called in each epoch if there is one.
        processing_class: the model's tokenizer.
        compute_metrics: metrics of an evaluation.
        peft_config: the adapter to add to `model`: `TFewConfig()`, as in the paper, or any other.
        kwargs: of `transformers.Trainer`.

    Raises:
        TypeError: arguments, data or rows are of the wrong kind.
        ValueError: a row is invalid, or an argument is incompatible with these losses.
    """

    _name = "T-Few"
    _paper = IA3
    _tags = ("t-few",)

    args: TFewTrainingArguments
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any = None,
        args: TFewTrainingArguments | None = None,
        data_collator: Callable[[Sequence[Any]], dict[str, Tensor]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        **kwargs: Any,
    ):
        args = TFewTrainingArguments() if args is None else args
        if not isinstance(args, TFewTrainingArguments):
            raise TypeError(f"`args` (={type(args).__name__}) must be TFewTrainingArguments.")
        if data_collator is None and processing_class is None:
            raise ValueError("`processing_class` (=None) must be the tokenizer of the model.")
        loss = kwargs.get("compute_loss_func")
        check("compute_loss_func", loss, loss is None, "must be None: the losses are those of T-Few")
        for rows in (train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])):
            check_choice_rows(rows)
        super().__init__(
            model,
            args,
            data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics or choice_accuracy,
            **kwargs,
        )
        self._check_setting()
        self.add_callback(EpochSetter(train_dataset))
        self.model_accepts_loss_kwargs = True  # older versions of transformers count for such models only
        self.label_names = ["answer"]
        if data_collator is None:
            self.data_collator = DataCollatorForChoices(
                processing_class,
                encoder_decoder=bare(self.peft_model).config.is_encoder_decoder,
                max_prompt_length=args.max_prompt_length,
                max_choice_length=args.max_choice_length,
                normalization=args.normalization,
                separator=args.separator,
            )

    def _check_setting(self) -> None:
        base = bare(self.peft_model)
        rule = "must be a causal or sequence-to-sequence language model"
        check("model", type(base).__name__, base.can_generate(), rule)
        rule = "GPUs in one process are not supported; start a process for each with `torchrun --nproc-per-node`"
        check("n_gpu", self.args.n_gpu, self.args.n_gpu <= 1, rule)
        packs(self.peft_model, self.args.packed)  # raises if it cannot be packed, warns if it will be slower

    # Data

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ROW_FIELDS  # `remove_unused_columns` keeps these

    def _get_dataloader(self, dataset: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        rows = ChoiceRows(dataset, answered=None if description == "test" else True)
        return super()._get_dataloader(rows, description, *args, **kwargs)

    # The loss of a batch is its share of the step's loss

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Tensor]], device: torch.device
    ) -> Tensor:  # shape: (3,)
        """The denominators of the three losses, over all batches of a step and all processes."""
        total = torch.zeros(3, dtype=torch.long, device=device)
        for batch in batch_samples:
            total += loss_counts(batch, self.args.average).to(device)
        return cast(Tensor, self.accelerator.reduce(total, "sum")) if self._sums_processes else total

    @property
    def _sums_processes(self) -> bool:
        return self.args.average_tokens_across_devices and self.args.world_size > 1

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,  # shape: (3,)
    ) -> Any:
        """The weighted sum of the losses of T-Few, whose terms are logged; with `return_outputs` also the costs."""
        args, weights = self.args, self.args.weights
        batch = inputs if return_outputs or weights.keys() != {"lm_loss"} else answers_alone(inputs)
        tokens = choice_token_scores(model, batch, args.packed)
        correct, example = right(batch), batch["example"]
        answers, ranked, wrong = (None,) * 3 if num_items_in_batch is None else num_items_in_batch.unbind()
        losses = {
            "lm_loss": lm_loss(tokens, correct, args.average, answers),
            "choice_loss": choice_loss(tokens, correct, example, args.power, ranked),
            "unlikelihood_loss": unlikelihood_loss(tokens, correct, example, args.epsilon, args.average, wrong),
        }
        summed = num_items_in_batch is not None and self._sums_processes
        scale = args.world_size if summed else 1  # since gradients and logs are means over the processes
        terms = {name: weight * scale * losses[name] for name, weight in weights.items()}
        self.add_loss_terms(**terms)
        loss = torch.stack(list(terms.values())).sum()
        return (loss, {"costs": costs(tokens, batch)}) if return_outputs else loss

    def gate_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The prompts; for an encoder-decoder also the right choices, as labels."""
        prompts = {"input_ids": inputs["prompt_ids"], "attention_mask": inputs["prompt_mask"]}
        if bare(self.peft_model).config.is_encoder_decoder:
            return prompts | {"labels": inputs["choice_ids"][right(inputs)]}
        return prompts

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, dict[str, Any]]:
        """The optimizer that `args` names; Adafactor gets their `scale_parameter`."""
        cls, kwargs = AdapterTrainer.get_optimizer_cls_and_kwargs(args, model)
        if cls is Adafactor:
            kwargs["scale_parameter"] = cast(TFewTrainingArguments, args).scale_parameter
        return cls, kwargs

    def filled_record(self) -> TrainingRecord:
        """The record of the run so far. The task is classification, even if the model can generate text."""
        record = super().filled_record()
        return replace(record, pipeline_tag=record.pipeline_tag or "text-classification")

    # Evaluation

    def prediction_step(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Loss, costs of the choices and answers; without answers the costs only."""
        if "answer" in inputs:
            loss, *rest = super().prediction_step(model, inputs, *args, **kwargs)
            # The same on all processes: Trainer drops those that only fill up the last batch.
            return (self.accelerator.reduce(loss, "mean") if self._sums_processes else loss, *rest)
        batch = cast(dict[str, Tensor], self._prepare_inputs(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            return None, costs(choice_token_scores(model, batch, self.args.packed), batch), None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate as Trainer does; predictions are scores of the choices."""
        keep_4bit_trainable(self.peft_model)
        compute = self.compute_metrics
        self.compute_metrics = compute and with_scores(compute)
        try:
            output = super().evaluation_loop(*args, **kwargs)
        finally:
            self.compute_metrics = compute
        return output._replace(predictions=scores(output.predictions))


def choice_accuracy(evaluated: EvalPrediction) -> dict[str, float]:
    """The share of examples whose answer has the highest score; batches may be joined or in a list."""
    pairs = zip(evaluated.predictions, evaluated.label_ids, strict=True)
    return {"accuracy": float(np.hstack([np.argmax(scores, -1) == answers for scores, answers in pairs]).mean())}
