"""AdaLoRA's allocation of ranks during training, for any Trainer."""

import json
from pathlib import Path
from typing import Any, cast

from peft import AdaLoraConfig, PeftModel
from peft.tuners.adalora import AdaLoraModel
from peft.utils import CONFIG_NAME
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from hf_peft_ext.validation.checks import check

IMPORTANCE = "importance.safetensors"  # in a checkpoint: averages of the importance of each weight
AVERAGES = ("exp_avg_ipt", "exp_avg_unc")  # the attributes of peft's allocator that last from step to step
RESTORED = "_restored"  # its attribute from resuming until training begins


class AdaLoraCallback(TrainerCallback):
    """Lower the total rank of an AdaLoRA adapter during training: it calls peft's `update_and_allocate` each step.

    AdaLoRA, Zhang et al. 2023 (https://arxiv.org/abs/2303.10512), Algorithm 1. Without the calls, an AdaLoRA adapter
    keeps its rank `init_r` everywhere. The trainers of this package add the callback to themselves.

    The schedule is stretched to the run: if `total_step` of the config is not the number of steps, `tinit` and
    `tfinal` are scaled with it. With `total_step=100`, they are percentages.

    The trainers of this package resume such a run exactly. Trainer cannot: its checkpoints hold pruned adapters, and
    no averages of the importance.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the run, and fit the schedule to its length.

        Raises:
            ValueError: there is no AdaLoRA adapter to train, its ranks leave nothing to prune, or the run resumes in
                Trainer, shards its weights, or loads its best checkpoint at the end.
        """
        tuner = adalora_tuner(kwargs["model"])
        check("model", type(kwargs["model"]).__name__, tuner is not None, "must have an AdaLoRA adapter to train")
        is_restored = vars(cast(Any, tuner).rankallocator).pop(RESTORED, False)
        rule = "must be 0 for AdaLoRA: Trainer saves no averages of the importance; the trainers of this package do"
        check("global_step", state.global_step, state.global_step == 0 or is_restored, rule)
        rule = "must be False for AdaLoRA: an earlier checkpoint has other ranks"
        check("load_best_model_at_end", args.load_best_model_at_end, not args.load_best_model_at_end, rule)
        check("fsdp", args.fsdp, not args.fsdp, "must be off for AdaLoRA, which reads whole gradients")
        fit_schedule(trained_config(cast(AdaLoraModel, tuner)), state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Update the importance of each direction, and prune the least important ones."""
        tuner: Any = adalora_tuner(kwargs["model"])
        tuner.update_and_allocate(state.global_step + 1)  # the gradients are there until `on_step_end`


def adalora_tuner(model: nn.Module) -> AdaLoraModel | None:
    """The tuner of an AdaLoRA adapter that is trained; None if there is none."""
    tuner = model.base_model if isinstance(model, PeftModel) else None
    return tuner if isinstance(tuner, AdaLoraModel) and hasattr(tuner, "rankallocator") else None


def trained_config(tuner: AdaLoraModel) -> AdaLoraConfig:
    """The config of the adapter that is trained; peft allows one."""
    return cast(AdaLoraConfig, tuner.peft_config[cast(str, tuner.trainable_adapter_name)])


def save_importance(model: nn.Module, folder: Path) -> None:
    """Save the averages of the importance in a checkpoint, if the model has an AdaLoRA adapter to train."""
    tuner = adalora_tuner(model)
    if tuner is not None:
        averages = {f"{kind}.{name}": x for kind in AVERAGES for name, x in vars(tuner.rankallocator)[kind].items()}
        save_file(averages, folder / IMPORTANCE)


def load_importance(model: nn.Module, folder: Path) -> None:
    """Restore what `save_importance` has saved, and the ranks that are left, for a run that resumes."""
    tuner = adalora_tuner(model)
    if tuner is None or not (folder / IMPORTANCE).exists():
        return
    stored = load_file(folder / IMPORTANCE)
    values = vars(tuner.rankallocator)
    device = next(parameter.device for parameter in model.parameters() if parameter.requires_grad)
    for kind in AVERAGES:
        own = [name for name in stored if name.startswith(f"{kind}.")]
        values[kind] = {name.removeprefix(f"{kind}."): stored[name].to(device) for name in own}
    values["ipt"] = dict(values[AVERAGES[0]])  # of the last step; peft looks at its keys, and computes its values anew
    values[RESTORED] = True
    name = cast(str, tuner.trainable_adapter_name)
    saved = json.loads(((folder if name == "default" else folder / name) / CONFIG_NAME).read_text("utf-8"))
    trained_config(tuner).rank_pattern = saved["rank_pattern"]


def fit_schedule(config: AdaLoraConfig, steps: int) -> None:
    """Stretch a schedule to a number of steps.

    Raises:
        ValueError: `init_r` is not above `target_r`, or no step is left to prune in, and one before it to measure in.
    """
    rule = f"must be above `target_r` (={config.target_r}), or AdaLoRA has nothing to prune"
    check("init_r", config.init_r, config.init_r > config.target_r, rule)
    factor = steps / cast(int, config.total_step)
    first, last = round(config.tinit * factor), round(config.tfinal * factor)
    rule = f"must leave steps to prune in: of {steps} steps, {first} come before and {last} after"
    check("tinit", config.tinit, max(first, 1) < steps - last, rule)
    config.tinit, config.tfinal, config.total_step = first, last, steps


def rank_allocation(trainer: Any) -> list[TrainerCallback]:
    """The callback that a trainer of an AdaLoRA adapter lacks; none for other adapters."""
    has_one = any(isinstance(callback, AdaLoraCallback) for callback in trainer.callback_handler.callbacks)
    return [] if has_one or adalora_tuner(trainer.peft_model) is None else [AdaLoraCallback()]
