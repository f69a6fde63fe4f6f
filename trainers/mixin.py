"""Turns a Trainer, transformers' own or another library's, into a trainer of adapters."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from hf_peft_ext.attach.parameter_groups import check_rates, split_groups
from hf_peft_ext.hub_cards import TrainingRecord
from hf_peft_ext.papers import Paper
from hf_peft_ext.registry import extend_peft
from hf_peft_ext.trainers.adalora import rank_allocation
from hf_peft_ext.trainers.adapted_model import add_adapter_to
from hf_peft_ext.trainers.callbacks import GateLog
from hf_peft_ext.trainers.checkpoint import AdapterCheckpoints
from hf_peft_ext.trainers.loss_scaling import LossScaling
from hf_peft_ext.trainers.loss_terms import LossTerms
from hf_peft_ext.trainers.pushing import Pusher
from hf_peft_ext.trainers.recorder import Recorder
from hf_peft_ext.validation.checks import check


class AdapterTrainerMixin(AdapterCheckpoints):
    """Turns any Trainer class into a trainer of adapters: `class MyTrainer(AdapterTrainerMixin, TheirTrainer)`.

    It saves and pushes adapters only, resumes bit for bit, logs gates and terms of the loss, and keeps a
    `TrainingRecord` beside the adapter. Set on `record` what a trainer cannot know, such as `language` or `license`.

    Args:
        model: a `PeftModel`, or a base model if there is a `peft_config`.
        more, kwargs: the other class's arguments in its order: `args` is second in most, third in `DPOTrainer`.
        peft_config: the adapter to add to `model`, or to the result of `model_init`.
        sublayer_rates: learning rates of kinds of parameters, see `sublayer_parameter_groups`.

    Raises:
        TypeError: there is no adapter to train, or `peft_config` is not a config.
        ValueError: `model` has an adapter and there is a `peft_config` too, or a rate is of none of its parameters.
    """

    _name: ClassVar[str] = "Adapter"
    _paper: ClassVar[Paper | None] = None
    _tags: ClassVar[tuple[str, ...]] = ()
    push_in_progress: PushInProgress | None = None

    def __init__(
        self,
        model: Any = None,
        *more: Any,
        peft_config: PeftConfig | None = None,
        sublayer_rates: Mapping[str, float] | None = None,
        **kwargs: Any,
    ):
        extend_peft()
        if not isinstance(peft_config, PeftConfig | None):
            raise TypeError(f"`peft_config` (={type(peft_config).__name__}) must be a PeftConfig: UniPELTConfig(...).")
        self._peft_config, self._sublayer_rates = peft_config, sublayer_rates or {}
        self.gate_log = GateLog(self)
        self.recorder = Recorder(self, self.gate_log)
        self.loss_terms, self._loss_scaling, self.pusher = LossTerms(self), LossScaling(self), Pusher(self)
        theirs = inspect.signature(super(AdapterCheckpoints, self).__init__)
        kwargs = dict(**theirs.bind_partial(model, *more).arguments, **kwargs)
        if peft_config is not None and "peft_config" in theirs.parameters:
            kwargs["peft_config"] = peft_config  # TRL's trainers wrap the model in their own way
        elif model is not None:
            kwargs["model"] = add_adapter_to(model, peft_config, kwargs.get("args"))
        super().__init__(**kwargs)
        if sublayer_rates:
            check("sublayer_rates", sublayer_rates, self.optimizer is None, "must be None beside `optimizers`")
            check_rates(self.peft_model, sublayer_rates)
        self.recorder.data.set_originals(self, kwargs.get("train_dataset"), kwargs.get("eval_dataset"))
        for callback in (self.recorder, self.loss_terms, self.gate_log, self.recorder.clock, *rank_allocation(self)):
            self.add_callback(callback)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A new base model with a new adapter."""
        return add_adapter_to(super().call_model_init(trial), self._peft_config, self.args)

    # Steps

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        """The optimizer, with the learning rates of `sublayer_rates`."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args)
        if is_new and self._sublayer_rates:
            optimizer.param_groups = split_groups(self.peft_model, optimizer.param_groups, self._sublayer_rates)
        return optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Train on a micro-batch, whose gates and terms of the loss are logged."""
        self.recorder.measured = {}  # of weights that change now
        self.gate_log.on_training_batch(inputs)
        self.loss_terms.on_batch_begin()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.loss_terms.on_training_batch_end(num_items_in_batch)
        return loss

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The batches of a step and their number of labels; None for losses that are means over a batch."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._loss_scaling.measure(batches, count)
        return batches, count if self.model_accepts_loss_kwargs or self.compute_loss_func is not None else None

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Evaluate a batch, whose gates and terms of the loss are logged."""
        self.gate_log.on_evaluation_batch(inputs)
        self.loss_terms.on_batch_begin()
        result = super().prediction_step(model, inputs, *args, **kwargs)
        self.loss_terms.on_evaluation_batch_end(inputs)
        return result

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate, with the terms of the loss among the metrics, and record the results."""
        self.loss_terms.on_evaluation_begin()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        metrics = cast(dict[str, float], output.metrics)
        metrics.update(self.loss_terms.evaluation_averages(prefix))
        self.recorder.add_metrics(metrics, prefix)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the averages of the terms of the loss, and the gates after them."""
        if "loss" in logs and self.is_in_train:
            logs.update(self.loss_terms.training_averages())
        super().log(logs, start_time)
        self.gate_log.after_log(logs)

    # Data

    def get_train_dataloader(self) -> Any:
        """The data loader of training, whose data are recorded."""
        self.recorder.add_training_data()
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The data loader of an evaluation, whose data are recorded with its results."""
        self.gate_log.on_evaluation_begin()
        self.recorder.data.set_evaluated(eval_dataset, self.eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """The data loader of a prediction, whose data are recorded with its results."""
        self.recorder.data.set_evaluated(test_dataset, None)
        return super().get_test_dataloader(test_dataset)

    # For `compute_loss`

    def add_loss_terms(self, **terms: Tensor) -> None:
        """Log parts of the loss under their names; call it in `compute_loss`.

        Args:
            terms: scalars, each with its scale in the loss: terms that add up to the loss do so in the log.

        Raises:
            TypeError: a term is not a tensor.
            ValueError: Trainer logs the name itself, or a term has several elements.
        """
        self.loss_terms.add(terms)

    def gate_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the model's forward for a batch; override it together with `compute_loss`."""
        return inputs

    # The record

    @property
    def record(self) -> TrainingRecord:
        """The training record. It is filled from the run when the adapter is saved."""
        return self.recorder.record

    @record.setter
    def record(self, record: TrainingRecord) -> None:
        self.recorder.record = record

    @property
    def gates(self) -> dict[str, float]:
        """The last logged means of the gates, by "LAYER.SUBLAYER"."""
        return self.gate_log.means

    def filled_record(self) -> TrainingRecord:
        """The record of the run so far."""
        return self.recorder.filled()

    def evaluate_base(
        self, eval_dataset: Any = None, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> dict[str, float]:
        """Evaluate the model without its adapter, and record the results beside the adapter's.

        Args:
            eval_dataset: as in `evaluate`.
            metric_key_prefix: as in `evaluate`; the metrics are logged with `base_` before it.
            kwargs: of `evaluate`.
        """
        with self.recorder.measuring("base"), self.peft_model.disable_adapter():
            return self.evaluate(eval_dataset, metric_key_prefix=f"base_{metric_key_prefix}", **kwargs)

    def record_results(
        self,
        results: Mapping[str, float | Sequence[float]] | TrainingRecord,
        method: str = "adapter",
        dataset: str | None = None,
        split: str | None = None,
    ) -> None:
        """Record numbers measured elsewhere: several runs of this adapter, or a baseline.

        Args:
            results: metric -> its value, or its values in several runs; or the record of another run.
            method: what was measured: "adapter", "base", "lora"...
            dataset: the data of the measurement; without `dataset` and `split`, those on which this trainer has last
                measured the same metric.
            split: the part of the data.

        Raises:
            ValueError: a metric has no values.
        """
        self.recorder.add_results(results, method, dataset, split)

    # Cards and pushes

    def create_model_card(
        self,
        language: str | Sequence[str] | None = None,
        license: str | None = None,
        tags: str | Sequence[str] | None = None,
        tasks: str | Sequence[str] | None = None,
        dataset_tags: str | Sequence[str] | None = None,
        **ignored: Any,
    ) -> None:
        """Write the adapter and its card into `output_dir`; its author's text stays.

        Args:
            language, license, tags, tasks, dataset_tags: as in `Recorder.set_metadata`.
            ignored: further arguments of Trainer's method, whose values the record has.

        Raises:
            ValueError: the Hub would refuse a value.
        """
        if not self.is_world_process_zero() or self._unfinished is not None:  # TRL calls it during checkpoints
            return
        self.recorder.set_metadata(language, license, tags, tasks, dataset_tags)
        folder = Path(cast(str, self.args.output_dir))
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # `save_model` gathers weights in all processes
            self.recorder.save(self.adapter_folder(folder))
            self.pusher.write_cards(folder)
        else:
            self._save(str(folder))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the adapter and its card into `output_dir`, and push the files that `publishable` lists.

        Args:
            commit_message: the commit's first line.
            blocking: whether to wait for the push; otherwise its `Future` is returned.
            token: an access token, in place of `args.hub_token`.
            revision: a branch, in place of `args.hub_revision`.
            private: whether a new repository is private.
            kwargs: for `create_model_card`.

        Raises:
            PushError: the Hub could not be reached, or refused; the message gives the command that continues.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            self.save_model(_internal_call=True)
        self.create_model_card(**kwargs)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        return self.pusher.push_final(commit_message, blocking, token, revision)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._unfinished is not None or not self.is_world_process_zero():
            return  # an unfinished checkpoint is pushed when it is complete
        running = self.push_in_progress
        busy = running is not None and not running.is_done() and not self.args.hub_always_push
        if self.args.hub_strategy != HubStrategy.END and not busy:
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
            self.push_in_progress = self.pusher.push_checkpoint(Path(checkpoint_folder))

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self.pusher.warn_of_failures()
        self.push_in_progress = None
