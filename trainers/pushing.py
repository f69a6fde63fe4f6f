"""Cards and pushes of a trainer, by `write_card` and `push_adapter`.

Each push is assembled in a folder of its own, OUTPUT_DIR/hub/NAME, with exactly the files that the repository gets.
The folder is removed when the push has arrived. After an error it stays, and the error says how to push it.
"""

import shutil
from concurrent.futures import Future
from pathlib import Path, PurePosixPath
from typing import Any, cast

from huggingface_hub import CommitInfo, HfApi
from transformers.trainer import TRAINER_STATE_NAME as STATE
from transformers.trainer_utils import HubStrategy, IntervalStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from hf_peft_ext.hub_cards import publishable, push_adapter
from hf_peft_ext.hub_cards.card_files import CARD
from hf_peft_ext.hub_cards.peft_integration import home, published_cards, write_card_or_warn, write_cards
from hf_peft_ext.hub_cards.push import PUSHES, explained
from hf_peft_ext.trainers.restore import TRAINED

logger = logging.get_logger(__name__)


class Pusher:
    """Writes the cards of a run and pushes its adapters, at the end or during training.

    Args:
        trainer: an adapter's trainer.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._hub = HfApi(library_name="hf_peft_ext")  # its single thread keeps pushes in order
        self._jobs: list[Future[CommitInfo]] = []

    def write_cards(self, folder: Path) -> None:
        """Write the card of each adapter in a folder; an invalid card is a warning."""
        model = self.trainer.peft_model
        for name in model.peft_config:
            write_card_or_warn(folder / home(name), model, name)

    def push_final(self, message: str | None, blocking: bool, token: str | None, revision: str | None) -> Any:
        """Push the adapters in `output_dir`, see `AdapterTrainerMixin.push_to_hub`."""
        args = self.trainer.args
        folder = self._assemble("final", Path(args.output_dir))
        arguments = (folder, message, token or args.hub_token, revision or args.hub_revision)
        return self._push(*arguments) if blocking else self._hub.run_as_future(self._push, *arguments)

    def push_checkpoint(self, checkpoint: Path) -> PushInProgress:
        """Push a checkpoint's adapters in the background, with the state that `hub_strategy` includes.

        Returns:
            The running pushes.
        """
        args, state = self.trainer.args, self.trainer.state
        states = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
        folder = self._assemble(checkpoint.name, checkpoint, states.get(args.hub_strategy))
        by_step = args.save_strategy == IntervalStrategy.STEPS
        time = f"step {state.global_step}" if by_step else f"epoch {int(state.epoch or 0)}"
        arguments = (folder, f"Training in progress, {time}", args.hub_token, args.hub_revision)
        self._jobs.append(self._hub.run_as_future(self._push, *arguments))
        return PushInProgress(cast(Any, list(self._jobs)))

    def warn_of_failures(self) -> None:
        """Log the errors of background pushes, which have ended."""
        for job in self._jobs:
            if error := job.exception():
                logger.warning(str(error))
        self._jobs = []

    def _assemble(self, name: str, source: Path, state_folder: str | None = None) -> Path:
        """Copy the files of a push into a folder: the adapter, and the training state below it."""
        folder = Path(self.trainer.args.output_dir) / PUSHES / name
        shutil.rmtree(folder, ignore_errors=True)
        for file in publishable(source):
            path = PurePosixPath(file)
            if path.name not in (STATE, TRAINED):
                copy(source / file, folder / file)
            if state_folder and path.name != CARD and path.parent.name != "figures":
                copy(source / file, folder / state_folder / file)
        return folder

    def _push(self, folder: Path, message: str | None, token: str | None, revision: str | None) -> CommitInfo:
        repo_id = cast(str, self.trainer.hub_model_id)
        with explained(folder, repo_id, {"revision": revision, "commit_message": message}):
            published = published_cards(repo_id, revision, token)
        write_cards(folder, self.trainer.peft_model, repo_id, published)
        commit = push_adapter(folder, repo_id, revision=revision, token=token, commit_message=message)
        shutil.rmtree(folder)
        return commit


def copy(source: Path, target: Path) -> None:
    """Copy a file, with the folders above it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
