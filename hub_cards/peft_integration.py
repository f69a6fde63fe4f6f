"""What PeftModel does when adapters of this package are saved and pushed: with a card that tells of them.

peft writes a blank template beside an adapter; `push_to_hub`, which comes from transformers, puts another one on top
of it and uploads every file at hand. Here both go by `write_card` and `push_adapter`.
"""

import inspect
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from peft.utils import CONFIG_NAME
from peft.utils.other import AuxiliaryTrainingWrapper

from hf_peft_ext.hub_cards.card import on_the_hub, write_card
from hf_peft_ext.hub_cards.merge import Version, read_text
from hf_peft_ext.hub_cards.push import explained, push_adapter
from hf_peft_ext.registry import extend_on_first_use
from hf_peft_ext.validation.checks import check

CARD = "README.md"
Stock = Callable[..., Any]


class CardWarning(UserWarning):
    """An adapter was saved, but its card could not be written."""


@extend_on_first_use
def save_pretrained(stock: Stock, model: PeftModel, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
    """As peft does, and a card for each adapter; none beside a pickle, which no card recommends.

    The adapter counts: what is wrong with the card of one is a `CardWarning`.

    Embeddings of the base model are not saved, also where its vocabulary was changed: an adapter that brings weights
    of the base model along is refused when it is loaded. `modules_to_save` or `trainable_token_indices` save new
    tokens.

    Raises:
        ValueError: `save_embedding_layers` is True.
    """
    bound = inspect.signature(stock).bind(save_directory, *args, **kwargs)
    given = bound.arguments
    rule = "must not be True: name the embeddings in `modules_to_save`, or new tokens in `trainable_token_indices`"
    check("save_embedding_layers", True, given.get("save_embedding_layers") is not True, rule)
    given["save_embedding_layers"] = False
    warn_of_new_tokens(model)
    vars(model)["create_or_update_model_card"] = lambda output_dir: None  # which peft asks for before it saves
    try:
        stock(*bound.args, **bound.kwargs)
    finally:
        del vars(model)["create_or_update_model_card"]
    if given.get("is_main_process", True) and given.get("safe_serialization", True):
        names = given.get("selected_adapters") or list(model.peft_config)
        for name in names:
            write_card_or_warn(Path(save_directory) / home(name), model, name)
        if "default" not in names:
            write_contents(Path(save_directory), names)


def warn_of_new_tokens(model: Any) -> None:
    """Say that rows of embeddings which the base model has not are lost, where no part of the adapter holds them."""
    base, size = model.active_peft_config.base_model_name_or_path, getattr(model.config, "vocab_size", None)
    if not base or size is None or isinstance(model.get_input_embeddings(), AuxiliaryTrainingWrapper):
        return
    try:
        known = type(model.config).from_pretrained(base, local_files_only=True).vocab_size
    except (OSError, ValueError):  # of a model that lies nowhere, nothing is known
        return
    if size != known:
        warnings.warn(
            f"The vocabulary was changed from {known} to {size} tokens, and the new embeddings are not saved with the "
            f"adapter: name them in `modules_to_save`, or the tokens in `trainable_token_indices`.",
            stacklevel=4,
        )


@extend_on_first_use
def create_or_update_model_card(stock: Stock, model: PeftModel, output_dir: str | Path) -> None:
    """The card of an adapter that lies there; none where there is no adapter."""
    if Path(output_dir, CONFIG_NAME).exists():
        write_card(output_dir, model)


@extend_on_first_use
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
    validate_repo_id(repo_id)
    folder = Path(tempfile.mkdtemp(prefix=f"{repo_id.rpartition('/')[2]}-"))
    options: dict[str, Any] = {"revision": revision, "private": private, "create_pr": create_pr}
    options |= {"commit_message": commit_message, "commit_description": commit_description}
    try:
        model.save_pretrained(str(folder))
        with explained(folder, repo_id, options):
            repo_id = full_id(repo_id, token)
            published = published_cards(repo_id, revision, token)
        write_cards(folder, model, repo_id, published, tags)
        info = push_adapter(folder, repo_id, token=token, **options)
    except ValueError:  # refused, so there is nothing to finish
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)
    return info


def full_id(repo_id: str, token: bool | str | None = None) -> str:
    """A repository as "user/name", also where only its name is given."""
    return repo_id if "/" in repo_id else f"{HfApi(token=token).whoami()['name']}/{repo_id}"


def published_cards(repo_id: str, revision: str | None = None, token: bool | str | None = None) -> dict[str, str]:
    """The cards that a repository has on the Hub, by path; what their author has edited there is to be kept.

    Args:
        repo_id: its full id, "user/name".
        revision: the branch; the main one where there is no such branch yet.

    Raises:
        ValueError: one of them is not UTF-8.
    """
    api = HfApi(token=token, library_name="hf_peft_ext")
    try:
        files = api.list_repo_files(repo_id, revision=revision)
    except RevisionNotFoundError:
        return published_cards(repo_id, None, token) if revision else {}
    except RepositoryNotFoundError:
        return {}
    paths = [file for file in files if PurePosixPath(file).name == CARD]
    found = {file: Path(api.hf_hub_download(repo_id, file, revision=revision)) for file in paths}
    return {file: read_text(path, f"{file} of {repo_id} on the Hub") for file, path in found.items()}


def home(adapter: str) -> PurePosixPath:
    """Where in a folder peft saves an adapter: "default" in the folder itself, the others below."""
    return PurePosixPath("" if adapter == "default" else adapter)


def write_card_or_warn(folder: Path, model: PeftModel, adapter: str) -> None:
    """The card of an adapter that has just been saved; where there can be none, a warning that says why."""
    try:
        write_card(folder, model)
    except ValueError as error:
        said = f"The adapter {adapter!r} is saved in {folder}, but its card (README.md) is not: {error}"
        warnings.warn(said, CardWarning, stacklevel=4)  # where `save_pretrained` is called


def write_cards(
    folder: Path,
    model: PeftModel,
    repo_id: str,
    published: Mapping[str, str],
    tags: list[str] | None = None,
) -> None:
    """The card of each adapter, beside it, for a repository.

    Args:
        published: the cards on the Hub, by path.
        tags: further tags for the first card.
    """
    names = list(model.peft_config)
    for name in names:
        inside = None if name == "default" else name
        text = published.get(str(home(name) / CARD))
        write_card(folder / home(name), model, repo_id=repo_id, subfolder=inside, published=text)
    if "default" not in names:
        try:
            write_contents(folder, names, published.get(CARD))
        except ValueError as error:
            raise on_the_hub(error, repo_id) from error
    if tags:
        card = ModelCard.load(folder / CARD)
        card.data["tags"] = sorted({*(card.data.get("tags") or []), *tags})
        card.save(folder / CARD)


def write_contents(folder: Path, names: list[str], published: str | None = None) -> None:
    """A first page for a folder of which each adapter lies in a sub-folder, where it has its own card.

    Raises:
        ValueError: the page on the Hub cannot be read.
    """
    if published is not None:
        Version.read(published)
        (folder / CARD).write_text(published, encoding="utf-8")
    elif not (folder / CARD).exists():
        rows = "\n".join(f'- [{name}]({name}/{CARD}): `subfolder="{name}"`' for name in names)
        data = ModelCardData(library_name="peft", tags=["hf_peft_ext"])
        text = f"Each adapter lies in a folder of its own, which `PeftModel.from_pretrained` is told:\n\n{rows}\n"
        ModelCard(f"---\n{data.to_yaml()}\n---\n\n# Adapters\n\n{text}").save(folder / CARD)
