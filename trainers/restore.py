"""Finds complete checkpoints and loads their weights."""

import json
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME as STATE
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_peft_ext.sublayers import ProjectedPrefix
from hf_peft_ext.trainers.adalora import adalora_tuner, load_importance
from hf_peft_ext.validation.checks import check

FILE_LIST = "checkpoint_files.json"  # the files of a complete checkpoint: name -> bytes
TRAINED = "trained_weights.safetensors"  # all trainable weights, where the adapter's file lacks some


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that require gradients, with their names."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def is_saved_in_part(model: nn.Module, adapter: str = "") -> bool:
    """Whether the file of this adapter (of any adapter for "") lacks weights that are trained.

    It has prefixes or prompts without the network or subspace that they are computed by, and AdaLoRA's matrices
    without the directions that were pruned, which the optimizer moves until they are pruned again.
    """
    tuner = adalora_tuner(model)
    if tuner is not None and adapter in ("", tuner.trainable_adapter_name):
        return True
    return any(
        is_computed(path, module) and adapter in ("", path.rpartition(".")[2])
        for path, module in model.named_modules()
    )


def is_computed(path: str, module: nn.Module) -> bool:
    """Whether a module is a prefix or a prompt with other parameters than its vectors."""
    if path.rpartition(".")[0] == "prompt_encoder":
        return {name for name, _ in module.named_parameters()} != {"embedding.weight"}
    return isinstance(module, ProjectedPrefix)


def restore(model: PeftModel, folder: Path) -> None:
    """Load the weights of a checkpoint into a model with the same adapters.

    Raises:
        ValueError: the checkpoint is of other adapters; the model is unchanged.
    """
    state_of: dict[str, dict[str, torch.Tensor]] = {}
    for name in model.peft_config:
        file = (folder if name == "default" else folder / name) / SAFETENSORS_WEIGHTS_NAME
        check("resume_from_checkpoint", str(folder), file.exists(), f"must hold the adapter {name!r}")
        state = state_of[name] = load_file(file)
        if adalora_tuner(model) is not None:  # of other shapes
            continue
        expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        wrong = sorted(key for key, p in expected.items() if key not in state or state[key].shape != p.shape)
        problem = f"{len(wrong)} weights are missing or of another shape, such as {', '.join(wrong[:2])}"
        check(
            "resume_from_checkpoint", str(folder), not wrong, f"must hold the model's adapter {name!r}, but {problem}"
        )
    stored = load_file(folder / TRAINED) if (folder / TRAINED).exists() else {}
    rule = f"must hold {TRAINED}, since the adapter's file lacks weights; only trainers for adapters save it"
    check("resume_from_checkpoint", str(folder), bool(stored) or not is_saved_in_part(model), rule)
    wrong = [name for name, p in trainable(model) if stored and (name not in stored or stored[name].shape != p.shape)]
    rule = f"must hold the model's adapter, but its {TRAINED} does not fit {', '.join(wrong[:2])}"
    check("resume_from_checkpoint", str(folder), not wrong, rule)
    for name, state in state_of.items():
        if not is_saved_in_part(model, name):  # peft would replace the network by its output
            set_peft_model_state_dict(model, state, adapter_name=name)
    with torch.no_grad():
        for name, parameter in trainable(model) if stored else ():
            parameter.copy_(stored[name])
    load_importance(model, folder)


def last_checkpoint(folder: str | Path) -> str | None:
    """The complete checkpoint with the most steps in a run's folder; None if there is none."""
    steps: dict[int, Path] = {}
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdecimal() and not missing_files(path):
            steps[int(step)] = path
    return str(steps[max(steps)]) if steps else None


def check_checkpoint(folder: str | Path) -> None:
    """Refuse an incomplete checkpoint.

    Raises:
        ValueError: files are missing or too short; the message names them.
    """
    missing = missing_files(Path(folder))
    rule = f"is not a complete checkpoint: {', '.join(missing[:4])} missing or cut short"
    check("resume_from_checkpoint", str(folder), not missing, rule)


def missing_files(folder: Path) -> list[str]:
    """The files that a checkpoint lacks, in whole or in part."""
    if not (folder / FILE_LIST).exists():  # of another trainer, which writes its state last
        return [] if (folder / STATE).exists() else [STATE]
    sizes: dict[str, int] = json.loads((folder / FILE_LIST).read_text("utf-8"))
    return [name for name, size in sizes.items()
            if not (folder / name).is_file() or (folder / name).stat().st_size != size]  # fmt: skip
