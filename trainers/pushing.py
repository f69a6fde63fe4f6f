"""Cards and pushes of a trainer: what `hub_strategy` asks for goes through `write_card` and `push_adapter`.

Each push is put together in a folder of its own, OUTPUT_DIR/hub/NAME, that holds what the repository gets and nothing
else. The folder is removed when the push has arrived; after an error it stays, and the error says how to push it.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, cast

from huggingface_hub import CommitInfo, HfApi
from peft import PeftModel
from transformers.trainer_utils import HubStrategy, IntervalStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from hf_peft_ext.hub_cards import DatasetRecord, publishable, push_adapter, write_card
from hf_peft_ext.hub_cards.peft_integration import home, published_cards, write_card_or_warn
from hf_peft_ext.hub_cards.push import STAGES, explained
from hf_peft_ext.registry import REGISTERED
from hf_peft_ext.trainers.checkpoint import STATE, TRAINED
from hf_peft_ext.trainers.recording import Recording

logger = logging.get_logger(__name__)

CARD = "README.md"


class AdapterPushes(Recording):
    """Writes the card of a run and pushes its adapters, at the end or while it goes on."""

    push_in_progress: PushInProgress | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        self._hub = HfApi(library_name="hf_peft_ext")  # its one thread keeps pushes in order
        super().__init__(*args, **kwargs)

    # The card

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.peft_model.peft_type in REGISTERED:  # saved with their card
            super()._save(output_dir, state_dict)
            return
        with without_stock_card(self.peft_model):
            super()._save(output_dir, state_dict)
        if self.args.should_save and self._unfinished is None:
            self._write_cards(Path(cast(str, output_dir or self.args.output_dir)))

    def create_model_card(
        self,
        language: str | Sequence[str] | None = None,
        license: str | None = None,
        tags: str | Sequence[str] | None = None,
        tasks: str | Sequence[str] | None = None,
        dataset_tags: str | Sequence[str] | None = None,
        **known: Any,
    ) -> None:
        """Write the adapter and its card into `output_dir`, keeping what an author has edited there.

        Args:
            language: ISO 639-1 codes.
            license: identifier on the Hub.
            tags: further tags.
            tasks: the Hub's task; the first one counts.
            dataset_tags: Hub ids of the data.
            known: what Trainer's method takes beyond these; the record knows it.
        """
        if not self.is_world_process_zero() or self._unfinished is not None:  # TRL asks while a checkpoint is written
            return
        record = self.record
        record.language = listed(language) or record.language
        record.license = license or record.license
        record.tags += listed(tags)
        record.pipeline_tag = next(iter(listed(tasks)), record.pipeline_tag)
        names = {data.name for data in record.datasets}
        record.datasets += [DatasetRecord(n, on_hub=True) for n in listed(dataset_tags) if n not in names]
        folder = Path(cast(str, self.args.output_dir))
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # `save_model` gathers the weights, from all processes
            self.filled_record().save(self.adapter_folder(folder))
            self._write_cards(folder)
        else:
            self._save(str(folder))

    def _write_cards(self, folder: Path, repo_id: str | None = None, published: dict[str, str] | None = None) -> None:
        """The card of each adapter, beside it; for a folder of one's own, what is wrong with it is a warning."""
        for name in self.peft_model.peft_config:
            if repo_id is None:
                write_card_or_warn(folder / home(name), self.peft_model, name)
            else:
                text = (published or {}).get(str(home(name) / CARD))
                inside = None if name == "default" else name
                write_card(folder / home(name), self.peft_model, repo_id=repo_id, subfolder=inside, published=text)

    # The push

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the adapter with its card into `output_dir`, and push what is on the list of `publishable`.

        Args:
            commit_message: the commit's first line.
            blocking: whether to wait; otherwise the push's `Future` is returned.
            token: an access token, in place of `args.hub_token`.
            revision: a branch, in place of `args.hub_revision`.
            private: whether a new repository is private.
            kwargs: for `create_model_card`.

        Raises:
            PushError: the Hub could not be reached, or refused; the message says what to run.
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
        stage = self._stage("final", Path(cast(str, self.args.output_dir)))
        arguments = (stage, commit_message, token or self.args.hub_token, revision or self.args.hub_revision)
        return self._push(*arguments) if blocking else self._hub.run_as_future(self._push, *arguments)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        strategy = self.args.hub_strategy
        if self._unfinished is not None or not self.is_world_process_zero() or strategy == HubStrategy.END:
            return  # a checkpoint that is being written is pushed when it is complete
        running = self.push_in_progress
        if running is not None and not running.is_done() and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        checkpoint = Path(checkpoint_folder)
        below = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
        stage = self._stage(checkpoint.name, checkpoint, below.get(cast(HubStrategy, strategy)))
        by_step = self.args.save_strategy == IntervalStrategy.STEPS
        time = f"step {self.state.global_step}" if by_step else f"epoch {int(self.state.epoch or 0)}"
        message = f"Training in progress, {time}"
        job = self._hub.run_as_future(self._push, stage, message, self.args.hub_token, self.args.hub_revision)
        jobs = [*cast(Any, running.jobs if running else []), job]
        self.push_in_progress = PushInProgress(cast(Any, jobs))

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        jobs: Any = self.push_in_progress.jobs if self.push_in_progress else []
        for job in jobs:
            if error := job.exception():
                logger.warning(str(error))
        self.push_in_progress = None

    def _stage(self, name: str, source: Path, below: str | None = None) -> Path:
        """Copy what is to be pushed into a folder of its own: the adapter, and below it the state of training."""
        stage = Path(cast(str, self.args.output_dir)) / STAGES / name
        shutil.rmtree(stage, ignore_errors=True)
        for file in publishable(source):
            path = PurePosixPath(file)
            if path.name not in (STATE, TRAINED):
                copy(source / file, stage / file)
            if below and path.name != CARD and path.parent.name != "figures":
                copy(source / file, stage / below / file)
        return stage

    def _push(self, stage: Path, message: str | None, token: str | None, revision: str | None) -> CommitInfo:
        repo_id = cast(str, self.hub_model_id)
        with explained(stage, repo_id, {"revision": revision, "commit_message": message}):
            published = published_cards(repo_id, revision, token)
        self._write_cards(stage, repo_id, published)
        pushed = push_adapter(stage, repo_id, revision=revision, token=token, commit_message=message)
        shutil.rmtree(stage)
        return pushed


@contextmanager
def without_stock_card(model: PeftModel) -> Iterator[None]:
    """Keep peft from writing its card: what it puts into the metadata would be taken for its author's."""
    vars(model)["create_or_update_model_card"] = lambda output_dir: None
    try:
        yield
    finally:
        del vars(model)["create_or_update_model_card"]


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def listed(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
