"""Words for messages: the name that an unknown name was meant to be, and numbers as runs."""

import difflib
from collections.abc import Iterable

# Common words for an argument, if they are not similar to its name.
ALIASES = {
    **dict.fromkeys(("lr", "rate"), "learning_rate"),
    **dict.fromkeys(("epochs", "num_epochs", "n_epochs", "max_epochs"), "num_train_epochs"),
    **dict.fromkeys(("batch_size", "train_batch_size", "batch", "bs"), "per_device_train_batch_size"),
    **dict.fromkeys(("eval_batch_size", "test_batch_size"), "per_device_eval_batch_size"),
    **dict.fromkeys(("grad_accum", "accumulation_steps", "gradient_accumulation"), "gradient_accumulation_steps"),
    **dict.fromkeys(("steps", "num_steps", "num_train_steps"), "max_steps"),
    **dict.fromkeys(("scheduler", "lr_scheduler"), "lr_scheduler_type"),
    **dict.fromkeys(("grad_clip", "clip", "gradient_clipping"), "max_grad_norm"),
    **dict.fromkeys(("warmup", "num_warmup_steps"), "warmup_steps"),
    **dict.fromkeys(("wd", "decay"), "weight_decay"),
    **dict.fromkeys(("out", "output", "output_folder", "save_dir"), "output_dir"),
    **dict.fromkeys(("base_model", "model_name", "model_id", "pretrained"), "model_name_or_path"),
    **dict.fromkeys(("method", "adapter"), "peft_type"),
    **dict.fromkeys(("rank", "lora_r", "lora_rank"), "r"),
    **dict.fromkeys(("dataset", "dataset_name"), "path"),
    **dict.fromkeys(("file", "files", "train_file"), "data_files"),
    **dict.fromkeys(("max_seq_length", "seq_length", "sequence_length"), "max_length"),
    **dict.fromkeys(("db", "database"), "storage"),
    **dict.fromkeys(("task",), "task_type"),
}


def nearest(name: object, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The one of `names` that `name` is an alias of, else the most similar one, else None.

    Args:
        name: an unknown name.
        names: the valid names.
        cutoff: least similarity, from 0 to 1, as in `difflib.get_close_matches`.
    """
    names = list(names)
    if ALIASES.get(str(name)) in names:
        return ALIASES[str(name)]
    return next(iter(difflib.get_close_matches(str(name), names, 1, cutoff)), None)


def did_you_mean(name: object, names: Iterable[str], prefix: str = "") -> str:
    """The end of an error about an unknown name: a question with the nearest valid name, or nothing."""
    near = nearest(name, names)
    return f"; did you mean `{prefix}{near}`?" if near else ""


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers as runs, such as "0 to 2, 5"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
