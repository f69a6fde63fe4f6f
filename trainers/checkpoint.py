"""Checkpoints of adapters: complete or absent, without pickled arguments, exact to resume from.

Trainer writes a checkpoint file by file under its final name. Here a checkpoint is written into another folder, which
is renamed when it is complete: a process that dies while it saves leaves nothing that looks like a checkpoint.
"""

import json
import os
import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME as STATE
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from hf_peft_ext.hub_cards.peft_integration import without_stock_card
from hf_peft_ext.hub_cards.push import UNFINISHED
from hf_peft_ext.hub_cards.redact import without_secrets
from hf_peft_ext.registry import REGISTERED
from hf_peft_ext.trainers.adalora import save_importance
from hf_peft_ext.trainers.loss_terms import SUMS, LossTerms
from hf_peft_ext.trainers.pushing import Pusher
from hf_peft_ext.trainers.recorder import Recorder
from hf_peft_ext.trainers.restore import (
    FILE_LIST,
    TRAINED,
    check_checkpoint,
    is_saved_in_part,
    last_checkpoint,
    restore,
    trainable,
)
from hf_peft_ext.trainers.sparse import select_before_training
from hf_peft_ext.validation.checks import check

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object

ARGUMENTS = "training_args.json"


class AdapterCheckpoints(Base):
    """What a trainer of adapters saves, and how it resumes."""

    recorder: Recorder
    loss_terms: LossTerms
    pusher: Pusher

    resumed: Path | None = None  # the checkpoint that training resumes from
    _unfinished: str | None = None  # the folder of the checkpoint that is being written

    @property
    def peft_model(self) -> PeftModel:
        """The model, without accelerate's wrappers."""
        return cast(PeftModel, self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    def adapter_folder(self, folder: str | Path) -> Path:
        """The active adapter's folder in a saved one: peft saves every adapter but "default" in a sub-folder."""
        name = cast(str, self.peft_model.active_adapter)
        return Path(folder) if name == "default" else Path(folder) / name

    # Saving

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self.recorder.check()  # before anything is written
        if not self.args.should_save:
            return
        folder, model = Path(cast(str, output_dir or self.args.output_dir)), self.peft_model
        folder.mkdir(parents=True, exist_ok=True)
        if self._unfinished is None:
            self.recorder.save(self.adapter_folder(folder))  # before the adapter: its card is written with it
        self._save_weights(folder, state_dict)
        tokenizer: Any = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            for place in {folder, self.adapter_folder(folder)}:
                tokenizer.save_pretrained(str(place))
        arguments = without_secrets(self.args.to_dict(), self.args.hub_token)
        (folder / ARGUMENTS).write_text(json.dumps(arguments, indent=2, sort_keys=True, default=str) + "\n", "utf-8")
        if model.peft_type not in REGISTERED and self._unfinished is None:  # `save_pretrained` writes their cards
            self.pusher.write_cards(folder)

    def _save_weights(self, folder: Path, state_dict: dict[str, Any] | None) -> None:
        """Write the adapter, with its card."""
        with without_stock_card(self.peft_model):
            self.peft_model.save_pretrained(str(folder), state_dict=state_dict)

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
        sums = self.loss_terms.running_sums()
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (written / SUMS).write_text(json.dumps(sums) + "\n", "utf-8")
            self._complete(written, final)
            rotate_checkpoints(str(run), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _complete(self, written: Path, final: Path) -> None:
        """Add what Trainer does not save, list the files, and rename the folder."""
        self.recorder.save(self.adapter_folder(written))  # last: a checkpoint's card has no figures
        self.state.save_to_json(str(written / STATE))
        if is_saved_in_part(self.peft_model) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            weights = {name: p.detach().contiguous() for name, p in trainable(self.peft_model)}
            save_file(weights, written / TRAINED)
            save_importance(self.peft_model, written)
        files = {file.relative_to(written).as_posix(): file for file in written.rglob("*") if file.is_file()}
        sizes = {name: file.stat().st_size for name, file in files.items()}
        (written / FILE_LIST).write_text(json.dumps(sizes, indent=2), "utf-8")
        for file in (*files.values(), written / FILE_LIST):
            with file.open("rb+") as opened:  # the files reach the disk before the name: a machine can fail too
                os.fsync(opened.fileno())
        if final.exists():  # of an earlier run in the same folder; only an empty folder can be replaced
            final.rename(written.with_name("replaced"))
        written.rename(final)
        shutil.rmtree(written.parent, ignore_errors=True)

    # Resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, or resume from a checkpoint: the last complete one for `resume_from_checkpoint=True`.

        The entries of a sparse adapter are selected first, if they are not yet.

        Args:
            resume_from_checkpoint: a folder, or True.
            args, kwargs: of the other class's method.

        Raises:
            ValueError: there is no complete checkpoint, or the one given is not complete; or the record has a
                language, a license or a task that the Hub would refuse.
        """
        self.recorder.check()
        if resume_from_checkpoint is True:
            folder = cast(str, self.args.output_dir)
            resume_from_checkpoint = last_checkpoint(folder)
            check("output_dir", folder, resume_from_checkpoint is not None, "holds no complete checkpoint to resume")
        elif resume_from_checkpoint:
            check_checkpoint(resume_from_checkpoint)
            if not (Path(resume_from_checkpoint) / "optimizer.pt").exists() and not self.is_deepspeed_enabled:
                rule = "training goes on with a new one, and not exactly as it would have without a break"
                warnings.warn(f"{resume_from_checkpoint} holds no state of the optimizer: {rule}.", stacklevel=2)
        self.resumed = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        if self.resumed is None:
            select_before_training(self, partial(super().train, None, *args, **kwargs))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            restore(self.peft_model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        best = Path(cast(str, self.state.best_model_checkpoint))
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            restore(self.peft_model, best)
        self.recorder.use_results_of(self.adapter_folder(best))
