"""Checkpoints of adapters alone: complete or not there, without pickled arguments, exact to resume from.

Trainer writes a checkpoint file by file under its final name. Here it is written into another folder, which gets that
name when all is there: a process that dies while it saves leaves nothing that looks like a checkpoint.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from hf_peft_ext.sublayers import ProjectedPrefix
from hf_peft_ext.trainers.redact import without_secrets
from hf_peft_ext.validation.checks import check

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object

ARGUMENTS = "training_args.json"
STATE = "trainer_state.json"
FILES = "checkpoint_files.json"  # what a complete checkpoint holds: name -> bytes
WEIGHTS = "adapter_model.safetensors"
TRAINED = "trained_weights.safetensors"  # where prefixes are the output of a network: that network too
SUMS = "running_sums.json"  # what was not logged yet, so that the next log is that of a run without a break
UNFINISHED = "unfinished"


class AdapterCheckpoints(Base):
    """What a trainer of adapters saves, and how it takes it up again."""

    def __init__(self, *args: Any, **kwargs: Any):
        self._unfinished: str | None = None  # where a checkpoint is being written
        self._resumed: Path | None = None  # the checkpoint that training goes on from
        super().__init__(*args, **kwargs)
        self.add_callback(AtBegin(lambda: self._begin(self._resumed)))

    @property
    def peft_model(self) -> PeftModel:
        """The model, without what it is wrapped in."""
        return cast(PeftModel, self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    def adapter_folder(self, folder: str | Path) -> Path:
        """Where the active adapter lies in what is saved: peft gives all but "default" a folder of their own."""
        name = cast(str, self.peft_model.active_adapter)
        return Path(folder) if name == "default" else Path(folder) / name

    # Saving

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(cast(str, output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self.peft_model.save_pretrained(str(folder), state_dict=state_dict)
        tokenizer: Any = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            for place in {folder, self.adapter_folder(folder)}:
                tokenizer.save_pretrained(str(place))
        arguments = without_secrets(self.args.to_dict(), self.args.hub_token)
        (folder / ARGUMENTS).write_text(json.dumps(arguments, indent=2, sort_keys=True, default=str) + "\n", "utf-8")

    def _get_output_dir(self, trial: Any) -> str:
        return self._unfinished or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(self._get_output_dir(trial))
        final = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        written = run / UNFINISHED / final.name
        if self.args.should_save:
            shutil.rmtree(run / UNFINISHED, ignore_errors=True)  # of a process that died
        self.accelerator.wait_for_everyone()
        self._unfinished = str(run / UNFINISHED)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._unfinished = None
        if self.state.best_model_checkpoint == str(written):
            self.state.best_model_checkpoint = str(final)
        sums = self._running_sums()
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (written / SUMS).write_text(json.dumps(sums) + "\n", "utf-8")
            self._complete(written, final)
            rotate_checkpoints(str(run), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _complete(self, written: Path, final: Path) -> None:
        """Add what Trainer does not know of, list the files, and give the folder its name."""
        self.state.save_to_json(str(written / STATE))
        if projected(self.peft_model) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            save_file({name: p.detach().contiguous() for name, p in trained(self.peft_model)}, written / TRAINED)
        files = {file.relative_to(written).as_posix(): file for file in written.rglob("*") if file.is_file()}
        (written / FILES).write_text(json.dumps({n: f.stat().st_size for n, f in files.items()}, indent=2), "utf-8")
        for file in (*files.values(), written / FILES):
            with file.open("rb+") as opened:  # on the disk before the name is: a machine can die as well
                os.fsync(opened.fileno())
        if final.exists():  # of an earlier run in the same folder; a folder can replace an empty one only
            final.rename(written.with_name("replaced"))
        written.rename(final)
        shutil.rmtree(written.parent, ignore_errors=True)

    def _running_sums(self) -> dict[str, Any]:
        """What has been summed up since the last log; for all processes to call."""
        return {}

    # Resuming

    def _begin(self, resumed: Path | None) -> None:
        """Called when training is about to begin, or to go on from a checkpoint."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, or go on from a checkpoint: the last complete one for `resume_from_checkpoint=True`.

        Raises:
            ValueError: there is no complete checkpoint, or the one given is not.
        """
        if resume_from_checkpoint is True:
            folder = cast(str, self.args.output_dir)
            resume_from_checkpoint = last_checkpoint(folder)
            check("output_dir", folder, resume_from_checkpoint is not None, "holds no complete checkpoint to resume")
        elif resume_from_checkpoint:
            check_complete(resume_from_checkpoint)
            if not (Path(resume_from_checkpoint) / "optimizer.pt").exists() and not self.is_deepspeed_enabled:
                rule = "training goes on with a new one, and not exactly as it would have without a break"
                warnings.warn(f"{resume_from_checkpoint} holds no state of the optimizer: {rule}.", stacklevel=2)
        self._resumed = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            restore(self.peft_model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            restore(self.peft_model, Path(cast(str, self.state.best_model_checkpoint)))


class AtBegin(TrainerCallback):
    """Calls a function when training begins: Trainer has then restored its own state."""

    def __init__(self, call: Callable[[], Any]):
        self.call = call

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.call()


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def projected(model: nn.Module, adapter: str = "") -> bool:
    """Whether prefixes of this adapter (of any, for "") are the output of a network."""
    return any(
        isinstance(module, ProjectedPrefix) and path.endswith(adapter and f".sublayer_of.{adapter}")
        for path, module in model.named_modules()
    )


def restore(model: PeftModel, folder: Path) -> None:
    """Put the weights of a checkpoint into a model that has these adapters.

    Raises:
        ValueError: the checkpoint is not of these adapters.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name in model.peft_config:
        file = (folder if name == "default" else folder / name) / WEIGHTS
        check("resume_from_checkpoint", str(folder), file.exists(), f"must hold the adapter {name!r}")
        found[name] = load_file(file)
        expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        wrong = sorted(k for k, p in expected.items() if k not in found[name] or found[name][k].shape != p.shape)
        rule = (
            f"must hold the adapter {name!r} as it is here, but {len(wrong)} weights are missing or of another shape"
        )
        check("resume_from_checkpoint", str(folder), not wrong, f"{rule}, such as {', '.join(wrong[:2])}")
    network = (folder / TRAINED).exists()
    rule = f"must hold {TRAINED}, the network that the prefixes come from; it was not saved by a trainer for adapters"
    check("resume_from_checkpoint", str(folder), network or not projected(model), rule)
    for name, weights in found.items():
        if not projected(model, name):  # peft would replace the network by its output
            set_peft_model_state_dict(model, weights, adapter_name=name)
    if network:
        stored = load_file(folder / TRAINED)
        with torch.no_grad():
            for name, parameter in trained(model):
                parameter.copy_(stored[name])


def last_checkpoint(folder: str | Path) -> str | None:
    """The complete checkpoint of the most steps in a run's folder."""
    steps: dict[int, Path] = {}
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdecimal() and not missing(path):
            steps[int(step)] = path
    return str(steps[max(steps)]) if steps else None


def check_complete(folder: str | Path) -> None:
    absent = missing(Path(folder))
    rule = f"is not a complete checkpoint: {', '.join(absent[:4])} missing or cut short"
    check("resume_from_checkpoint", str(folder), not absent, rule)


def missing(folder: Path) -> list[str]:
    """The files that a checkpoint should have and has not, or not in full."""
    if not (folder / FILES).exists():  # of another trainer, which writes its state last
        return [] if (folder / STATE).exists() else [STATE]
    sizes: dict[str, int] = json.loads((folder / FILES).read_text("utf-8"))
    return [name for name, size in sizes.items()
            if not (folder / name).is_file() or (folder / name).stat().st_size != size]  # fmt: skip
