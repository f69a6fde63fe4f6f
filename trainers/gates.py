"""How far the gates of an adapter are open while it is trained."""

from typing import Any

from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers.trainer_utils import IntervalStrategy

from hf_peft_ext.attach.gates import gate_means, gates
from hf_peft_ext.trainers.checkpoint import AdapterCheckpoints


class GateLog(AdapterCheckpoints):
    """Logs the mean of every gate as gates/LAYER.SUBLAYER, padding left out.

    It is taken over the first batch of each evaluation; where there is no evaluation in training, over the last
    training batch whenever Trainer logs. The forward pass that this takes draws no random number: training is not
    changed.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self.gates: dict[str, float] = {}
        self._gates_wanted = False
        self._gate_batch: dict[str, Any] | None = None
        super().__init__(*args, **kwargs)

    def gate_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What of a batch the model's forward takes; to be overridden where `compute_loss` is."""
        return inputs

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        self._gate_batch = inputs
        return super().training_step(model, inputs, *args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self._gates_wanted:
            self._gates_wanted, self._gate_batch = False, inputs
        return super().prediction_step(model, inputs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self._gates_wanted, self._gate_batch = True, None
        metrics = super().evaluate(*args, **kwargs)
        self._log_gates()
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if self.args.eval_strategy == IntervalStrategy.NO and logs.keys() & {"loss", "train_loss"}:
            self._log_gates()

    def _log_gates(self) -> None:
        """Log the gates of the batch that is kept, if there is one and the adapter has gates and is in use."""
        batch, self._gate_batch = self._gate_batch, None
        if batch is None or not gates(self.peft_model):
            return
        with self.compute_loss_context_manager():
            means = gate_means(self.peft_model, self.gate_inputs(self._prepare_inputs(batch)))
        every = gather_object([means])
        self.gates = {name: sum(one[name] for one in every) / len(every) for name in means}
        self.log({f"gates/{name}": round(mean, 4) for name, mean in self.gates.items()})
