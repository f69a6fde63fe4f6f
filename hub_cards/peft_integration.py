"""Saves and pushes adapters of this package with their cards, by PeftModel's own methods.

peft writes a blank template beside an adapter. `push_to_hub`, inherited from transformers, overwrites it by another
one and uploads every file in the folder. Here both use `write_card` and `push_adapter`.
"""

import inspect
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from peft.utils import CONFIG_NAME
from peft.utils.other import AuxiliaryTrainingWrapper

from hf_peft_ext.hub_cards.card import on_the_hub, write_card
from hf_peft_ext.hub_cards.card_edits import CardEdits, read_text
from hf_peft_ext.hub_cards.card_files import CARD
from hf_peft_ext.hub_cards.push import explained, push_adapter
from hf_peft_ext.registry import extend_on_first_use
from hf_peft_ext.tuners.prune_bottlenecks import check_pruned
from hf_peft_ext.tuners.sparse.select import check_selected
from hf_peft_ext.validation.checks import check

Stock = Callable[..., Any]


class CardWarning(UserWarning):
    """An adapter was saved, but its card could not be written."""


@extend_on_first_use
def save_pretrained(stock: Stock, model: PeftModel, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
    """Save as peft does, and write the card of each adapter; pickled weights get no card.

    The adapter is saved even if its card cannot be written; that is a `CardWarning`.

    Embeddings of the base model are not saved, even if its vocabulary was changed: loading refuses adapters that
    contain weights of the base model. New tokens are saved by `modules_to_save` or `trainable_token_indices`.

    Args:
        stock: peft's method.
        model: the model.
        save_directory, args, kwargs: of peft's method.

    Raises:
        ValueError: `save_embedding_layers` is True, or a sparse adapter is not selected or pruned yet.
    """
    bound = inspect.signature(stock).bind(save_directory, *args, **kwargs)
    arguments = bound.arguments
    rule = "must not be True: name the embeddings in `modules_to_save`, or new tokens in `trainable_token_indices`"
    check("save_embedding_layers", True, arguments.get("save_embedding_layers") is not True, rule)
    arguments["save_embedding_layers"] = False
    check_selected(model, arguments.get("selected_adapters"))
    check_pruned(model, arguments.get("selected_adapters"))
    warn_of_new_tokens(model)
    with without_stock_card(model):
        stock(*bound.args, **bound.kwargs)
    if arguments.get("is_main_process", True) and arguments.get("safe_serialization", True):
        names = arguments.get("selected_adapters") or list(model.peft_config)
        for name in names:
            write_card_or_warn(Path(save_directory) / home(name), model, name)
        if "default" not in names:
            write_contents(Path(save_directory), names)


@contextmanager
def without_stock_card(model: PeftModel) -> Iterator[None]:
    """Keep peft from writing a card when it saves: its metadata would be taken for the author's."""
    vars(model)["create_or_update_model_card"] = lambda output_dir: None
    try:
        yield
    finally:
        vars(model).pop("create_or_update_model_card", None)


def warn_of_new_tokens(model: Any) -> None:
    """Warn if the model has embeddings of new tokens that no part of the adapter saves."""
    base = model.active_peft_config.base_model_name_or_path
    size = getattr(getattr(model, "config", None), "vocab_size", None)  # a plain torch module has no config
    if not base or size is None or isinstance(model.get_input_embeddings(), AuxiliaryTrainingWrapper):
        return
    try:
        base_size = type(model.config).from_pretrained(base, local_files_only=True).vocab_size
    except (OSError, ValueError):  # the base model is not on this machine
        return
    if size != base_size:
        warnings.warn(
            f"The vocabulary was changed from {base_size} to {size} tokens, and the new embeddings are not saved with "
            f"the adapter: name them in `modules_to_save`, or the tokens in `trainable_token_indices`.",
            stacklevel=4,
        )


@extend_on_first_use
def create_or_update_model_card(stock: Stock, model: PeftModel, output_dir: str | Path) -> None:
    """Write the model card if the folder contains an adapter."""
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
    """Save the adapters and their cards into a temporary folder, and push it.

    The author's part of a card on the Hub is kept. The folder is removed when the push has arrived. After an error it
    stays, and the error names it.

    Args:
        stock, model: the method of transformers, which is not called, and the model.
        repo_id, commit_message, commit_description, private, token, revision, create_pr: see `push_adapter`.
        max_shard_size: unused; an adapter is saved in one file.
        tags: further tags for the card.

    Raises:
        ValueError, PushError: see `push_adapter`.
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
        write_cards(folder, model, repo_id, published)
        if "default" not in model.peft_config:
            write_contents(folder, list(model.peft_config), published.get(CARD), repo_id)
        if tags:
            card = ModelCard.load(folder / CARD)
            card.data["tags"] = sorted({*(card.data.get("tags") or []), *tags})
            card.save(folder / CARD)
        info = push_adapter(folder, repo_id, token=token, **options)
    except ValueError:  # refused, so there is no push to finish
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)
    return info


def full_id(repo_id: str, token: bool | str | None = None) -> str:
    """The id of a repository as "user/name"; a bare name is of the token's user."""
    return repo_id if "/" in repo_id else f"{HfApi(token=token).whoami()['name']}/{repo_id}"


def published_cards(repo_id: str, revision: str | None = None, token: bool | str | None = None) -> dict[str, str]:
    """Download the cards of a repository on the Hub, whose author's parts are kept: path -> text.

    Args:
        repo_id: its full id, "user/name".
        revision: the branch; the main one if there is no such branch yet.
        token: an access token.

    Raises:
        ValueError: a card is not UTF-8.
    """
    api = HfApi(token=token, library_name="hf_peft_ext")
    try:
        files = api.list_repo_files(repo_id, revision=revision)
    except RevisionNotFoundError:
        return published_cards(repo_id, None, token) if revision else {}
    except RepositoryNotFoundError:
        return {}
    paths = [file for file in files if PurePosixPath(file).name == CARD]
    cards = {file: Path(api.hf_hub_download(repo_id, file, revision=revision)) for file in paths}
    return {file: read_text(path, f"{file} of {repo_id} on the Hub") for file, path in cards.items()}


def home(adapter: str) -> PurePosixPath:
    """The folder of an adapter in a saved one: peft saves "default" in the folder itself, others in sub-folders."""
    return PurePosixPath("" if adapter == "default" else adapter)


def write_card_or_warn(folder: Path, model: PeftModel, adapter: str) -> None:
    """Write the card of a saved adapter; an error becomes a warning."""
    try:
        write_card(folder, model)
    except ValueError as error:
        message = f"The adapter {adapter!r} is saved in {folder}, but its card (README.md) is not: {error}"
        warnings.warn(message, CardWarning, stacklevel=4)  # at the call of `save_pretrained`


def write_cards(folder: Path, model: PeftModel, repo_id: str, published: Mapping[str, str]) -> None:
    """Write the card of each adapter in a folder, for a repository.

    Args:
        folder: saved adapters.
        model: with these adapters.
        repo_id: the repository.
        published: the cards on the Hub, by path.

    Raises:
        ValueError: a card is invalid, here or on the Hub.
    """
    for name in model.peft_config:
        inside = None if name == "default" else name
        text = published.get(str(home(name) / CARD))
        write_card(folder / home(name), model, repo_id=repo_id, subfolder=inside, published=text)


def write_contents(folder: Path, names: list[str], published: str | None = None, repo_id: str = "") -> None:
    """Write an overview into a folder whose adapters are all in sub-folders.

    Args:
        folder: saved adapters.
        names: of the adapters.
        published: the overview on the Hub, which is kept.
        repo_id: its repository, for errors.

    Raises:
        ValueError: the overview on the Hub cannot be read.
    """
    if published is not None:
        try:
            CardEdits.read(published)
        except ValueError as error:
            raise on_the_hub(error, repo_id) from error
        (folder / CARD).write_text(published, encoding="utf-8")
    elif not (folder / CARD).exists():
        rows = "\n".join(f'- [{name}]({name}/{CARD}): `subfolder="{name}"`' for name in names)
        data = ModelCardData(library_name="peft", tags=["hf_peft_ext"])
        text = f"Each adapter has a folder of its own; pass it to `PeftModel.from_pretrained`:\n\n{rows}\n"
        ModelCard(f"---\n{data.to_yaml()}\n---\n\n# Adapters\n\n{text}").save(folder / CARD)
