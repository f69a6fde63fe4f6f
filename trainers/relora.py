"""ReLoRA: a high-rank update of the base weights as a sequence of low-rank ones, for any Trainer."""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from hf_peft_ext.attach.layer import TunerLayer
from hf_peft_ext.attach.merge import merge_sublayer
from hf_peft_ext.sublayers import LowRank
from hf_peft_ext.validation.checks import check, check_count, is_number


class ReLoRACallback(TrainerCallback):
    """Every `merge_every` steps: W <- W + (alpha / r) B A, new A, B = 0, and a new warm-up of the learning rate.

    ReLoRA, Lialin et al. 2023 (https://arxiv.org/abs/2307.05695), Algorithm 1. A restart changes the outputs by
    rounding only; on a 4-bit base model by the error of quantizing the merged weights again. It applies to peft's LoRA
    and to low-rank branches without a gate, such as those of `UniPELTConfig(gated=False)`; other sub-layers are
    trained on. The learning rate is that of the Trainer's schedule, times a factor that rises from 0 to 1 in the
    `warmup_steps` after each restart.

    The base weights change, so a saved adapter needs the base model of the end of training:
    `model.save_pretrained(adapter)`, then `model.unload().save_pretrained(base)`.

    Args:
        merge_every: steps between restarts. No restart follows the last step.
        warmup_steps: length of the warm-up after each restart.
        prune: fraction of the optimizer's moments that are set to zero, drawn at random. The paper's code has 0.999;
            1 starts a new optimizer state, step count included.
        adapter_name: the adapter; None for the active one.

    Raises:
        ValueError: `prune` is not in [0, 1], or a number of steps is not positive.
    """

    def __init__(
        self, merge_every: int, warmup_steps: int = 10, prune: float = 0.999, adapter_name: str | None = None
    ):
        check_count("merge_every", merge_every)
        check_count("warmup_steps", warmup_steps)
        check(
            "warmup_steps", warmup_steps, warmup_steps < merge_every, f"must be below `merge_every` (={merge_every})"
        )
        check("prune", prune, is_number(prune) and 0 <= prune <= 1, "must lie in [0, 1]")
        self.merge_every, self.warmup_steps = merge_every, warmup_steps
        self.prune, self.adapter_name = prune, adapter_name
        self.restarts: list[int] = []  # the steps after which training was restarted

    def factor(self, step: int) -> float:
        """What the learning rate of a step is multiplied by, see the class.

        Args:
            step: the number of steps before it.
        """
        since = step % self.merge_every
        return 1.0 if step < self.merge_every else min(1.0, since / self.warmup_steps)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the run, and add the warm-ups to its schedule."""
        model, scheduler = kwargs["model"], kwargs["lr_scheduler"]
        rule = "must be before the first restart to resume: a checkpoint has no merged base weights"
        check("resume_from_checkpoint", state.global_step, state.global_step < self.merge_every, rule)
        rule = "must be False for ReLoRA: an earlier adapter does not fit the merged base weights"
        check("load_best_model_at_end", args.load_best_model_at_end, not args.load_best_model_at_end, rule)
        sharded = bool(args.fsdp or args.deepspeed)
        check("args", type(args).__name__, not sharded, "must not shard the weights (FSDP, DeepSpeed) for ReLoRA")
        rule = "must be a function of the step, such as linear, cosine or constant, for ReLoRA"
        check("lr_scheduler_type", str(args.lr_scheduler_type), isinstance(scheduler, LambdaLR), rule)
        self.restarts = []
        restartable(model, self._adapter(model))
        scheduler.lr_lambdas = [self._warmed(schedule) for schedule in scheduler.lr_lambdas]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restart after every `merge_every`-th step but the last."""
        if state.global_step % self.merge_every or state.global_step >= state.max_steps:
            return
        model = kwargs["model"]
        devices = [args.device] if args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # alike in all processes, and nothing else draws other numbers
            torch.manual_seed(args.seed + state.global_step)
            prune_state(kwargs["optimizer"], restart(model, self._adapter(model)), self.prune)
        self.restarts.append(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say that the adapter alone is not the trained model."""
        if self.restarts:
            warnings.warn(
                "ReLoRA has changed the base weights: save the base model too, by `model.unload().save_pretrained()` "
                "after the adapter is saved.",
                stacklevel=2,
            )

    def _adapter(self, model: Any) -> str:
        return self.adapter_name or model.active_adapter

    def _warmed(self, schedule: Any) -> Any:
        return lambda step: schedule(step) * self.factor(step)


def restartable(model: nn.Module, adapter_name: str) -> list[tuple[Any, Any]]:
    """The layers with a low-rank update that can be merged and restarted, and that update.

    Raises:
        ValueError: there is none, or one is a variant of LoRA that a merge does not preserve (DoRA and others).
    """
    pairs = list(low_rank_updates(model, adapter_name))
    rule = "must have a LoRA, or a low-rank branch without a gate, such as UniPELTConfig(gated=False)"
    check("adapter_name", adapter_name, bool(pairs), rule)
    variants = [type(layer.lora_variant[adapter_name]).__name__ for layer, _ in pairs
                if isinstance(layer, LoraLayer) and adapter_name in layer.lora_variant]  # fmt: skip
    check("model", variants[:1], not variants, "must have plain LoRA for ReLoRA")
    return pairs


def low_rank_updates(model: nn.Module, adapter_name: str) -> Iterator[tuple[Any, Any]]:
    """Each layer with a low-rank update without a gate, and the parameters' module: peft's layer, or our branch."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and adapter_name in layer.lora_A:
            yield layer, layer
        elif isinstance(layer, TunerLayer) and adapter_name in layer.sublayer_of:
            branch = layer.sublayer_of[adapter_name]
            if isinstance(branch, LowRank) and branch.gate is None:
                yield layer, branch


@torch.no_grad()
def restart(model: nn.Module, adapter_name: str) -> list[nn.Parameter]:
    """Merge the low-rank updates of an adapter into the base weights, and start them anew.

    Args:
        model: a model with a LoRA or with low-rank branches.
        adapter_name: the adapter.

    Returns:
        The parameters that were started anew.

    Raises:
        ValueError: see `restartable`; or a merged weight is not finite.
    """
    parameters: list[nn.Parameter] = []
    for layer, branch in restartable(model, adapter_name):
        if isinstance(branch, LowRank):
            merge_sublayer(layer, branch, sign=1, safe=True)
            branch.reset_parameters()
            parameters += [branch.A, branch.B]
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Merge lora module to")  # rounding of quantized weights
                layer.merge(safe_merge=True, adapter_names=[adapter_name])
            layer.merged_adapters.remove(adapter_name)
            layer.reset_lora_parameters(adapter_name, True)
            parameters += [*layer.lora_A[adapter_name].parameters(), *layer.lora_B[adapter_name].parameters()]
    return parameters


def prune_state(optimizer: Any, parameters: list[nn.Parameter], fraction: float) -> None:
    """Set a random fraction of the moments of parameters to zero; all of their state is dropped for 1.

    Both moments of a weight are kept or zeroed together. The paper's code draws them apart: where the first moment is
    kept and the second is not, the next update divides by almost nothing.

    The state of an optimizer that stores its moments in 8 bits is dropped for any fraction: its zero is not 0.
    """
    for parameter in parameters:
        state: dict[str, Any] = optimizer.state.get(parameter, {})
        moments = [m for m in state.values() if isinstance(m, Tensor) and m.shape == parameter.shape]
        if fraction == 1 or not all(moment.is_floating_point() for moment in moments):
            optimizer.state.pop(parameter, None)
            continue
        kept = torch.rand_like(parameter, dtype=torch.float32) >= fraction
        for moment in moments:
            moment.mul_(kept)
