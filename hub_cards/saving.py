"""What PeftModel does when adapters of this package are saved and pushed: with a card that tells of them.

peft writes a blank template beside an adapter; `push_to_hub`, which comes from transformers, puts another one on top
of it and uploads every file at hand. Here both go by `write_card` and `push_adapter`.
"""

import inspect
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import RevisionNotFoundError
from peft import PeftModel
from peft.utils import CONFIG_NAME

from ..registry import extend
from .card import write_card
from .push import explained, push_adapter

Stock = Callable[..., Any]


@extend
def save_pretrained(stock: Stock, model: PeftModel, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
    """As peft does, and a card for each adapter."""
    stock(save_directory, *args, **kwargs)
    given = inspect.signature(stock).bind(save_directory, *args, **kwargs).arguments
    if given.get("is_main_process", True):
        write_cards(Path(save_directory), model, given.get("selected_adapters"))


@extend
def create_or_update_model_card(stock: Stock, model: PeftModel, output_dir: str | Path) -> None:
    """The card of an adapter that lies there; none before it is saved, which is when peft asks."""
    if Path(output_dir, CONFIG_NAME).exists():
        write_card(output_dir, model)


@extend
def push_to_hub(
    stock: Stock,
    model: PeftModel,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = None,
    tags: list[str] | None = None,
) -> CommitInfo:
    """Save the adapters into a temporary folder, with their cards, and push it.

    What an author has written into the card on the Hub is kept. The folder is removed when the push has arrived; after
    an error it stays, and the error names it.

    Args:
        max_shard_size: no use here: adapters are saved in one file.
        tags: further tags for the card.

    Raises:
        ValueError, PushError: as `push_adapter`.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"{repo_id.rpartition('/')[2]}-"))
    model.save_pretrained(str(folder))
    options: dict[str, Any] = {"revision": revision, "private": private, "create_pr": create_pr}
    options |= {"commit_message": commit_message, "commit_description": commit_description}
    with explained(folder, repo_id, options):
        repo_id = fetch_cards(folder, repo_id, revision, private, token)
    write_cards(folder, model, repo_id=repo_id, tags=tags)
    info = push_adapter(folder, repo_id, token=token, **options)
    shutil.rmtree(folder)
    return info


def fetch_cards(
    folder: Path, repo_id: str, revision: str | None, private: bool | None, token: bool | str | None
) -> str:
    """Put the cards that the Hub has into the folder, so that `write_card` finds what their author has edited.

    Returns:
        The repository's full id; it has been created where it was missing.
    """
    api = HfApi(token=token, library_name="hf_peft_ext")
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    try:
        files = api.list_repo_files(repo_id, revision=revision)
    except RevisionNotFoundError:  # a branch that the push will create, from the main one
        return fetch_cards(folder, repo_id, None, private, token)
    for file in files:
        if PurePosixPath(file).name == "README.md" and Path(folder, file).exists():
            api.hf_hub_download(repo_id, file, revision=revision, local_dir=folder)
    return repo_id


def write_cards(
    folder: Path,
    model: PeftModel,
    selected: list[str] | None = None,
    repo_id: str | None = None,
    tags: list[str] | None = None,
) -> None:
    """The card of each adapter, beside it: "default" is saved in the folder itself, the others below."""
    names = selected or list(model.peft_config)
    for name in names:
        write_card(folder if name == "default" else folder / name, model, repo_id=repo_id)
    if "default" not in names:
        write_contents(folder, names)
    if tags:
        card = ModelCard.load(folder / "README.md")
        card.data["tags"] = sorted({*(card.data.get("tags") or []), *tags})
        card.save(folder / "README.md")


def write_contents(folder: Path, names: list[str]) -> None:
    """A first page for a folder of which each adapter lies in a sub-folder, where it has its own card."""
    if not (folder / "README.md").exists():
        rows = "\n".join(f'- [{name}]({name}/README.md): `subfolder="{name}"`' for name in names)
        data = ModelCardData(library_name="peft", tags=["hf_peft_ext"])
        text = f"Each adapter lies in a folder of its own, which `PeftModel.from_pretrained` is told:\n\n{rows}\n"
        ModelCard(f"---\n{data.to_yaml()}\n---\n\n# Adapters\n\n{text}").save(folder / "README.md")
